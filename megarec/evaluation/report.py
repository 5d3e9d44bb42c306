"""The report of `megarec evaluate` on a model and a split, from its logits: as JSON and as text."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megarec.metrics.bootstrap import Difference, Interval, ScoredRows, compare, intervals
from megarec.metrics.calibrated import ReliabilityBin, fit_histogram, fit_temperature, reliability
from megarec.metrics.grouped import Grouped, group_scores, known
from megarec.metrics.slices import Slices
from megarec.metrics.weighted import WeightedRows
from megarec.run.metrics import Quality, described, in_words, over_groups_of, quality, with_groups

NAMES = {
    "auc": "AUC",
    "logloss": "LogLoss",
    "ne": "NE",
    "calibration": "calibration",
    "gauc_by_impressions": "GAUC by impressions",
    "gauc_by_group": "GAUC by group",
}
"""Of metrics, for people; NDCG and HR are named by `name_of`."""
_LINES = 20  # of a column's slices


@dataclass(frozen=True)
class Scored:
    """A model's scores of every row of a split, in the split's order.

    Attributes:
        logits: float32 [N].
        labels: float32 [N], 0 or 1.
        groups: int32 [N], what group a row belongs to, -1: none; None: rows have no groups.
        column: that the groups are from.
        there: bool [all rows of the split], those that have the label; None: all have it.
    """

    logits: NDArray[np.float32]
    labels: NDArray[np.float32]
    groups: NDArray[np.int32] | None = None
    column: str | None = None
    there: NDArray[np.bool_] | None = None

    def prepared(self, ks: tuple[int, ...]) -> ScoredRows:
        """For draws; the logits must be finite."""
        rows = WeightedRows(self.logits, self.labels)
        if self.groups is None:
            return ScoredRows(rows)
        return ScoredRows(rows, group_scores(self.logits, self.labels, self.groups, ks), self.groups)


@dataclass(frozen=True)
class Calibrated:
    """LogLoss with calibration fitted on a split, in nats.

    Attributes:
        fitted_on: the split.
        temperature: that divides the logits.
        with_temperature, with_histogram: LogLoss of the rows at hand after either.
    """

    fitted_on: str
    temperature: float
    with_temperature: float
    with_histogram: float


@dataclass(frozen=True)
class Report:
    """Of one model on one split.

    Attributes:
        grouped: None: rows have no groups.
        intervals: by metric; empty: nothing was drawn, or some logit is not finite.
        draws: how many.
        compared: by metric, with the other model; None: there is none.
        drawn_by: what the comparison drew, "examples" or "groups".
        labels: of several labels the report of each, by name; the numbers above are those of train.best_label.
    """

    quality: Quality
    column: str | None
    grouped: Grouped | None
    intervals: dict[str, Interval]
    draws: int
    curve: list[ReliabilityBin]
    slices: list[Slices]
    calibrated: Calibrated | None
    other: str | None
    compared: dict[str, Difference] | None
    labels: dict[str, "Report"] = field(default_factory=dict)

    @property
    def drawn_by(self) -> str:
        return "examples" if self.grouped is None else "groups"

    def values(self) -> dict[str, float]:
        """Every metric that has a place in the table, by name."""
        found = {name: float(getattr(self.quality, name)) for name in ("auc", "logloss", "ne", "calibration")}
        if self.grouped is not None:
            found["gauc_by_impressions"] = self.grouped.gauc_by_impressions
            found["gauc_by_group"] = self.grouped.gauc_by_group
            found |= {f"ndcg@{k}": value for k, value in self.grouped.ndcg.items()}
            found |= {f"hit_rate@{k}": value for k, value in self.grouped.hit_rate.items()}
        return found


def name_of(metric: str) -> str:
    """Of a metric, for people."""
    return NAMES.get(metric) or metric.replace("ndcg", "NDCG").replace("hit_rate", "HR")


def is_finite(scored: Scored) -> bool:
    """Whether it has metrics."""
    return bool(len(scored.logits)) and bool(np.isfinite(scored.logits).all())


def make_report(
    scored: Scored,
    *,
    ks: tuple[int, ...],
    draws: int,
    seed: int,
    slices: Sequence[Slices] = (),
    validation: tuple[str, Scored] | None = None,
    other: tuple[str, Scored] | None = None,
) -> Report:
    """Compute all metrics.

    Args:
        ks: of NDCG@k and HR@k.
        draws: of the bootstrap; 0: no intervals and no comparison.
        validation: name and rows of the split that calibration is fitted on; None: no calibration.
        other: name of another model, and its scores of the same rows.
    """
    found = quality(torch.from_numpy(scored.logits), torch.from_numpy(scored.labels))
    grouped = None
    if scored.groups is not None:
        grouped = over_groups_of(scored.logits, scored.labels, scored.groups, ks)
        found = with_groups(found, grouped)
    finite = is_finite(scored)
    rows = scored.prepared(ks) if finite and draws else None
    compared = None
    if rows is not None and other is not None and is_finite(other[1]):
        compared = compare(rows, other[1].prepared(ks), draws, seed)
    return Report(
        found,
        scored.column,
        grouped,
        {} if rows is None else intervals(rows, draws, seed),
        draws,
        reliability(scored.logits, scored.labels) if finite else [],
        list(slices) if finite else [],
        _calibrated(scored, *validation) if finite and validation is not None and is_finite(validation[1]) else None,
        None if other is None else other[0],
        compared,
    )


def _calibrated(scored: Scored, split: str, validation: Scored) -> Calibrated:
    temperature = fit_temperature(validation.logits, validation.labels)
    histogram = fit_histogram(validation.logits, validation.labels)
    losses = (fitted.logloss(scored.logits, scored.labels) for fitted in (temperature, histogram))
    return Calibrated(split, temperature.temperature, *losses)


def as_json(report: Report) -> dict[str, Any]:
    """What --json prints; undefined or unrequested values are null or empty."""
    found = described(report.quality)
    found.setdefault("gauc", None)
    if report.grouped is not None:
        found["gauc"]["column"] = report.column
        found["no_positive_groups"] = report.grouped.no_positive
    found["intervals"] = {name: _ends(own) for name, own in report.intervals.items()}
    found["calibrated_logloss"] = None
    if (own := report.calibrated) is not None:
        found["calibrated_logloss"] = {
            "temperature": own.with_temperature,
            "histogram": own.with_histogram,
            "fitted_on": own.fitted_on,
            "fitted_temperature": own.temperature,
        }
    found["slices"] = [own.described() for own in report.slices]
    found["reliability"] = [asdict(own) for own in report.curve]
    if report.compared is not None:
        found["compared"] = {"other": report.other, "draws": report.draws, "drawn_by": report.drawn_by} | {
            "metrics": {name: _difference(own) for name, own in report.compared.items()}
        }
    if report.labels:
        found["labels"] = {name: as_json(own) for name, own in report.labels.items()}
    return found


def _ends(interval: Interval) -> list[float | None]:
    return [known(interval.low), known(interval.high)]


def _difference(found: Difference) -> dict[str, Any]:
    values = {name: known(getattr(found, name)) for name in ("this", "other", "difference", "p_value")}
    return values | {"interval": _ends(found.interval)}


def as_lines(report: Report) -> list[str]:
    """As the terminal shows it."""
    if report.labels:
        return [line for name, own in report.labels.items() for line in (f"label {name}:", *as_lines(own), "")][:-1]
    lines = [in_words(report.quality)]
    if (grouped := report.grouped) is not None:
        lines.append(
            f"{grouped.groups:,} groups by {report.column}: {grouped.one_label:,} of one label have no AUC, "
            f"{grouped.no_positive:,} without a positive no NDCG and no HR"
        )
    if report.intervals:
        rows = [[name_of(name), number(value), between(report, name)] for name, value in report.values().items()]
        lines += ["", *aligned(["metric", "value", f"95 % interval, {report.draws:,} draws"], rows)]
    if (own := report.calibrated) is not None:
        lines += [
            "",
            f"LogLoss {report.quality.logloss:.4f}, with temperature {own.temperature:.3f} {own.with_temperature:.4f}, "
            f"with a histogram {own.with_histogram:.4f} (fitted on {own.fitted_on})",
        ]
    for column in report.slices:
        rows, hidden = slice_rows(column)[:_LINES], column.largest[_LINES:]
        lines += ["", *aligned([column.column, *SLICE_HEAD], rows)]
        if others := column.others + len(hidden):
            examples = column.other_examples + sum(own.examples for own in hidden)
            lines.append(f"and {others:,} more values with {examples:,} examples")
    if report.compared is not None:
        head = ["metric", "this", "other", "difference", "95 % interval", "p-value"]
        lines += ["", f"beside {report.other}, drawn by {report.drawn_by}:", *aligned(head, difference_rows(report))]
    return lines


SLICE_HEAD = ["examples", "positives", "AUC", "LogLoss", "NE", "calibration"]


def slice_rows(column: Slices) -> list[list[str]]:
    """A row a value: the value, then SLICE_HEAD."""
    return [
        ["null" if own.value is None else str(own.value), f"{own.examples:,}", f"{own.positives:,}"]
        + [number(value) for value in (own.auc, own.logloss, own.ne, own.calibration)]
        for own in column.largest
    ]


def difference_rows(report: Report) -> list[list[str]]:
    """A row a metric: name, this, other, difference, interval, p-value."""
    return [
        [
            name_of(name),
            *map(number, (own.this, own.other)),
            _signed(own.difference),
            f"{_signed(own.interval.low)} to {_signed(own.interval.high)}",
            _p_value(own.p_value, report.draws),
        ]
        for name, own in (report.compared or {}).items()
    ]


def number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"


def _signed(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:+.5f}"


def _p_value(value: float, draws: int) -> str:
    if math.isnan(value):
        return "-"
    least = 2 / (draws + 1)
    return f"<= {least:.3g}" if value <= least else f"{value:.3f}"


def between(report: Report, name: str) -> str:
    own = report.intervals.get(name)
    return "" if own is None or math.isnan(own.low) else f"{own.low:.4f} to {own.high:.4f}"


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of one width: the first to the left, others to the right."""
    table = [list(head), *map(list, rows)]
    widths = [max(len(row[place]) for row in table) for place in range(len(head))]
    return [
        "  ".join(cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(cells))
        for cells in (list(zip(row, widths, strict=True)) for row in table)
    ]
