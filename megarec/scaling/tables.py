"""A sweep in tables: its plan before it starts, and every model's mean and deviation over seeds after it."""

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megarec.errors import UserError
from megarec.scaling.points import read_rows

if TYPE_CHECKING:
    from megarec.scaling.budget import Plan  # with torch, which a table does without

Split = Literal["test", "valid"]
_QUALITY = {"test": ("auc", "logloss", "ne"), "valid": ("valid_auc", "valid_logloss", "valid_ne")}
_COLUMNS = ("seed", "chosen", "overrides", "train_gflop_per_example", "parameters", "examples_per_second")


def in_words(plan: "Plan") -> Iterator[str]:
    """The plan, a line a model, and its total."""
    yield f"{'model':24} {'runs':>4} {'GFLOP/example':>13} {'GFLOP':>12} {'hours':>6}"
    for line in plan.lines:
        hours = line.seconds / 3600 / plan.at_once
        left_out = f"  left out: {line.left_out}" if line.left_out else ""
        yield (
            f"{line.model:24} {line.runs:4} {line.gflop_per_example:13.4g} {line.gflop:12,.0f} {hours:6.2f}{left_out}"
        )
    runs = sum(line.runs for line in plan.kept)
    yield (
        f"{runs} runs, {plan.at_once} at a time: {plan.gflop:,.0f} GFLOP, {plan.hours:.2f} h at most "
        f"({plan.pace.source}); early stopping shortens it"
    )


def markdown(path: Path, split: Split = "test") -> Iterator[str]:
    """Mean and sample deviation over the seeds of each model at its chosen learning rate; best AUC first.

    Args:
        split: whose quality; "valid" to choose by.

    Raises:
        UserError: the file is not a table of a sweep.
    """
    names = _QUALITY[split]
    models: dict[str, list[dict[str, Any]]] = {}
    for row in chosen_rows(path):
        models.setdefault(row["model"], []).append(row)
    yield f"| model | seeds | {split} AUC | LogLoss | NE | parameters | GFLOP/example | examples/s | chosen rates |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for model, rows in sorted(models.items(), key=lambda item: -_mean(item[1], names[0])):
        quality = " | ".join(_in_words(rows, name) for name in names)
        speeds = [row["examples_per_second"] for row in rows if row["examples_per_second"]]
        speed = f"{statistics.mean(speeds):,.0f}" if speeds else ""
        one = rows[0]
        yield (
            f"| {model} | {len(rows)} | {quality} | {one['parameters']:,} | {one['train_gflop_per_example']:.6f} "
            f"| {speed} | {_rates(one['overrides'])} |"
        )


def chosen_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a sweep's table at their models' chosen learning rates.

    Raises:
        UserError: the file is not a table of a sweep.
    """
    if path.suffix != ".parquet":
        raise UserError(f"{path}: expected the runs.parquet of a sweep")
    columns, rows = read_rows(path)
    for column in (*_COLUMNS, *_QUALITY["test"], *_QUALITY["valid"]):
        if column not in columns:
            raise UserError(f"{path}: no column {column}; expected the runs.parquet of a sweep")
    return [row for row in rows if row["chosen"]]


def values(rows: list[dict[str, Any]], name: str) -> list[float]:
    """Of a column, without those of runs whose split has one label or no rows."""
    return [row[name] for row in rows if row[name] is not None]


def _mean(rows: list[dict[str, Any]], name: str) -> float:
    return statistics.mean(values(rows, name) or [0.0])


def _in_words(rows: list[dict[str, Any]], name: str) -> str:
    found = values(rows, name)
    if not found:
        return "none"
    deviation = f" ± {statistics.stdev(found):.4f}" if len(found) > 1 else ""
    return f"{statistics.mean(found):.4f}{deviation}"


def _rates(overrides: str) -> str:
    """The learning rates among the overrides: `dense 0.001, embedding 0.02`."""
    words = [word.split(".learning_rate=") for word in overrides.split() if ".learning_rate=" in word]
    return ", ".join(f"{section} {value}" for section, value in words)
