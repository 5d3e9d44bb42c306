"""A run's position."""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from megarec.errors import DamagedCheckpoint

Count = Annotated[int, Field(ge=0, lt=1 << 62)]


@dataclass
class TrainState:
    """Everything that is neither weights nor optimizer state.

    Attributes:
        step: optimizer steps done; with the seed it is the place in the data as well.
        best, since_best, since_drop, plateau_drops: of the validation's score (training.schedule).
        best_by: the metric that `best` is of (train.best_by); None: there is no best yet, or an earlier version saved.
        skipped_steps: steps that were not applied; `skipped` counts them by cause.
        faulty_labels: of several labels, steps that were applied without one, because its loss was not finite.
        left_out: steps whose batches are skipped, because they were faulty before a rollback.
        rollbacks: how many there were.
        losses: mean losses of the last applied steps, for the median of `train.faults.spike`.
        validation_due: the run ended by a signal between a step and its validation.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    step: Count = 0
    best: float = math.inf
    best_by: Literal["logloss", "auc", "auc_minus_logloss"] | None = None
    since_best: Count = 0
    since_drop: Count = 0
    plateau_drops: Count = 0
    skipped_steps: Count = 0
    skipped: dict[str, Count] = field(default_factory=dict)
    faulty_labels: dict[str, Count] = field(default_factory=dict)
    left_out: list[Count] = field(default_factory=list)
    rollbacks: Count = 0
    losses: list[float] = field(default_factory=list)
    validation_due: bool = False

    def to_json(self) -> dict[str, Any]:
        """JSON has no infinity: null."""
        return {name: None if value == math.inf else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any], file: Path) -> "TrainState":
        """Keys unknown to an earlier version keep their default; numbers keep their type, 7.0 as 7.

        Args:
            file: that the values were read from, for the message.

        Raises:
            DamagedCheckpoint: a name that this version does not know, or a number of the wrong kind.
        """
        for name, value in values.items():  # what pydantic would turn into a number
            kind = {"validation_due": bool, "best_by": str}.get(name)
            if isinstance(value, bool | str) and (kind is None or not isinstance(value, kind)):
                raise DamagedCheckpoint(f"{file}: position.{name}: {value!r} is not of its type; no run can be there")
        known = {name: math.inf if name == "best" and value is None else value for name, value in values.items()}
        try:
            return _POSITION.validate_python(known)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, ("position", *first["loc"])))
            raise DamagedCheckpoint(f"{file}: {where}: {first['msg']}; no run can be there") from error

    def forget_best(self) -> None:
        """The validations so far were of another model."""
        self.best, self.best_by, self.since_best, self.since_drop = math.inf, None, 0, 0


_POSITION = TypeAdapter(TrainState)
