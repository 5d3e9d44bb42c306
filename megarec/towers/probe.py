"""A short training of the flat model, to see which of its features interact."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from megarec.config.sections import RunConfig
from megarec.config.tower_sections import IdentityTowerConfig
from megarec.data.schema import load_schema
from megarec.embeddings.layout import build_layout
from megarec.errors import UserError
from megarec.towers.costs import measure_lengths
from megarec.towers.interactions import InteractionMean, Matrix
from megarec.training.build import Run, build_run
from megarec.training.clock import Clock
from megarec.training.engine import set_learning_rate, start_process
from megarec.training.step import train_step

EXAMPLES = 8_192  # whose embeddings are compared; the mean |cosine| is then known to about 0.003
REPORT_EVERY = 50  # steps

# DeepSpeed sections that report about a run, and batch sizes stated for the run's number of ranks.
NOT_OF_A_PROBE = (
    "tensorboard", "wandb", "comet", "csv_monitor", "flops_profiler", "wall_clock_breakdown",
    "train_batch_size", "train_micro_batch_size_per_gpu",
)  # fmt: skip


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
    mean = InteractionMean(build_layout(run.schema, config.embedding, config.model.dim))
    with torch.no_grad():
        for batch in islice(run.train.batches(epoch=0), math.ceil(EXAMPLES / config.data.batch_size)):
            mean.add(run.sparse.forward(batch.to(run.device)))
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
    clock = Clock(run.device)
    steps = run.schedule.total_steps
    loss = torch.tensor(float("nan"))
    for step, batch in enumerate(islice(run.train.batches(epoch=0), steps)):
        batch = batch.to(run.device)
        clock.next_step(sampled=False)
        factor = run.schedule.factor(step)
        set_learning_rate(run.engine, factor * run.dense_learning_rate)
        run.sparse.scale_learning_rate(factor)
        result = train_step(run.engine, run.sparse, batch, world_size=1, clock=clock)
        if (step + 1) % REPORT_EVERY == 0 or step + 1 == steps:
            loss = binary_cross_entropy_with_logits(result.logits.float(), batch.labels)
            say(f"probe: step {step + 1}/{steps}, loss {loss:.4f}")
    return float(loss)
