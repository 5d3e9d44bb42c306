"""The planner's steps beside those that `bench.py towers` measured.

    python tools/bench.py plan                                   # the published table, docs/results/towers.json
    python tools/bench.py plan --results towers.json             # another one: `bench.py towers --json > towers.json`

Two namespace hosts of two ranks on two cores. What the planner knows of them are the figures that `plan --measure` has
of the same ranks over the same link, which the table holds as well; none is fitted on a step.
"""

import itertools
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, TypeAdapter, ValidationError

from megarec.errors import UserError
from megarec.files import read_object
from megarec.planning.hardware import Hardware, hardware_of
from megarec.planning.towers_pay import Work, time_of, work_of
from megarec.run.spec import resolve
from tools.benchmarks import towers, towers_rank

PUBLISHED = Path(__file__).resolve().parents[2] / "docs/results/towers.json"
WRITTEN_BY = "what `python tools/bench.py towers --json` printed"
DIFFERS = 1.15  # of measured steps: below, their order is within the noise
CLOSE = 0.2


class Measured(NamedTuple):
    """A row of `bench.py towers`."""

    model: str
    variant: str
    link_gbit: float
    step_ms: float


class _Machine(BaseModel):
    link_gbit: float
    machine: dict[str, Any]


def run(results: Path = PUBLISHED) -> dict[str, Any]:
    """A row for each measured one of ours, and how far the predictions are off.

    Raises:
        UserError: the file does not hold rows of `bench.py towers`.
    """
    measured, machines, works = read_rows(results), read_machines(results), dict[tuple[str, str], Work]()
    rows = []
    for row in measured:
        key = row.model, row.variant
        if key not in works:
            works[key] = work(*key)
        if row.link_gbit not in machines:
            raise UserError(f"{results}: machines has none of link_gbit {row.link_gbit:g}, which a row has")
        variant = time_of(works[key], machines[row.link_gbit], row.variant)
        assert variant.seconds is not None
        predicted = 1e3 * variant.total
        rows.append({
            **row._asdict(), "predicted_ms": predicted, "error": predicted / row.step_ms - 1,
            "cross_host_bytes": variant.network_bytes,
            "parts_ms": {name: round(1e3 * seconds, 1) for name, seconds in variant.seconds.items()},
        })  # fmt: skip
    return {"name": "plan", "rows": rows, "ratios": ratios(rows)}


def read_rows(path: Path) -> list[Measured]:
    """The rows that the planner has a prediction for.

    Raises:
        UserError: there are none, or one is not as `bench.py towers` writes it.
    """
    raw = read_object(path, WRITTEN_BY).get("rows", [])
    adapter = TypeAdapter(list[dict[str, Any]])
    try:
        rows = adapter.validate_python(raw)
        own = [row for row in rows if _foretold(row["variant"]) and row["model"] in towers_rank.MODELS]
        found = [Measured(row["model"], row["variant"], float(row["link_gbit"]), float(row["step_ms"])) for row in own]
    except (ValidationError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: a row is not one of `bench.py towers` ({type(error).__name__}: {error})") from error
    if not found or any(row.step_ms <= 0 or row.link_gbit < 0 for row in found):
        raise UserError(f"{path}: no rows of `bench.py towers` with a step_ms above 0 and a link_gbit from 0 on")
    return found


def read_machines(path: Path) -> dict[float, Hardware]:
    """What `plan --measure` found there, by link in Gbit/s.

    Raises:
        UserError: there are none, or one is not as `bench.py towers` writes it.
    """
    raw = read_object(path, WRITTEN_BY).get("machines")
    if not raw:
        raise UserError(f"{path}: no machines; `bench.py towers --json` of this version measures them beside its rows")
    try:
        found = TypeAdapter(list[_Machine]).validate_python(raw)
    except ValidationError as error:
        raise UserError(f"{path}: machines are not those of `bench.py towers` ({error})") from error
    return {own.link_gbit: hardware_of(own.machine, f"{path}, link {own.link_gbit:g}") for own in found}


def _foretold(variant: str) -> bool:
    """Not TorchRec's, nor those in micro-batches, whose messages travel beside other work."""
    return variant.startswith(towers.VARIANTS) and "micro-batches" not in variant


def work(model: str, variant: str) -> Work:
    """A variant of the benchmark, as its ranks build it."""
    config = towers_rank._config(model, variant, towers.HOSTS * towers.LOCAL)
    return work_of(config, resolve(config, towers_rank._schema()), towers.HOSTS, towers.LOCAL)


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Shares of rows and of pairs that are right; a pair has one model and link, and differs by more than 15 %."""
    right = pairs = 0
    for one, other in itertools.combinations(rows, 2):
        if (one["model"], one["link_gbit"]) != (other["model"], other["link_gbit"]):
            continue
        slow, fast = (one, other) if one["step_ms"] >= other["step_ms"] else (other, one)
        if slow["step_ms"] > DIFFERS * fast["step_ms"]:
            pairs += 1
            right += slow["predicted_ms"] > fast["predicted_ms"]
    errors = [abs(row["error"]) for row in rows]
    return {
        "order_right": right / pairs if pairs else 1.0,
        "pairs_that_differ": float(pairs),
        "within_20_percent": sum(error <= CLOSE for error in errors) / len(errors),
        "mean_error": sum(errors) / len(errors),
        "largest_error": max(errors),
    }
