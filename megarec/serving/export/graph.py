"""The dense model of a checkpoint, tower modules included, as a graph with a free batch size."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from megarec.checkpoint.sparse import TOWERS
from megarec.config.sections import RunConfig
from megarec.errors import UserError, one_line
from megarec.models.recommender import Recommender
from megarec.run.spec import ModelSpec
from megarec.serving.predictor import Weights, dense_model
from megarec.sparse.towers.modules import TowerModules

OPSET = 20
TOLERANCE = 1e-5  # of logits at least, relative, or absolute below 1: another machine adds in another order
EXAMPLES = 3  # of the traced batch: 0 and 1 would be taken for fixed sizes


class ScoredModel(nn.Module):
    """Embeddings, pooled ones and behind them those of sequences, and numbers -> logits, in float32.

    Inputs that the model does not have are left out of its call.

    Args:
        towers: the tower modules, all on this process; None: there are none.
        model: input layer and over-arch.
        pooled: columns of the pooled embeddings, as they come out of the tables.
        width: of all embeddings: with those of sequences, padded, and their masks.
        numeric: how many numeric features there are.
    """

    def __init__(self, towers: TowerModules | None, model: Recommender, pooled: int, width: int, numeric: int) -> None:
        super().__init__()
        self.towers, self.model, self.pooled, self.width, self.numeric = towers, model, pooled, width, numeric

    @property
    def inputs(self) -> dict[str, int]:
        """Columns of each input, by name, in order."""
        return {name: size for name, size in (("embedded", self.width), ("numeric", self.numeric)) if size}

    def forward(self, *inputs: Tensor) -> Tensor:
        """The inputs, float32 [B, columns] each -> logits float32 [B], or of several labels [B, T]."""
        given = dict(zip(self.inputs, inputs, strict=True))
        nothing = inputs[0][:, :0]
        embedded = given.get("embedded", nothing)
        if self.towers is not None:
            made: Tensor = self.towers(embedded[:, : self.pooled])
            embedded = made if self.pooled == self.width else torch.cat([made, embedded[:, self.pooled :]], dim=1)
        logits: Tensor = self.model(given.get("numeric", nothing), embedded)
        return logits


@dataclass(frozen=True)
class Golden:
    """Inputs of a model in its order, and its logits float32 [rows] by plain torch.

    Attributes:
        tolerance: how far off another computation may be, relative, or absolute below 1.
    """

    inputs: tuple[Tensor, ...]
    logits: Tensor
    tolerance: float

    def difference(self, found: Tensor) -> str | None:
        """Which of the found logits is furthest off, if that is more than another order of adding makes."""
        off = (found - self.logits).abs() / self.logits.abs().clamp(min=1)
        if bool((off <= self.tolerance).all()):
            return None
        place = int(off.reshape(len(off), -1).amax(1).argmax())
        logits = f"{found[place].tolist()}, expected {self.logits[place].tolist()}"
        return f"compiled, row {place} of the golden sample has the logit {logits}"


def scored_model(config: RunConfig, spec: ModelSpec, weights: Weights, pooled: int) -> ScoredModel:
    """Read the dense part of a checkpoint, every weight as float32.

    Args:
        pooled: columns of the pooled embeddings.
    """
    model = dense_model(config, spec, weights, torch.device("cpu")).float()
    bank: TowerModules | None = None
    if spec.towers.towers is not None and spec.towers.modules is not None:
        bank = TowerModules(spec.towers.modules, range(len(spec.towers.towers))).eval()
        with torch.no_grad():
            for name, parameter in bank.named_parameters():
                weights.fill(TOWERS + name, parameter)
    return ScoredModel(bank, model, pooled, pooled + spec.layout.sequence_columns, spec.numeric)


def export_onnx(model: ScoredModel, path: Path) -> None:
    """Write a graph with the inputs of the model, float32 [batch, columns], and the output logit, [batch] or of
    several labels [batch, labels].

    Raises:
        UserError: the packages that this needs are not installed.
    """
    try:
        import onnxscript  # noqa: F401  what torch.onnx translates with
    except ImportError as error:
        raise UserError(
            f"--format onnx needs the packages of the extra 'export' ({error}): pip install 'megarec[export]'"
        ) from error
    batch = torch.export.Dim("batch", min=1)
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            model,
            _example(model),
            input_names=list(model.inputs),
            output_names=["logit"],
            dynamic_shapes=(({0: batch},) * len(model.inputs),),
            opset_version=OPSET,
            dynamo=True,
        )
        assert program is not None
        program.save(path)


def export_program(model: ScoredModel, path: Path) -> torch.export.ExportedProgram:
    """Write a `torch.export` program of the same inputs and output; `torch.export.load` reads it."""
    batch = torch.export.Dim("batch", min=1)
    with _quiet(), torch.no_grad():
        program = torch.export.export(model, _example(model), dynamic_shapes=(({0: batch},) * len(model.inputs),))
        torch.export.save(program, path)
    return program


def compile_program(program: torch.export.ExportedProgram, path: Path, golden: Golden) -> str | None:
    """Write a program as AOTInductor's package for processors like this one; `aoti_load_package` reads it.

    An export works without it, so a compiler's failure is not an error here.

    Args:
        golden: the sample that it must reproduce.

    Returns:
        Why there is none, on one line; None: it is there, and computes that.
    """
    try:
        with _quiet(), torch.no_grad():
            torch._inductor.aoti_compile_and_package(program, package_path=str(path))
            found = torch._inductor.aoti_load_package(str(path))(*golden.inputs)
        why = golden.difference(found)
    except Exception as error:  # of torch, of the compiler, of the loader: their types are not public
        why = one_line((str(error).strip() or type(error).__name__).splitlines()[0])
    if why is not None:
        path.unlink(missing_ok=True)
    return why


def _example(model: ScoredModel) -> tuple[Tensor, ...]:
    return tuple(torch.zeros(EXAMPLES, columns) for columns in model.inputs.values())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints its progress and warns of its own deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
