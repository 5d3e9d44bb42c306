"""What pydantic found wrong with a config, as one line for people."""

import difflib
import json
import types
import typing
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from megarec.config.sections import MODELS, Section
from megarec.config.tower_sections import TOWER_MODULES

TAGGED: dict[str, Mapping[str, type[Section]]] = {"model": MODELS, "tower_module": TOWER_MODULES}  # told by their name


def describe(error: ValidationError, root: type[Section]) -> str:
    """The first failure as one line: dotted key, value seen, what was expected, the nearest known key."""
    first = error.errors()[0]
    loc = [part for part in first["loc"] if not (isinstance(part, str) and "[" in part)]
    key = ".".join(str(part) for part in _without_tag(loc))
    if first["type"] == "extra_forbidden":
        return f"unknown key {key!r}; {_nearest(loc, root)}"
    if first["type"] == "missing":
        return f"{key} is missing"
    if first["type"] == "union_tag_invalid":
        name = first["input"]["name"]
        known = TAGGED[key]
        near = difflib.get_close_matches(str(name), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of: {', '.join(known)}"
        return f"{key}.name={json.dumps(name)}: {hint}"
    seen = json.dumps(first["input"], default=str)
    seen = seen if len(seen) <= 80 else seen[:77] + "..."
    if first["type"] == "union_tag_not_found":
        return f"{key}={seen}: expected an object, or the path of a JSON"
    return f"{key}={seen}: {first['msg'][0].lower() + first['msg'][1:]}"


def _is_tagged(loc: list[Any]) -> bool:
    return len(loc) > 1 and loc[0] in TAGGED


def _without_tag(loc: list[Any]) -> list[Any]:
    """pydantic puts the model's name behind `model`, where the JSON has no key."""
    return loc[:1] + loc[2:] if _is_tagged(loc) else loc


def _nearest(loc: list[Any], root: type[Section]) -> str:
    """What the unknown key at a location may have meant."""
    section = _section_at(root, loc[:-1])
    known = sorted(field.alias or name for name, field in section.model_fields.items()) if section else []
    near = difflib.get_close_matches(str(loc[-1]), known, n=1)
    of_model = f" of {loc[0]} {loc[1]!r}" if _is_tagged(loc) else ""
    return f"did you mean {near[0]!r}?" if near else f"known keys{of_model}: {', '.join(known)}"


def _section_at(root: type[Section], loc: list[Any]) -> type[Section] | None:
    """The section class that lies at a location of the configuration, if it is one."""
    if _is_tagged(loc):
        return _section_at(TAGGED[loc[0]][loc[1]], loc[2:])
    current: Any = root
    for part in loc:
        if isinstance(current, type) and issubclass(current, Section):
            field = current.model_fields.get(str(part))
            current = field.annotation if field else None
        elif typing.get_origin(current) is dict:
            current = typing.get_args(current)[1]
        if isinstance(current, types.UnionType):
            current = next(
                (a for a in typing.get_args(current) if isinstance(a, type) and issubclass(a, Section)), None
            )
    return current if isinstance(current, type) and issubclass(current, Section) else None
