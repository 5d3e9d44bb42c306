"""What a search may set: by dotted key of a run's JSON one value, or a distribution to draw from.

A draw follows from the search's seed, the key and the trial's number alone: another family, another key or another
range leaves every other value of a trial as it was, and a key of several families has the same draws in each.
"""

import difflib
import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any, Literal

from megarec.errors import UserError

Kind = Literal["fixed", "choice", "uniform", "log_uniform", "int"]
KINDS: dict[str, Kind] = {"choice": "choice", "uniform": "uniform", "log_uniform": "log_uniform", "int": "int"}
_EXPECTED = {
    "choice": "a list of at least one value",
    "uniform": "two numbers, the lower one first",
    "log_uniform": "two numbers above 0, the lower one first",
    "int": "two whole numbers, the lower one first",
}
_DIGITS = 4  # of a drawn number: a config is for people too


@dataclass(frozen=True)
class Setting:
    """A key of a run's JSON and what it may be.

    Attributes:
        values: of `fixed` the value, of `choice` all options, else the lowest and the highest number.
    """

    key: str
    kind: Kind
    values: tuple[Any, ...]

    @property
    def drawn(self) -> bool:
        return self.kind != "fixed"

    @property
    def ends(self) -> list[Any]:
        """The values to check for all others: every option, or both ends of a range."""
        return list(self.values)

    def number(self, u: float) -> float:
        """The number of the value at `u` of [0, 1): for `choice` and `fixed` its index."""
        if self.kind in ("fixed", "choice"):
            return int(u * len(self.values))
        low, high = self.values
        if self.kind == "int":
            return int(low + int(u * (high - low + 1)))
        if self.kind == "uniform":
            return self.tidy(low + u * (high - low))
        return self.tidy(math.exp(math.log(low) + u * (math.log(high) - math.log(low))))

    def tidy(self, number: float) -> float:
        """A number of a range of reals with few digits, inside the range."""
        low, high = self.values
        return float(min(max(float(f"{number:.{_DIGITS}g}"), low), high))

    def value(self, number: float) -> Any:
        """The config value of a number."""
        return self.values[int(number)] if self.kind in ("fixed", "choice") else number


def read_settings(raw: dict[str, Any], where: str) -> dict[str, Setting]:
    """The settings of a JSON object, in its order.

    Args:
        where: its place, for messages.

    Raises:
        UserError: names the key and the value that is not a distribution.
    """
    return {key: _setting(key, value, where) for key, value in raw.items()}


def _setting(key: str, value: Any, where: str) -> Setting:
    if not isinstance(value, dict) or len(value) != 1:
        return Setting(key, "fixed", (value,))
    ((name, content),) = value.items()
    if name not in KINDS:
        near = difflib.get_close_matches(name, KINDS, n=1, cutoff=0.75)
        if near and isinstance(content, list):
            raise UserError(f"{where}.{key}: unknown distribution {name!r}; did you mean {near[0]!r}?")
        return Setting(key, "fixed", (value,))
    kind = KINDS[name]
    if not isinstance(content, list) or not _does(kind, content):
        raise UserError(f"{where}.{key}: {name} is {json.dumps(content)[:80]}, expected {_EXPECTED[kind]}")
    return Setting(key, kind, tuple(content))


def _does(kind: Kind, content: list[Any]) -> bool:
    if kind == "choice":
        return len(content) > 0
    if len(content) != 2 or any(isinstance(each, bool) or not isinstance(each, int | float) for each in content):
        return False
    low, high = content
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        return False
    return (kind != "int" or all(isinstance(each, int) for each in content)) and (kind != "log_uniform" or low > 0)


def draw(settings: dict[str, Setting], seed: int, number: int) -> dict[str, float]:
    """The numbers of a trial, by key."""
    return {key: setting.number(_uniform(seed, key, number)) for key, setting in settings.items()}


def _uniform(seed: int, key: str, number: int) -> float:
    """In [0, 1); of SHA-256, so that no library's version changes a search."""
    digest = hashlib.sha256(f"{seed}\0{key}\0{number}".encode()).digest()
    return (int.from_bytes(digest[:8]) >> 11) / 2.0**53
