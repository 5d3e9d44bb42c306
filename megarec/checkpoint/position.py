"""Where a run stands."""

import math
from dataclasses import asdict, dataclass

from megarec.checkpoint.format import DamagedCheckpoint


@dataclass
class Position:
    """Everything that is neither weights nor optimizer state.

    Attributes:
        step: optimizer steps done; with the seed it is the place in the data as well.
        best, since_best, since_drop, plateau_drops: of the validation's score (training.schedule).
        skipped_steps: steps that were not applied.
    """

    step: int = 0
    best: float = math.inf
    since_best: int = 0
    since_drop: int = 0
    plateau_drops: int = 0
    skipped_steps: int = 0

    def to_json(self) -> dict[str, int | float | None]:
        """JSON has no infinity: null."""
        return {name: None if value == math.inf else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, int | float | None]) -> "Position":
        """What an earlier version did not know keeps its default.

        Raises:
            DamagedCheckpoint: a name that this version does not know, or a number of the wrong kind.
        """
        known = asdict(cls())
        for name, value in values.items():
            if name not in known or (value is None and name != "best"):
                raise DamagedCheckpoint(f"a checkpoint's position has {name}={value!r}, which means nothing here")
            known[name] = math.inf if value is None else type(known[name])(value)
        return cls(**known)
