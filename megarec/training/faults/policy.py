"""One policy for faulty steps: what is skipped, and when the run goes back or stops. No tensors, no collectives.

Every rank sees the health of all ranks and decides the same.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megarec.config.sections import FaultsConfig
from megarec.run.state import TrainState


@dataclass(frozen=True)
class RankHealth:
    """One rank's health in a step.

    Attributes:
        loss: mean over its examples.
        embeddings, dense, towers: sums of its gradients: of the embeddings, of the dense model's parameters, and of the
            tower modules' parameters and inputs.
        signum: the signal it was sent; 0: none.
        labels: of several labels, 1 where the loss of one is finite, else 0.
    """

    loss: float
    embeddings: float
    dense: float
    towers: float
    signum: float
    labels: tuple[float, ...] = ()

    @property
    def finite_loss(self) -> bool:
        return math.isfinite(self.loss)

    @property
    def finite_gradients(self) -> bool:
        return all(map(math.isfinite, (self.embeddings, self.dense, self.towers)))

    @property
    def fault(self) -> int:
        """0: the loss, 1: gradients of the dense model, 2: those of tower modules, 3: none. Tower modules get theirs
        from other ranks as well, and a loss spoils all: the first is the cause, the others may follow from it."""
        return next(
            (order for order, number in enumerate((self.loss, self.embeddings + self.dense, self.towers))
             if not math.isfinite(number)), 3,
        )  # fmt: skip


def faulty_ranks(ranks: Sequence[RankHealth]) -> list[int]:
    """The ranks that a fault comes from; none when all is finite."""
    first = min(health.fault for health in ranks)
    return [rank for rank, health in enumerate(ranks) if health.fault == first < 3]


Action = Literal["go on", "rollback", "stop"]

CAUSES = {
    "loss": "a loss that is not finite",
    "gradient": "a gradient that is not finite",
    "spike": "a loss far above those before it",
    "overflow": "an overflow of fp16: the loss scale shrinks",
    "left_out": "a batch that was faulty before a rollback",
}


def cause_of(ranks: Sequence[RankHealth], scale_can_shrink: bool) -> str | None:
    """Why a step must not be applied, or None.

    Args:
        scale_can_shrink: of fp16; gradients that are not finite, of a finite loss, are overflows then, and no fault.
    """
    if not all(health.finite_loss for health in ranks):
        return "loss"
    if not all(health.finite_gradients for health in ranks):
        return "overflow" if scale_can_shrink else "gradient"
    return None


class FaultPolicy:
    """Counts faulty steps and detects spikes.

    Args:
        state: of the run; what a resumed run needs is kept there.

    Attributes:
        in_a_row: faulty steps since the last one that was applied.
    """

    def __init__(self, config: FaultsConfig, state: TrainState) -> None:
        self._config, self._state = config, state
        self.in_a_row = 0
        self._faulty: list[int] = []
        self._returned_to: int | None = None

    def spikes(self, loss: float) -> bool:
        """Whether a mean loss is far above those of the last applied steps."""
        config, losses = self._config, self._state.losses
        if config.spike == "off" or len(losses) < config.spike_window:
            return False
        return loss > self.spike_bound()

    def spike_bound(self) -> float:
        """Median + K x max(median absolute deviation, 1 % of the median) of the last applied steps' losses."""
        median = statistics.median(self._state.losses)
        deviation = statistics.median(abs(loss - median) for loss in self._state.losses)
        return median + self._config.spike_deviations * max(deviation, 0.01 * median)

    def applied(self, loss: float, left_out: Sequence[str] = ()) -> Action:
        """A step was applied; returns what to do.

        Args:
            left_out: labels that it was made without; limited in a row as any fault is.
        """
        for label in left_out:
            self._state.faulty_labels[label] = self._state.faulty_labels.get(label, 0) + 1
        if left_out:
            return self._faulty_step("label")
        self.in_a_row = 0
        if self._config.spike != "off":
            self._state.losses = [*self._state.losses, loss][-self._config.spike_window :]
        return "go on"

    def skipped(self, cause: str) -> Action:
        """The current step was not applied; returns what to do. Overflows of fp16 are not faults."""
        self.count(cause)
        return "go on" if cause == "overflow" else self._faulty_step(cause)

    def _faulty_step(self, cause: str) -> Action:
        self.in_a_row += 1
        self._faulty.append(self._state.step)
        action: Action = "go on"
        if cause == "spike" and self._config.spike in ("rollback", "stop"):
            action = "rollback" if self._config.spike == "rollback" else "stop"
        elif self.in_a_row >= self._config.max_in_a_row:
            action = self._config.then
        if action == "rollback" and self._state.rollbacks >= self._config.max_rollbacks:
            return "stop"
        return action

    def count(self, cause: str) -> None:
        """Count a step that was not applied."""
        self._state.skipped_steps += 1
        self._state.skipped[cause] = self._state.skipped.get(cause, 0) + 1

    def rolled_back(self, to: TrainState) -> None:
        """Restore the state of a checkpoint, without the batches that were faulty since, the current one included.

        A fault that comes again after a rollback to the same checkpoint does not come from its batch alone: then all
        batches since the checkpoint are left out.
        """
        now = self._state
        again = self._returned_to == to.step
        left_out = range(to.step, now.step + 1) if again else (step for step in self._faulty if step >= to.step)
        to.left_out = sorted({*to.left_out, *now.left_out, *left_out})
        to.rollbacks = now.rollbacks + 1
        now.__dict__.update(vars(to))
        self.in_a_row, self._faulty, self._returned_to = 0, [], to.step
