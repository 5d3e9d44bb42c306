"""One small message a step: whether every rank's loss and gradients are finite, the mean loss, and signals.

A sum is finite only if every element is, so each rank sends a few sums and all ranks see the same few numbers. What is
summed is this rank's own, before gradients are reduced over ranks, which would spread one rank's NaN to all. (Under
tensor parallelism the ranks of a tensor group share what they compute: a fault in a gradient shows on all of them.)

`StepCheck` is asked once a step, before anything changes: it gathers the health of all ranks, names the cause, and logs
what was wrong and where. Of several labels those that the backward pass has left out (dense/objective.py) are named as
well; the step is applied without them.
"""

import logging
import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from megarec.distributed.collectives import Channel, all_gather_rows, build_channel, gather_texts
from megarec.run.build import Run
from megarec.run.state import TrainState
from megarec.signals import Interruption
from megarec.training.faults.policy import CAUSES, FaultPolicy, RankHealth, cause_of, faulty_ranks
from megarec.training.faults.report import diagnose
from megarec.training.step import StepTensors

_log = logging.getLogger(__name__)
OWN = 5  # numbers of a rank's health, before those of labels


class HealthGather:
    """Collects a rank's sums and gathers those of all ranks.

    Args:
        dense: the dense model; its parameters' gradients are summed as the backward passes make them.
        world: all ranks.
        signum: of this process (launching.interruption).

    Attributes:
        dense: (parameter, sum) of the backward passes since the last vote, one for each micro-batch.
    """

    def __init__(self, dense: nn.Module, world: Channel, signum: Callable[[], int]) -> None:
        self._world, self._signum = world, signum
        self.dense: list[tuple[str, Tensor]] = []
        for name, parameter in dense.named_parameters():
            parameter.register_hook(partial(self._note, name))

    def _note(self, name: str, gradient: Tensor) -> None:
        self.dense.append((name, gradient.sum(dtype=torch.float32)))

    def __call__(self, tensors: StepTensors) -> Callable[[], list[RankHealth]]:
        """Ask every rank; collective, one all-gather of five numbers, and one for each of several labels.

        Returns:
            Waits for the answers: the health of every rank, the same on all of them.
        """
        device = tensors.made[0].loss.device
        mine = torch.stack(
            [
                torch.stack([made.loss for made in tensors.made]).mean(dtype=torch.float32),
                tensors.lookup.gradient_total(),
                _total([total for _, total in self.dense], device),
                _total([gradient.sum() for gradient in tensors.lookup.gradients().values()], device),
                torch.full((), float(self._signum()), device=device),  # a kernel; a copy would make the host wait
            ]
        )
        finite = [made.finite for made in tensors.made if made.finite is not None]
        if finite:
            mine = torch.cat([mine, torch.stack(finite).amin(0)])
        gathered = all_gather_rows(mine.unsqueeze(0), self._world, "health")

        def answer() -> list[RankHealth]:
            rows = gathered.wait().tolist()  # the one wait of a step for an accelerator
            return [replace(RankHealth(*row[:OWN]), labels=tuple(row[OWN:])) for row in rows]

        return answer

    def clear(self) -> None:
        """Before the next step."""
        self.dense.clear()


def _some(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


def _total(sums: list[Tensor], device: torch.device) -> Tensor:
    return torch.stack(sums).sum() if sums else torch.zeros((), device=device)


class StepCheck:
    """A `megarec.training.step.Check`.

    Attributes:
        loss: mean over the global batch of the last step.
        signum: a signal that some rank was sent; 0: none.
        description: the log's text about the last faulty step.
        left_out: labels that the last step was made without.
    """

    def __init__(self, run: Run, policy: FaultPolicy, state: TrainState, interruption: Interruption) -> None:
        self._run, self._policy, self._state = run, policy, state
        world = build_channel(run.topology, "world", run.ledger)
        self._gather = HealthGather(run.dense.module, world, lambda: interruption.signum or 0)
        self.loss, self.signum, self.description = math.nan, 0, ""
        self.left_out: list[str] = []

    def __call__(self, tensors: StepTensors) -> Callable[[], str | None]:
        answers = self._gather(tensors)
        return lambda: self._judge(answers(), tensors)

    def _judge(self, ranks: list[RankHealth], tensors: StepTensors) -> str | None:
        self.signum = max(int(health.signum) for health in ranks)
        self.loss = statistics.fmean(health.loss for health in ranks)
        cause = cause_of(ranks, self._run.dense.loss_scale_can_shrink())
        if cause is None and self._policy.spikes(self.loss):
            cause = "spike"
        self.left_out = self._say_left_out(ranks) if cause is None else []
        if cause is not None and cause != "overflow":
            self._report(cause, ranks, tensors)
        self._gather.clear()
        return cause

    def _say_left_out(self, ranks: list[RankHealth]) -> list[str]:
        """Labels whose loss is not finite on some rank."""
        found = {
            label: [rank for rank, health in enumerate(ranks) if not health.labels[place]]
            for place, label in enumerate(self._run.schema.predicted if ranks[0].labels else ())
        }
        faulty = {label: ranks_of for label, ranks_of in found.items() if ranks_of}
        if faulty:
            named = (f"label {label}: its loss is not finite on ranks {_some(own)}" for label, own in faulty.items())
            self.description = "; ".join(named)
            _log.warning("FAULTY STEP %d, MADE WITHOUT %s", self._state.step + 1, self.description)
        return list(faulty)

    def _report(self, cause: str, ranks: list[RankHealth], tensors: StepTensors) -> None:
        run, faulty = self._run, faulty_ranks(ranks)
        shown = run.topology.rank in faulty or cause == "spike"
        mine = diagnose(ranks[run.topology.rank], tensors, self._gather.dense, run.schema.numeric, shown)
        found = gather_texts(mine, run.topology, run.device)
        parts = [f"rank {rank}: {text}" for rank, text in found.items()]
        if cause == "spike":
            highest = max(range(len(ranks)), key=lambda rank: ranks[rank].loss)
            parts.insert(
                0,
                f"mean loss {self.loss:.4g}, the bound is {self._policy.spike_bound():.4g}; highest on rank {highest}: "
                f"{ranks[highest].loss:.4g}",
            )
        elif not found.keys() >= set(faulty):
            parts.append(f"all faulty ranks: {', '.join(map(str, faulty))}")
        self.description = f"{CAUSES[cause]}: {'; '.join(parts)}"
        _log.warning("FAULTY STEP %d, NOTHING WAS CHANGED: %s", self._state.step + 1, self.description)
