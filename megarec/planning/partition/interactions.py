"""How strongly features interact: the mean |cosine| of their pooled embeddings (DMT, arXiv 2403.00877).

Embeddings of different widths (several embeddings of one feature, flattened, or small ones) are compared over the
columns that both have: the narrower one is filled up with zeros. Two random vectors of widths m and n have a mean
|cosine| near sqrt(2 / (pi max(m, n))), so a narrow pair looks closer than a wide one by chance alone.

They are taken from a short training of the flat model (`probe`), or from a file.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from megarec.config.deepspeed import MONITORS
from megarec.config.sections import RunConfig
from megarec.config.towers import IdentityTowerConfig
from megarec.data.schema import load_schema
from megarec.distributed.process import start_process
from megarec.errors import UserError
from megarec.planning.partition.limits import measure_lengths
from megarec.run.build import Run, build_run
from megarec.sparse.layout import EmbeddingLayout
from megarec.training.profiling import StepTimer
from megarec.training.step import train_step

Matrix = NDArray[np.float64]

CHUNK_COSINES = 1 << 24  # cosines held at a time: 64 MiB
EXAMPLES = 8_192  # whose embeddings are compared; the mean |cosine| is then known to about 0.003
REPORT_EVERY = 50  # steps
# DeepSpeed sections that report about a run, and batch sizes stated for the run's number of ranks.
NOT_OF_A_PROBE = (*MONITORS, "flops_profiler", "train_batch_size", "train_micro_batch_size_per_gpu")


class InteractionMean:
    """The mean |cosine| of every pair of features, over the examples in which neither embedding is zero.

    A zero embedding, such as that of an empty list, has no direction. A pair that never met counts as 0, a feature
    with itself as 1.
    """

    def __init__(self, layout: EmbeddingLayout) -> None:
        features = layout.features
        self._width = max(feature.columns for feature in features)
        padding = layout.width  # the column of zeros that `add` appends
        columns = [[*range(f.start, f.start + f.columns)] + [padding] * (self._width - f.columns) for f in features]
        self._columns = torch.tensor(columns).flatten()
        self._sum = torch.zeros(len(features), len(features), dtype=torch.float64)
        self._count = torch.zeros_like(self._sum)
        self.examples = 0

    def add(self, pooled: Tensor) -> None:
        """Pooled embeddings [B, layout.width], columns in layout order."""
        features = len(self._sum)
        for chunk in pooled.split(max(1, CHUNK_COSINES // features**2)):
            padded = torch.nn.functional.pad(chunk, (0, 1))
            x = padded[:, self._columns.to(chunk.device)].unflatten(1, (features, self._width))
            norm = torch.linalg.vector_norm(x, dim=2, keepdim=True)
            unit = torch.where(norm > 0, x / norm, 0)
            self._sum += torch.bmm(unit, unit.transpose(1, 2)).abs_().sum(0).double().cpu()
            there = (norm > 0).squeeze(2).float()
            self._count += (there.T @ there).double().cpu()
        self.examples += pooled.shape[0]

    def mean(self) -> Matrix:
        """[F, F], symmetric, features in layout order."""
        mean = torch.where(self._count > 0, self._sum / self._count, 0)
        mean = ((mean + mean.T) / 2).clamp_(0, 1).fill_diagonal_(1)
        return mean.numpy()


def read_interactions(path: Path, features: int) -> Matrix:
    """[F, F] of an .npy file, such as a probe wrote.

    Raises:
        UserError: no such file, or it holds no symmetric matrix of so many features with values in [0, 1].
    """
    try:
        matrix = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        why = getattr(error, "strerror", None) or "no .npy file of numbers"
        raise UserError(f"--interactions {path}: cannot be read ({why})") from error
    if not isinstance(matrix, np.ndarray) or matrix.dtype.kind not in "fiu":
        raise UserError(f"--interactions {path}: holds no numbers; expected a matrix [{features}, {features}]")
    if matrix.shape != (features, features):
        raise UserError(
            f"--interactions {path}: a matrix {list(matrix.shape)}, but the run has {features} categorical features: "
            f"expected [{features}, {features}], in schema order, those of smaller width last"
        )
    matrix = matrix.astype(np.float64)
    if not (np.isfinite(matrix).all() and matrix.min() >= 0 and matrix.max() <= 1 and np.allclose(matrix, matrix.T)):
        raise UserError(f"--interactions {path}: expected a symmetric matrix of values in [0, 1], the mean |cosine|")
    return matrix


@dataclass(frozen=True)
class Probe:
    """What a probe found.

    Attributes:
        interactions: [F, F], features in layout order.
        mean_lengths: ids an example of the multi-valued features.
        reason: what was done, for the log.
    """

    interactions: Matrix
    mean_lengths: dict[str, float]
    reason: str


def probe(config: RunConfig, steps: int, say: Callable[[str], None]) -> Probe:
    """Train briefly on the training data in this process, then compare the pooled embeddings of features.

    Args:
        config: of any topology and exchange; the model is trained without towers on one rank.
        steps: at most so many; one epoch at most.

    Raises:
        UserError: data are missing, the config cannot train, or this is one process of many.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"the probe runs in one process, but WORLD_SIZE={os.environ['WORLD_SIZE']}: start it by python")
    load_schema(Path(config.data.path))  # data that are missing are told before a process group is there
    config = probe_config(config, steps)
    run = build_run(config, start_process(config))
    loss = _train(run, say)
    mean = InteractionMean(run.spec.layout)
    with torch.no_grad():
        for batch in islice(run.train.batches(epoch=0), math.ceil(EXAMPLES / config.data.batch_size)):
            mean.add(run.sparse.look_up(batch.to(run.device)).values)
    reason = (
        f"probe: {run.schedule.total_steps} steps of {config.data.batch_size} training examples, loss of the last "
        f"{loss:.4f}; interactions over {mean.examples:,} training examples"
    )
    return Probe(mean.mean(), measure_lengths(run.train.store), reason)


def probe_config(config: RunConfig, steps: int) -> RunConfig:
    """The flat model of a config on one rank, trained for at most so many steps of one epoch."""
    one_rank = {"tensor": 1, "ranks_per_host": None, "exchange": "flat", "towers": None}
    return config.model_copy(
        update={
            "parallel": config.parallel.model_copy(update=one_rank),
            "tower_module": IdentityTowerConfig(),
            "train": config.train.model_copy(update={"epochs": 1, "max_steps": steps}),
            "deepspeed": {key: value for key, value in config.deepspeed.items() if key not in NOT_OF_A_PROBE},
        }
    )


def _train(run: Run, say: Callable[[str], None]) -> float:
    """As the trainer's loop steps; returns the loss of the last batch."""
    timer = StepTimer(run.device)
    steps = run.schedule.total_steps
    loss = torch.tensor(float("nan"))
    for step, batch in enumerate(islice(run.train.batches(epoch=0), steps)):
        batch = batch.to(run.device)
        timer.next_step(sampled=False)
        factor = run.schedule.factor(step)
        run.dense.scale_learning_rate(factor)
        run.sparse.scale_learning_rate(factor)
        result = train_step(run.dense, run.sparse, batch, timer=timer)
        if (step + 1) % REPORT_EVERY == 0 or step + 1 == steps:
            loss = binary_cross_entropy_with_logits(result.logits.float(), batch.labels)
            say(f"probe: step {step + 1}/{steps}, loss {loss:.4f}")
    return float(loss)
