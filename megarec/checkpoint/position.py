"""Where a run stands."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from megarec.checkpoint.format import DamagedCheckpoint


@dataclass
class Position:
    """Everything that is neither weights nor optimizer state.

    Attributes:
        step: optimizer steps done; with the seed it is the place in the data as well.
        best, since_best, since_drop, plateau_drops: of the validation's score (training.schedule).
        skipped_steps: steps that were not applied; `skipped` counts them by cause.
        left_out: steps whose batches are passed over, because they were faulty before a rollback.
        rollbacks: so many there were.
        losses: mean losses of the last applied steps, of which `train.faults.spike` takes the median.
        validation_due: the run ended by a signal between a step and its validation.
    """

    step: int = 0
    best: float = math.inf
    since_best: int = 0
    since_drop: int = 0
    plateau_drops: int = 0
    skipped_steps: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    left_out: list[int] = field(default_factory=list)
    rollbacks: int = 0
    losses: list[float] = field(default_factory=list)
    validation_due: bool = False

    def to_json(self) -> dict[str, Any]:
        """JSON has no infinity: null."""
        return {name: None if value == math.inf else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Position":
        """What an earlier version did not know keeps its default.

        Raises:
            DamagedCheckpoint: a name that this version does not know, or a number of the wrong kind.
        """
        known = asdict(cls())
        for name, value in values.items():
            if name not in known or (value is None and name != "best"):
                raise DamagedCheckpoint(f"a checkpoint's position has {name}={value!r}, which means nothing here")
            try:
                known[name] = math.inf if value is None else type(known[name])(value)
            except (TypeError, ValueError) as error:
                raise DamagedCheckpoint(f"a checkpoint's position has {name}={value!r}: {error}") from error
        return cls(**known)
