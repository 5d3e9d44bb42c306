"""Steps and runs into which faults are planted; functions run on the ranks of a pool."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from megarec.checkpoint import sparse
from megarec.data.batch import Batch
from megarec.dense import masters
from megarec.run.build import Run
from megarec.run.state import TrainState
from megarec.signals import Interruption
from megarec.training.faults.policy import FaultPolicy
from megarec.training.faults.step_check import StepCheck
from megarec.training.profiling import StepTimer
from megarec.training.step import train_step
from tests.checkpoint.runs import build


def everything(run: Run) -> dict[str, Tensor]:
    """Copies of what this rank holds: dense weights and states, tables and theirs, tower modules and theirs."""
    pieces = masters.held(run.dense.engine, run.topology) + masters.written(
        run.dense.engine, run.topology
    )  # the latter: Adam's steps
    pieces += sparse.tables_held(run.sparse, run.spec.layout)
    found = {f"{piece.name} {piece.start}": piece.tensor for piece in pieces}
    found |= {f"model {name}": parameter for name, parameter in run.dense.module.named_parameters()}
    if run.sparse.modules is not None:
        found |= run.sparse.modules.state_dict()
    return {name: torch.as_tensor(tensor).detach().clone() for name, tensor in found.items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    """Names of what differs in any bit."""
    same = before.keys() == after.keys()
    return ["names"] * (not same) + [name for name in before if same and not same_bits(before[name], after[name])]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).contiguous().view(torch.uint8)


class PlantNaN(torch.autograd.Function):
    """The identity, whose gradient is NaN in one element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        gradient = grads[0].clone()
        gradient.view(-1)[0] = torch.nan
        return gradient


@dataclass
class Plants:
    """Where faults can be planted, on one rank; at most one at a time.

    Attributes:
        active: "example", "row", "gradient", "embeddings", "tower", or None.
    """

    run: Run
    bad_rank: int = 1
    active: str | None = None
    undo: list[Callable[[], object]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Hooks that wait; before the judge's, so that it sees what DeepSpeed sees."""
        if self.run.topology.rank != self.bad_rank:
            return
        *_, parameter = self.run.dense.module.parameters()
        parameter.register_hook(lambda gradient: gradient * torch.nan if self.active == "gradient" else gradient)
        self.run.dense.module.register_forward_pre_hook(self._in_embeddings)
        if self.run.sparse.modules is not None:
            first = next(self.run.sparse.modules.bank.parameters())
            first.register_hook(lambda gradient: gradient * torch.nan if self.active == "tower" else gradient)

    def _in_embeddings(self, module: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        numeric, embedded, *rest = args
        return (numeric, PlantNaN.apply(embedded), *rest) if self.active == "embeddings" else None

    def into(self, batch: Batch) -> Batch:
        if self.active == "example" and self.run.topology.rank == self.bad_rank:
            numeric = batch.numeric.clone()
            numeric[3, 1] = torch.nan
            return Batch(numeric, batch.ids, batch.labels, batch.keys, batch.valid)
        if self.active == "row":
            self._in_a_row()
        return batch

    def _in_a_row(self) -> None:
        """In row 0 to 9 of the first table, whoever holds it: some example of the batch looks them up."""
        for name, (shard, weight) in self.run.sparse.state().items():
            if name == "single_0/weight" and shard.row_start == 0:
                rows = weight.detach()[:10]
                before = rows.clone()
                rows[:, 0] = torch.nan
                self.undo.append(partial(rows.copy_, before))

    def remove(self) -> None:
        while self.undo:
            self.undo.pop()()
        self.active = None


@dataclass
class Seen:
    """What a rank saw of a planted fault."""

    cause: str | None
    description: str
    changed: list[str]


def step_of(run: Run, judge: StepCheck, batch: Batch) -> str | None:
    run.dense.set_learning_rate(run.dense.learning_rate)
    clock = StepTimer(run.device)
    clock.next_step(sampled=False)
    return train_step(run.dense, run.sparse, batch, timer=clock, check=judge).cause


def judged(run: Run) -> StepCheck:
    position = TrainState()
    policy = FaultPolicy(run.config.train.faults, position)
    return StepCheck(run, policy, position, Interruption())


def plant_all(path: Path, overrides: list[str], kinds: list[str]) -> tuple[dict[str, Seen], list[str]]:
    """Two good steps, a bad one of every kind, a good one.

    Returns:
        What was seen of every kind, and what differs at the end from a run of the good steps alone.
    """
    run = build(path, overrides)
    plants = Plants(run)
    judge = judged(run)
    batches = first_batches(run, 4)
    seen = {}
    for batch in batches[:2]:
        assert step_of(run, judge, batch) is None
    for kind in kinds:
        plants.active = kind
        planted = plants.into(batches[2])
        before = everything(run)
        cause = step_of(run, judge, planted)
        seen[kind] = Seen(cause, judge.description, changed(before, everything(run)))
        plants.remove()
    assert step_of(run, judge, batches[3]) is None
    twin = build(path, overrides)
    alone = judged(twin)
    for batch in (*batches[:2], batches[3]):
        assert step_of(twin, alone, batch) is None
    return seen, changed(everything(twin), everything(run))


def first_batches(run: Run, count: int) -> list[Batch]:
    batches: Iterator[Batch] = run.train.batches(0)
    return list(itertools.islice(batches, count))


def fp16_steps(path: Path, kinds: list[str]) -> list[tuple[str | None, float, int, int]]:
    """A bad step of every kind, in fp16, on one rank; the accelerator of a CPU says that it has none, but it has.

    Returns:
        Of each: the cause, by what the loss scale was divided, how many tensors were changed, and the steps that
        DeepSpeed says were skipped.
    """
    with pytest.MonkeyPatch.context() as patch:
        accelerator = type(get_accelerator())
        patch.setattr(accelerator, "is_fp16_supported", lambda self: True)
        patch.setattr(accelerator, "supported_dtypes", lambda self: [torch.float, torch.half, torch.bfloat16])
        run = build(path, [])
        plants = Plants(run, bad_rank=0)
        judge = judged(run)
        batches = first_batches(run, len(kinds) + 1)
        assert step_of(run, judge, batches[0]) is None
        seen = []
        for kind, batch in zip(kinds, batches[1:], strict=True):
            plants.active = kind
            before, scale = everything(run), float(run.dense.engine.optimizer.loss_scale)
            cause = step_of(run, judge, plants.into(batch))
            plants.remove()
            differing = changed(before, everything(run))
            ratio = scale / float(run.dense.engine.optimizer.loss_scale)
            seen.append((cause, ratio, len(differing), run.dense.engine.skipped_steps))
        assert step_of(run, judge, batches[0]) is None
        return seen
