"""Small runs that save and load, for the tests of this directory; functions run on the ranks of a pool."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.nn.functional import binary_cross_entropy_with_logits

from megarec.checkpoint.store import Checkpoints
from megarec.config.load import load_config
from megarec.distributed.process import start_process
from megarec.run.build import Run, build_run
from megarec.run.state import TrainState
from megarec.training.profiling import StepTimer
from megarec.training.step import predict, train_step
from tests.logged import logged_lines

MODEL = {"layers": 1, "num_fm": 2, "num_lcb": 2, "rank": 4, "mlp": [16], "dim": 8, "head": [8], "dropout": 0.1}
TOWERS = [["single_0", "single_2", "multi_0"], ["single_1", "single_3", "multi_1"]]
TOWER_MODULE = {"name": "wukong", "num_fm": 1, "num_lcb": 1, "rank": 4, "mlp": [8]}


def write_run(directory: Path, data: Path, /, **sections: dict[str, Any]) -> Path:
    """A run's JSON; `sections` are merged into its own."""
    run: dict[str, dict[str, Any]] = {
        "model": MODEL,
        "data": {"path": str(data), "batch_size": 80},
        "embedding": {"learning_rate": 0.1},
        "dense": {"learning_rate": 0.01},
        "train": {"output_dir": str(directory / "out")},
        "deepspeed": {"zero_optimization": {"stage": 2}},
    }
    for name, values in sections.items():
        run[name] = {**run.get(name, {}), **values}
    if "optimizer" in run["deepspeed"]:
        del run["dense"]
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "run.json"
    path.write_text(json.dumps(run))
    return path


def build(path: Path, overrides: list[str]) -> Run:
    config = load_config(path, overrides)
    return build_run(config, start_process(config))


def store(run: Run) -> Checkpoints:
    directory = Path(run.config.train.output_dir) / "checkpoints"
    return Checkpoints(directory, run)


def train_steps(run: Run, start: int, stop: int) -> list[float]:
    """Mean losses of global batches [start, stop), dropout included."""
    clock, losses = StepTimer(run.device), []
    run.dense.set_learning_rate(run.dense.learning_rate)
    run.sparse.scale_learning_rate(1.0)
    for step in range(start, stop):
        epoch, position = divmod(step, run.train.steps_per_epoch)
        batch = next(iter(run.train.batches(epoch, start=position)))
        clock.next_step(sampled=False)
        result = train_step(run.dense, run.sparse, batch, timer=clock)
        loss = binary_cross_entropy_with_logits(result.logits, batch.labels) / run.topology.world_size
        if run.topology.world is not None:
            dist.all_reduce(loss)
        losses.append(float(loss))
    return losses


@dataclass
class Leg:
    """What a rank saw between a load and a save."""

    losses: list[float]
    logged: list[str]
    logits: list[list[float]]


def leg(
    path: Path, overrides: list[str], start: int, stop: int, *, load: bool, save: bool, logits: bool = False
) -> Leg:
    """Build a run, load the checkpoint of step `start`, train to `stop`, save."""
    run, logged = build(path, overrides), logged_lines()
    checkpoints = store(run)
    if load:
        position = checkpoints.load(start)
        assert position.step == start
    losses = train_steps(run, start, stop)
    if save:
        checkpoints.save(TrainState(step=stop, best=0.5))
        checkpoints.wait()
    seen = [predict(run.dense, run.sparse, batch).tolist() for batch in run.test.batches()] if logits else []
    return Leg(losses, logged, seen)
