"""One small message a step: whether every rank's loss and gradients are finite, the mean loss, and signals.

A sum is finite only if every element is, so each rank sends a few sums and all ranks see the same few numbers. What is
summed is this rank's own, before gradients are reduced over ranks, which would spread one rank's NaN to all. (Under
tensor parallelism the ranks of a tensor group share what they compute: a fault in a gradient shows on all of them.)
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megarec.embeddings.exchange import SparseSide
from megarec.parallel.collectives import Channel, all_gather_rows
from megarec.training.step import Evidence


@dataclass(frozen=True)
class Ballot:
    """What one rank says of a step.

    Attributes:
        loss: mean over its examples.
        embeddings, dense, towers: sums of its gradients: of the embeddings, of the over-arch's parameters, and of the
            tower modules' parameters and inputs.
        signum: the signal it was sent; 0: none.
    """

    loss: float
    embeddings: float
    dense: float
    towers: float
    signum: float

    @property
    def finite_loss(self) -> bool:
        return math.isfinite(self.loss)

    @property
    def finite_gradients(self) -> bool:
        return all(map(math.isfinite, (self.embeddings, self.dense, self.towers)))

    @property
    def fault(self) -> int:
        """0: the loss, 1: gradients of the over-arch, 2: those of tower modules, 3: none. Tower modules get theirs
        from other ranks as well, and a loss spoils all: what comes first is the cause, what comes after may follow."""
        return next(
            (order for order, number in enumerate((self.loss, self.embeddings + self.dense, self.towers))
             if not math.isfinite(number)), 3,
        )  # fmt: skip


def faulty_ranks(ballots: Sequence[Ballot]) -> list[int]:
    """The ranks that a fault comes from; none when all is finite."""
    first = min(ballot.fault for ballot in ballots)
    return [rank for rank, ballot in enumerate(ballots) if ballot.fault == first < 3]


class Vote:
    """Collects a rank's sums and gathers everybody's.

    Args:
        engine: its parameters' gradients are summed as the backward passes make them.
        world: all ranks.
        signum: of this process (launching.interruption).

    Attributes:
        dense: (parameter, sum) of the backward passes since the last vote, one for each micro-batch.
    """

    def __init__(self, engine: Any, sparse: SparseSide, world: Channel, signum: Callable[[], int]) -> None:
        self._sparse, self._world, self._signum = sparse, world, signum
        self.dense: list[tuple[str, Tensor]] = []
        for name, parameter in engine.module.named_parameters():
            parameter.register_hook(partial(self._note, name))

    def _note(self, name: str, gradient: Tensor) -> None:
        self.dense.append((name, gradient.sum(dtype=torch.float32)))

    def __call__(self, evidence: Evidence) -> list[Ballot]:
        """The ballots by rank, the same on every rank; collective, one all-gather of five numbers."""
        device = evidence.gradient.device
        mine = torch.stack(
            [
                torch.stack(evidence.losses).mean(dtype=torch.float32),
                evidence.gradient.sum(),
                _total([total for _, total in self.dense], device),
                _total([gradient.sum() for gradient in self._sparse.gradients().values()], device),
                torch.tensor(float(self._signum()), device=device),
            ]
        )
        gathered, work = all_gather_rows(mine.unsqueeze(0), self._world, "votes")
        if work is not None:
            work.wait()
        return [Ballot(*row) for row in gathered.tolist()]

    def clear(self) -> None:
        """Before the next step."""
        self.dense.clear()


def _total(sums: list[Tensor], device: torch.device) -> Tensor:
    return torch.stack(sums).sum() if sums else torch.zeros((), device=device)
