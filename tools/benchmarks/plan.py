"""The planner's steps beside those that `bench.py towers` measured.

    python tools/bench.py plan                                   # the published table, docs/results/towers.json
    python tools/bench.py plan --results towers.json             # another one: `bench.py towers --json > towers.json`

Two namespace hosts of two ranks on two cores: hardware/epyc-2-cores.json, whose sources say which rows of the published
table a figure was fitted on. A row's link takes the place of the network.
"""

import itertools
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from megarec.errors import UserError
from megarec.files import read_object
from megarec.planning.hardware import Figure, Hardware, load_hardware
from megarec.planning.towers_pay import Work, time_of, work_of
from megarec.run.spec import resolve
from tools.benchmarks import towers, towers_rank

PUBLISHED = Path(__file__).resolve().parents[2] / "docs/results/towers.json"
MACHINE = "epyc-2-cores"
DIFFERS = 1.15  # of measured steps: below, their order is within the noise
CLOSE = 0.2


class Measured(NamedTuple):
    """A row of `bench.py towers`."""

    model: str
    variant: str
    link_gbit: float
    step_ms: float


def run(results: Path = PUBLISHED) -> dict[str, Any]:
    """A row for each measured one of ours, and how far the predictions are off.

    Raises:
        UserError: the file does not hold rows of `bench.py towers`.
    """
    measured = read_rows(results)
    hardware, works = load_hardware(MACHINE), dict[tuple[str, str], Work]()
    rows = []
    for row in measured:
        key = row.model, row.variant
        if key not in works:
            works[key] = work(*key)
        variant = time_of(works[key], over(hardware, row.link_gbit), row.variant)
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
    raw = read_object(path, "what `python tools/bench.py towers --json` printed").get("rows", [])
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


def _foretold(variant: str) -> bool:
    """Not TorchRec's, nor those in micro-batches, whose messages travel beside other work."""
    return variant.startswith(towers.VARIANTS) and "micro-batches" not in variant


def work(model: str, variant: str) -> Work:
    """A variant of the benchmark, as its ranks build it."""
    config = towers_rank._config(model, variant, towers.HOSTS * towers.LOCAL)
    return work_of(config, resolve(config, towers_rank._schema()), towers.HOSTS, towers.LOCAL)


def over(hardware: Hardware, link_gbit: float) -> Hardware:
    """The machine with hosts on shaped links, which the ranks of a host share; 0: unshaped."""
    if not link_gbit:
        return hardware
    own = hardware.network_gb_s
    rate = link_gbit / 8 / towers.LOCAL
    share = min(rate, own.value) if own is not None else rate  # a link cannot be faster than the machine behind it
    return hardware.model_copy(update={"network_gb_s": Figure(value=share, source=f"a link of {link_gbit:g} Gbit/s")})


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
