"""A YAML of another project, key by key: each key is used once, and an unused one is an error.

A key's meaning here is kept as a line for people, beside the value. A YAML is untrusted data: it
is read by yaml's safe loader, up to a size, and no key may appear twice.
"""

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml

from megarec.errors import UserError, one_line

MOST_BYTES = 1 << 20
_MISSING = object()
Kind = Literal["same", "differs", "unused"]


@dataclass(frozen=True)
class Line:
    """The outcome of one key.

    Attributes:
        target: the key here, or "" where there is none.
        kind: same: it means the same here; differs: as the remark says; unused: it changes no numbers.
    """

    key: str
    value: Any
    target: str
    kind: Kind
    remark: str = ""


@dataclass
class Keys:
    """The keys of one mapping.

    Attributes:
        values: those not used yet.
        where: the file and the place in it, for messages.
        lines: the outcome of those that were used.
    """

    values: dict[str, Any]
    where: str
    lines: list[Line] = field(default_factory=list)

    def fail(self, key: str, value: Any, expected: str) -> NoReturn:
        """Raise a UserError that names the key and its value."""
        raise UserError(one_line(f"{self.where}: {key}={_short(value)}: {expected}"))

    def take(self, key: str, default: Any = _MISSING) -> Any:
        """The value of a key, which is then used up.

        Raises:
            UserError: it is missing, and has no default.
        """
        if key not in self.values and default is _MISSING:
            raise UserError(f"{self.where}: {key} is missing")
        return self.values.pop(key, default)

    def number(self, key: str, default: Any = _MISSING) -> float:
        """A number of at least 0; YAML 1.1 reads `1e-3`, without a point, as a text, which is read as a number here."""
        value = self.take(key, default)
        try:
            number = float(value) if not isinstance(value, bool) else -1.0
        except (TypeError, ValueError):
            number = -1.0
        if not 0 <= number < float("inf"):
            self.fail(key, value, "expected one number of at least 0")
        return number

    def integer(self, key: str, default: Any = _MISSING) -> int:
        value = self.take(key, default)
        if type(value) is not int or value < 0:
            self.fail(key, value, "expected one whole number of at least 0")
        return value

    def flag(self, key: str, default: Any = _MISSING) -> bool:
        value = self.take(key, default)
        if not isinstance(value, bool):
            self.fail(key, value, "expected true or false")
        return value

    def text(self, key: str, default: Any = _MISSING) -> str:
        value = self.take(key, default)
        if not isinstance(value, str) or not value:
            self.fail(key, value, "expected a text")
        return value

    def widths(self, key: str, default: Any = _MISSING) -> list[int]:
        """Widths of layers."""
        value = self.take(key, default)
        if not isinstance(value, list) or any(type(width) is not int or width < 1 for width in value):
            self.fail(key, value, "expected a list of widths of at least 1, of one model, not a tuner's lists")
        return list(value)

    def must_be(self, key: str, wanted: Any, otherwise: str, default: Any = _MISSING) -> None:
        """Take a key that has one meaning here.

        Raises:
            UserError: it has another value, which would mean another model or training.
        """
        given = key in self.values
        value = self.take(key, wanted if default is _MISSING else default)
        if value != wanted or isinstance(value, bool) != isinstance(wanted, bool):
            self.fail(key, value, otherwise)
        if given:
            self.note(key, value, "", remark="what is done here")

    def unused(self, *keys: str) -> None:
        """Take keys that change no numbers."""
        for key in keys:
            if key in self.values:
                self.lines.append(Line(key, self.values.pop(key), "", "unused", "changes no numbers"))

    def note(self, key: str, value: Any, target: str, kind: Kind = "same", remark: str = "") -> None:
        """Note the outcome of a key."""
        self.lines.append(Line(key, value, target, kind, remark))

    def finish(self, known: str) -> None:
        """Raise a UserError for a key that was not used.

        Args:
            known: what does not have this key.
        """
        for key, value in self.values.items():
            near = difflib.get_close_matches(str(key), [line.key for line in self.lines], n=1)
            hint = f"did you mean {near[0]!r}?" if near else "take it out if it changes no numbers"
            self.fail(str(key), value, f"{known} has no such key here; {hint}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


class _Loader(yaml.SafeLoader):
    """The safe loader, which also refuses a key that appears twice: the second would win silently."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    loader.flatten_mapping(node)
    found: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str | int):
            raise yaml.constructor.ConstructorError(None, None, f"{_short(key)} is not a key", key_node.start_mark)
        if key in found:
            raise yaml.constructor.ConstructorError(None, None, f"{_short(key)} appears twice", key_node.start_mark)
        found[key] = loader.construct_object(value_node, deep=True)
    return found


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file whose top level is a mapping of mappings.

    Raises:
        UserError: it cannot be read, is too large, or is something else; the message has the line.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UserError(f"{path}: {path.stat().st_size:,} bytes; expected a YAML of at most {MOST_BYTES:,}")
        value = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8'})") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or error
        raise UserError(one_line(f"{path}{place}: not readable as YAML ({problem})")) from error
    if not isinstance(value, dict) or not all(isinstance(part, dict) for part in value.values()):
        raise UserError(f"{path}: expected a mapping from names to mappings, as FuxiCTR's YAMLs are")
    return {str(name): part for name, part in value.items()}


def chosen(path: Path, found: dict[str, Any], name: str | None, option: str) -> tuple[str, dict[str, Any]]:
    """One of several mappings: the named one, or the only one.

    Raises:
        UserError: it is not there, or there are several and none is named.
    """
    if name is None and len(found) == 1:
        return next(iter(found.items()))
    if name is None or name not in found:
        seen = f"{name!r} is missing" if name is not None else f"there are {len(found)}"
        raise UserError(one_line(f"{path}: {seen}; name one with {option}: {', '.join(sorted(found)[:20]) or 'none'}"))
    return name, found[name]
