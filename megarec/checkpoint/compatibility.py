"""Whether a checkpoint fits a run; the first difference is named."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megarec.checkpoint.format import Index
from megarec.checkpoint.pieces import Ints
from megarec.errors import UserError


def described(schema: Mapping[str, Any]) -> dict[str, Any]:
    """What of a schema decides which numbers mean what; counts of rows and texts for people do not."""
    return {key: schema.get(key) for key in ("categorical", "numeric", "label")}


def check_schema(directory: Path, index: Index, schema: Mapping[str, Any]) -> None:
    """Raise a UserError that names the first feature or key that differs."""
    for key, there, here in differences(described(index.data_schema), described(schema), "schema"):
        raise UserError(f"{directory} was trained on other data: {key} is {_short(there)} there, {_short(here)} here")


def check_optimizer(directory: Path, index: Index, here: str) -> None:
    if _family(index.optimizer) != _family(here):
        raise UserError(
            f"{directory}: the dense optimizer was {index.optimizer}, this run's is {here}; resume with the "
            "dense.optimizer (or deepspeed.optimizer) it was written with"
        )


def _family(optimizer: str) -> str:
    return "adam" if "adam" in optimizer.lower() and "adamax" not in optimizer.lower() else optimizer.lower()


def check_tensors(
    directory: Path,
    index: Index,
    expected: Mapping[str, Ints],
    prefixes: tuple[str, ...],
    config: Mapping[str, Any],
) -> None:
    """Raise a UserError that names the first tensor that is missing, of another shape, or unknown.

    Args:
        expected: shapes by name.
        prefixes: of the names that must be expected.
        config: of this run, for the key of the config that may be why.
    """
    for name, shape in expected.items():
        there = index.tensors.get(name)
        if there is None or there.shape != shape:
            what = "not there" if there is None else f"{list(there.shape)} there"
            raise UserError(f"{directory}: {name} is {what}, {list(shape)} in this run{_why(index, config)}")
    for name in index.tensors:
        if name.startswith(prefixes) and name not in expected:
            raise UserError(f"{directory}: {name} is there, but not in this run{_why(index, config)}")


def _why(index: Index, config: Mapping[str, Any]) -> str:
    for section in ("model", "tower_module", "embedding", "dense", "data"):
        for key, there, here in differences(index.config.get(section), config.get(section), section):
            if key not in ("embedding.placement", "embedding.backend", "data.path"):
                return f" ({key}: {_short(there)} there, {_short(here)} here); resume with its config"
    return "; resume with the config it was written with"


def differences(there: Any, here: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """(key, value there, value here) of everything that differs in two JSON values."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in dict.fromkeys([*there, *here]):
            yield from differences(there.get(key), here.get(key), f"{path}.{key}")
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        for position, (a, b) in enumerate(zip(there, here, strict=True)):
            name = b.get("name") if isinstance(b, dict) else None
            yield from differences(a, b, f"{path}.{name or position}")
    elif there != here:
        yield path, there, here


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
