"""Train the cases of a matrix and compare each loss curve with the one-process reference."""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megarec.config.load import load_config
from megarec.data.sources.synthetic import Shape, prepare_synthetic
from megarec.distributed.process import start_process
from megarec.distributed.rank_pool import RankPool
from megarec.parity.cases import Case
from megarec.parity.reference import evaluates, plain_loss, reference_losses
from megarec.run.build import build_run
from megarec.training.profiling import StepTimer
from megarec.training.step import predict, train_step

STEPS = 20

# Small, but with everything in it: several and small embeddings, numeric and multi-valued features, dropout, L2 and
# clipping that acts. Both eps are far above rounding noise: with 1e-8, AdamW turns a gradient of 1e-9 that is pure
# rounding into a full step, and two correct summation orders diverge; so do tables at a small eps when a ReLU flips.
BASE = {
    "model": {"name": "wukong", "layers": 2, "num_fm": 4, "num_lcb": 4, "rank": 6, "mlp": [16], "dim": 16, "head": [16],
              "dropout": 0.1},
    "data": {"path": "", "batch_size": 64},
    "embedding": {"learning_rate": 0.3, "l2": 1e-4, "dropout": 0.1, "eps": 1e-2,
                  "features": {"single_1": {"embeddings": 2}, "single_2": {"width": 8}, "multi_1": {"width": 4}}},
    "dense": {"learning_rate": 3e-3, "eps": 1e-3},
    "train": {"seed": 3},
    "deepspeed": {"gradient_clipping": 0.1},
}  # fmt: skip


@dataclass(frozen=True)
class Result:
    """One case: the largest relative deviation of its losses from the reference's."""

    name: str
    relative_deviation: float
    tolerance: float
    losses: tuple[float, ...]

    @property
    def passed(self) -> bool:
        return self.relative_deviation <= self.tolerance


def run_matrix(chosen: list[Case], report: Callable[[Result], None] = lambda result: None) -> list[Result]:
    """Train every case for 20 steps on gloo ranks of this machine, on a synthetic data set."""
    results = []
    with tempfile.TemporaryDirectory() as directory:
        path = write_base(Path(directory))
        references: dict[tuple[str, ...], list[float]] = {}
        for case in sorted(chosen, key=lambda case: case.ranks):
            if case.numbers not in references:
                references[case.numbers] = reference_losses(load_config(path, list(case.numbers)), STEPS)
            with RankPool(case.ranks) as pool:
                result = compare(case, path, pool, references[case.numbers])
            report(result)
            results.append(result)
    return results


def write_base(directory: Path) -> Path:
    """The base config and its synthetic data under `directory`; returns the config's path."""
    prepare_synthetic(Shape(examples=2_000, seed=5, labels=2), directory / "data")
    path = directory / "parity.json"
    path.write_text(json.dumps({**BASE, "data": {"path": str(directory / "data"), "batch_size": 64}}))
    return path


def compare(case: Case, path: Path, pool: RankPool, reference: list[float]) -> Result:
    """A case on the ranks of a pool beside the reference's losses, over as many steps."""
    losses = pool.run(case_losses, path, [*case.numbers, *case.topology], len(reference))[0]
    deviation = max(abs(mine - its) / abs(its) for mine, its in zip(losses, reference, strict=True))
    return Result(case.name, deviation, case.tolerance, tuple(losses))


def case_losses(path: Path, overrides: list[str], steps: int) -> list[float]:
    """Runs on every rank: the losses of the first `steps` global batches through the real engine and exchange; where
    `evaluates` says so, the last one is evaluated, not trained."""
    config = load_config(path, overrides)
    device = start_process(config)
    run = build_run(config, device)
    run.dense.set_learning_rate(config.dense.learning_rate)
    clock = StepTimer(device)
    losses = []
    for step in range(steps):
        epoch, position = divmod(step, run.train.steps_per_epoch)
        batch = next(iter(run.train.batches(epoch, start=position))).to(device)
        if step + 1 == steps and evaluates(config):
            with run.averages.in_place():
                logits = predict(run.dense, run.sparse, batch)
        else:
            logits = train_step(run.dense, run.sparse, batch, timer=clock).logits
            run.averages.update(step + 1)
        loss = plain_loss(logits.double().cpu(), batch.to(torch.device("cpu")), config).to(device)
        dist.all_reduce(loss)
        losses.append(float(loss) / run.topology.world_size)
    del run
    torch.manual_seed(0)
    return losses
