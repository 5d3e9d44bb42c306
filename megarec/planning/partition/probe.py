"""Interactions of features as a short training finds them: a flat model, one process, training data only.

For the second difference the model is a small DCNv2, whatever the run's: what interacts is a property of the data, a
cross layer learns it in few steps, and a probe of a model of many GFLOP an example would cost what it should save. For
the cosine it is the run's own model, as in DMT (arXiv 2403.00877).
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megarec.config.base import ModelConfig
from megarec.config.deepspeed import MONITORS
from megarec.config.models import DcnConfig
from megarec.config.sections import RunConfig
from megarec.config.towers import IdentityTowerConfig
from megarec.data.schema import load_schema
from megarec.data.store import Store
from megarec.dense.objective import label_losses
from megarec.distributed.process import start_process
from megarec.errors import UserError
from megarec.planning.partition.interactions import InteractionMean, Matrix, Measure, second_differences
from megarec.planning.partition.limits import measure_lengths
from megarec.run.build import Run, build_run
from megarec.training.profiling import StepTimer
from megarec.training.step import train_step

COSINES = 8_192  # examples whose embeddings are compared; the mean |cosine| is then known to about 0.003
DIFFERENCES = 1_024  # examples, each with another one beside it
REPORT_EVERY = 50  # steps
# DeepSpeed sections that report about a run, and batch sizes stated for the run's number of ranks.
NOT_OF_A_PROBE = (*MONITORS, "flops_profiler", "train_batch_size", "train_micro_batch_size_per_gpu")
DIVERGED = "diverged; take lower rates, as by --set embedding.learning_rate=0.01 --set dense.learning_rate=0.001"
LAYERS, RANK, HEAD = 2, 32, [64, 64]  # of the DCNv2


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


def probe(config: RunConfig, steps: int, measure: Measure, say: Callable[[str], None]) -> Probe:
    """Train briefly on the training data in this process, then measure how features interact.

    Args:
        config: of any topology and exchange; the model is trained without towers on one rank.
        steps: at most so many; one epoch at most.

    Raises:
        UserError: data are missing, the config cannot train, the model diverges, or this is one process of many.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"the probe runs in one process, but WORLD_SIZE={os.environ['WORLD_SIZE']}: start it by python")
    load_schema(Path(config.data.path))  # data that are missing are told before a process group is there
    config = probe_config(config, steps, measure)
    run = build_run(config, start_process(config))
    loss = _train(run, say)
    if not math.isfinite(loss):
        raise UserError(
            f"probe: the loss of its last step is {loss} (step {run.schedule.total_steps}, {config.model.name}): it "
            f"{DIVERGED}"
        )
    found, examples = _differences(run) if measure == "difference" else _cosines(run)
    if not np.isfinite(found).all():
        raise UserError(
            f"probe: interactions are not finite numbers: the model, whose last loss is {loss:.4g}, {DIVERGED}"
        )
    reason = (
        f"probe: {config.model.name}, {run.schedule.total_steps} steps of {config.data.batch_size} training examples, "
        f"loss of the last {loss:.4f}; mean |{measure}| over {examples:,} training examples"
    )
    rows = run.train.store if isinstance(run.train.store, Store) else run.valid.store  # a stream has no order to ask
    return Probe(found, measure_lengths(rows), reason)


def _cosines(run: Run) -> tuple[Matrix, int]:
    mean = InteractionMean(run.spec.layout)
    for values, _ in _embeddings(run, COSINES):
        mean.add(values)
    return mean.mean(), mean.examples


def _differences(run: Run) -> tuple[Matrix, int]:
    looked_up = _embeddings(run, 2 * DIFFERENCES)
    values, numeric = (torch.cat(parts) for parts in zip(*looked_up, strict=True))
    half = min(len(values) // 2, DIFFERENCES)
    model = run.dense.module.eval()

    def logits(x_BC: Tensor) -> Tensor:
        """Numeric features are those of the first example: what embeddings change does not need their own."""
        keys = torch.zeros(len(x_BC), dtype=torch.int64, device=x_BC.device)
        found: Tensor = model(numeric[:1].expand(len(x_BC), -1), x_BC, keys)
        return found

    return second_differences(logits, run.spec.layout, values[:half], values[half : 2 * half]), half


@torch.no_grad()
def _embeddings(run: Run, examples: int) -> list[tuple[Tensor, Tensor]]:
    """(pooled embeddings, numeric features) of the first batches that hold so many, or of a whole epoch."""
    batches = islice(run.train.batches(epoch=0), math.ceil(examples / run.config.data.batch_size))
    on_device = (batch.to(run.device) for batch in batches)
    return [(run.sparse.look_up(batch).values.float(), batch.numeric) for batch in on_device]


def probe_config(config: RunConfig, steps: int, measure: Measure) -> RunConfig:
    """A flat model on one rank, trained for at most so many steps of one epoch."""
    model, deepspeed = config.model, {k: value for k, value in config.deepspeed.items() if k not in NOT_OF_A_PROBE}
    if measure == "difference":
        shared = {key: value for key, value in config.model if key in ModelConfig.model_fields and key != "name"}
        model = DcnConfig(**shared | {"layers": LAYERS, "rank": RANK, "head": HEAD, "dropout": 0.0}, name="dcn")
        deepspeed = {}
    one_rank = {"tensor": 1, "ranks_per_host": None, "exchange": "flat", "towers": None}
    return config.model_copy(
        update={
            "parallel": config.parallel.model_copy(update=one_rank),
            "tower_module": IdentityTowerConfig(),
            "train": config.train.model_copy(update={"epochs": 1, "max_steps": steps}),
            "model": model,
            "deepspeed": deepspeed,
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
            logits, labels = result.logits.float(), batch.labels
            loss = label_losses(logits.view(batch.size, -1), labels.view(batch.size, -1), batch.weights).sum()
            say(f"probe: step {step + 1}/{steps}, loss {loss:.4f}")
    return float(loss)
