"""Predictions from an exported model in one process, without an engine.

model = megarec.load_model("exported")       # python tools/checkpoint.py export runs/r exported
logits = model.predict(batch)                # what the run's own evaluation computes
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from pydantic import ValidationError
from torch import Tensor

from megarec.checkpoint.format import (
    INDEX,
    MODEL_CONFIG,
    MODEL_FILE,
    Export,
    Index,
    checked_size,
    read_export,
    read_index,
)
from megarec.checkpoint.offline import is_weight, source_of
from megarec.checkpoint.reading import Reader, index_of_file, verify
from megarec.checkpoint.sparse import TABLES, TOWERS
from megarec.checkpoint.writing import verify_file
from megarec.config.sections import RunConfig
from megarec.config.towers import IdentityTowerConfig
from megarec.data.batch import Batch
from megarec.data.row_checks import check_batch
from megarec.data.schema import Schema
from megarec.dense.masters import DENSE as DENSE
from megarec.dense.settings import settings_of
from megarec.distributed.collectives import Ledger
from megarec.distributed.topology import ONE_RANK
from megarec.errors import DamagedCheckpoint, UserError
from megarec.models.initial import materialize
from megarec.models.recommender import Recommender
from megarec.run.spec import ModelSpec, resolve
from megarec.slices import TensorSlice
from megarec.sparse.side import SparseSide
from megarec.sparse.towers.modules import TowerModules
from megarec.sparse.towers.replicas import resolve_optimizer
from megarec.sparse.towers.sizes import ResolvedTowers


class BatchModel(Protocol):
    """A scorer of prepared batches: a `Predictor`, or a scoring bundle (bundle_predictor.py)."""

    config: RunConfig
    schema: Schema

    def predict(self, batch: Batch) -> Tensor:
        """Logits float32 [B], or of several labels [B, T]."""


class Predictor:
    """A trained model; `load_model` builds it.

    Attributes:
        config: of the run that trained it.
        schema: the features that a batch must have.
    """

    def __init__(self, config: RunConfig, schema: Schema, sparse: SparseSide, model: Recommender) -> None:
        self.config, self.schema = config, schema
        self._sparse, self._model = sparse, model
        self._together = [sequence.features for sequence in config.model.sequences]

    @torch.no_grad()
    def predict(self, batch: Batch) -> Tensor:
        """Logits float32 [B], or of several labels [B, T]; their sigmoid is the predicted probability of the label.

        Raises:
            UserError: the batch lacks a feature of the schema, has an id outside its table, or lists of one sequence
                that are not equally long.
        """
        check_batch(batch, self.schema, self._together)
        logits: Tensor = self._model(batch.numeric, self._sparse.look_up(batch).values, batch.keys)
        return logits


def load_model(path: str | Path, device: str | torch.device = "cpu") -> Predictor:
    """Read what `tools/checkpoint.py export` wrote.

    Raises:
        UserError: a file is missing, damaged, or its tensors are not those of its config; nothing was allocated.
    """
    directory = Path(path)
    if (directory / "checkpoints").is_dir() or (directory / INDEX).exists():
        kind = "a checkpoint" if (directory / INDEX).exists() else "a run"
        raise UserError(
            f"{directory} is {kind}, not an exported model: run 'tools/checkpoint.py export {directory} DIR'"
        )
    about = read_export(directory)
    config, schema = _model_of(about, directory / MODEL_CONFIG)
    file = checked_size(directory, MODEL_FILE, about.file)
    verify_file(file, about.file)
    reader = Reader(directory, index_of_file(file, about.file))
    return _predictor(config, schema, _weights(reader, file, MODEL_CONFIG), torch.device(device))


def load_checkpoint(directory: Path, device: str | torch.device = "cpu") -> Predictor:
    """Read the model out of a checkpoint, whatever topology wrote it; nothing is written.

    Raises:
        UserError: a file is missing, damaged, or its tensors are not those of its config; nothing was allocated.
    """
    return _predictor(*open_checkpoint(directory), torch.device(device))


def open_checkpoint(directory: Path) -> tuple[RunConfig, Schema, "Weights"]:
    """A checkpoint's run, features and weights, verified; nothing is allocated.

    Raises:
        UserError: a file is missing or damaged.
    """
    index = read_index(directory)
    config, schema = _model_of(index, directory / INDEX)
    verify(directory, index)
    return config, schema, _weights(Reader(directory, index), directory, INDEX)


@dataclass(frozen=True)
class Weights:
    """Where the weights of a model come from.

    Attributes:
        shapes: by name, as export and checkpoint call them.
        fill: copies the weights of a name into a tensor of its shape, or of as many rows from a first one.
        path: what holds them, for messages.
        about: the file that lists them, for messages.
    """

    shapes: dict[str, tuple[int, ...]]
    fill: Callable[..., object]
    path: Path
    about: str


def _weights(reader: Reader, path: Path, about: str) -> Weights:
    shapes = {name: entry.shape for name, entry in reader.index.tensors.items() if is_weight(name)}

    def fill(name: str, into: Tensor, first_row: int = 0) -> None:
        start = (first_row, *(0 for _ in shapes[name][1:]))[: into.dim()]
        reader.fill(TensorSlice(source_of(name, reader.index), shapes[name], start, into))

    return Weights(shapes, fill, path, about)


def checked_spec(config: RunConfig, schema: Schema, weights: Weights) -> ModelSpec:
    """The model that the weights are of.

    Raises:
        DamagedCheckpoint: they are not those of the config; nothing was allocated.
    """
    try:
        spec = resolve(config, schema)
        model = spec.meta_model()
        expected = {DENSE + name: tuple(p.shape) for name, p in [*model.named_parameters(), *model.named_buffers()]}
        expected |= {f"{TABLES}{table.name}/weight": (table.rows, table.columns) for table in spec.layout.tables}
        expected |= _tower_shapes(spec.towers)
    except (AssertionError, RuntimeError, LookupError, TypeError, ArithmeticError) as error:
        # `load_config` refuses it with its own message; but this config was not written by hand.
        raise DamagedCheckpoint(
            f"{weights.path}: {weights.about} describes no model that can be built ({error}): damaged, or edited"
        ) from error
    _check(weights, expected)
    return spec


def dense_model(config: RunConfig, spec: ModelSpec, weights: Weights, device: torch.device) -> Recommender:
    """The dense model with its weights, in the type in which the run computes."""
    model = spec.meta_model()
    materialize(model, device)
    model.to(settings_of(config.deepspeed).dtype).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            weights.fill(DENSE + name, tensor)
    return model


def _predictor(config: RunConfig, schema: Schema, weights: Weights, device: torch.device) -> Predictor:
    spec = checked_spec(config, schema, weights)
    module = config.tower_module
    sparse = SparseSide(
        spec.layout,
        config.embedding.only_read(),
        ONE_RANK,
        seed=config.train.seed,
        device=device,
        ledger=Ledger(),
        towers=spec.towers,
        tower_optimizer=None if isinstance(module, IdentityTowerConfig) else resolve_optimizer(module, config.dense),
    )
    with torch.no_grad():
        for name, (_, tensor) in sparse.state().items():
            if name.endswith("/weight"):
                weights.fill(TABLES + name, tensor)
        for name, parameter in sparse.modules.bank.named_parameters() if sparse.modules else ():
            weights.fill(TOWERS + name, parameter)
    return Predictor(config, schema, sparse, dense_model(config, spec, weights, device))


def _model_of(about: Index | Export, path: Path) -> tuple[RunConfig, Schema]:
    try:
        return RunConfig.model_validate(about.config), Schema.model_validate(about.data_schema)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def _tower_shapes(towers: ResolvedTowers) -> dict[str, tuple[int, ...]]:
    if towers.towers is None or towers.modules is None:
        return {}
    with torch.device("meta"):
        bank = TowerModules(towers.modules, range(len(towers.towers)))
    return {TOWERS + name: tuple(parameter.shape) for name, parameter in bank.named_parameters()}


def _check(weights: Weights, expected: dict[str, tuple[int, ...]]) -> None:
    """Before anything is allocated: these tensors are there, and so at least their size."""
    there, path = weights.shapes, weights.path
    for name, shape in expected.items():
        if there.get(name) != shape:
            found = f"{list(there[name])}" if name in there else "missing"
            raise DamagedCheckpoint(f"{path}: {name} is {found}, {weights.about} says {list(shape)}")
    if unknown := sorted(set(there) - set(expected)):
        raise DamagedCheckpoint(f"{path}: {unknown[0]} is there, but not in the model of {weights.about}")
    assert sum(map(prod, there.values())) == sum(map(prod, expected.values()))
