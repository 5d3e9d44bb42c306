"""The page of an evaluation: one file that needs no other, no network and no script, in light and in dark."""

from collections.abc import Iterator, Sequence

from megarec.data.statistics.charts import WIDTH, Bar, Scale, axes, bars, percent, svg
from megarec.data.statistics.page import HEAD, grid, shown
from megarec.evaluation.report import (
    SLICE_HEAD,
    Report,
    between,
    difference_rows,
    name_of,
    number,
    slice_rows,
)
from megarec.metrics.calibrated import ReliabilityBin
from megarec.metrics.slices import Slices

_HEIGHT = 300  # of the curve
_BARS = 20  # of a chart


def page(report: Report, model: str, data: str) -> str:
    """The page of a report; the same report gives the same text.

    Args:
        model: what was scored, for people.
        data: on which rows, for people.
    """
    title = f"{model}: evaluation"
    found = report.quality
    parts = [HEAD.format(title=shown(title)), f"<h1>{shown(title)}</h1>"]
    parts.append(f'<p class="soft">{shown(data)}: {found.examples:,} examples</p>')
    for number_of, (label, own) in enumerate((report.labels or {"": report}).items()):
        parts += [f"<h2>Label {shown(label)}</h2>"] if label else []
        parts += _of_label(own, f"label{number_of}" if label else "")
    parts.append("</body>\n</html>\n")
    return "\n".join(parts)


def _of_label(report: Report, link: str) -> Iterator[str]:
    if not_finite := report.quality.not_finite:
        yield f'<p class="alarm">{not_finite:,} logits are NaN or infinite: they leave every metric undefined</p>'
    yield '<div class="cards">'
    yield from _metrics(report)
    yield from _curve_card(report)
    yield "</div>"
    yield from _comparison(report)
    if report.slices:
        yield "<h2>Slices</h2>"
    for place, column in enumerate(report.slices):
        yield from _slices(column, f"{link}slice{place}")


def _cells(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    return [[shown(cell) for cell in row] for row in rows]


def _metrics(report: Report) -> Iterator[str]:
    head, names = ["metric", "value"], list(report.values().items())
    rows = [[name_of(name), number(value)] for name, value in names]
    if report.intervals:
        head.append("95 % interval")
        rows = [[*row, between(report, name)] for row, (name, _) in zip(rows, names, strict=True)]
    yield f'<div class="card scroll"><h3>Metrics</h3>{grid(head, _cells(rows))}'
    if report.intervals:
        yield f'<p class="soft">Intervals: bootstrap, {report.draws:,} draws; by group for groups, else by example.</p>'
    if (grouped := report.grouped) is not None:
        yield (
            f'<p class="soft">{grouped.groups:,} groups by {shown(str(report.column))}: {grouped.one_label:,} of one '
            f"label have no AUC, {grouped.no_positive:,} without a positive no NDCG and no HR.</p>"
        )
    yield "</div>"


def _curve_card(report: Report) -> Iterator[str]:
    yield '<div class="card"><h3>Reliability: observed rate by predicted probability</h3>'
    if not report.curve:
        yield "<p>There is no curve without finite predictions.</p>"
    else:
        yield _curve(report.curve)
        yield (
            f'<p class="soft">{len(report.curve)} bins of equally many examples, with 95 % intervals; on the diagonal '
            "the two are equal.</p>"
        )
    if (own := report.calibrated) is not None:
        rows = [
            ["as predicted", report.quality.logloss],
            [f"temperature {own.temperature:.3f}", own.with_temperature],
            ["histogram", own.with_histogram],
        ]
        cells = [[shown(str(name)), f"{loss:.5f}"] for name, loss in rows]
        yield f"<h3>LogLoss after calibration fitted on {shown(own.fitted_on)}</h3>{grid(['', 'LogLoss'], cells)}"
    yield "</div>"


def _curve(curve: Sequence[ReliabilityBin]) -> str:
    most = max(max(own.predicted, own.high) for own in curve)
    low = min(min(own.predicted, own.low) for own in curve)
    low = 0.0 if low < most / 3 else low
    x = Scale(low, most, 44, WIDTH - 12)
    y = Scale(low, most, _HEIGHT - 30, 24)
    parts = [axes(x, y, "predicted", "observed", as_percent=True)]
    parts.append(f'<path class="axis" d="M{x(low)} {y(low)}L{x(most)} {y(most)}"/>')
    points = " ".join(f"{x(own.predicted)},{y(own.observed)}" for own in curve)
    parts.append(f'<polyline class="s0 line" points="{points}"/>')
    for own in curve:
        title = f"predicted {percent(own.predicted)}, observed {percent(own.observed)}, {own.examples:,} examples"
        parts.append(f'<path class="s0 line" d="M{x(own.predicted)} {y(own.low)}V{y(own.high)}"/>')
        parts.append(
            f'<circle class="s0" cx="{x(own.predicted)}" cy="{y(own.observed)}" r="3"><title>{title}</title></circle>'
        )
    return svg("reliability curve", "".join(parts), _HEIGHT)


def _comparison(report: Report) -> Iterator[str]:
    if report.compared is None:
        return
    yield f"<h2>Beside {shown(str(report.other))}</h2>"
    yield (
        f'<p class="soft">The same rows and draws for both ({report.draws:,}, by {report.drawn_by}); difference = this '
        "- other.</p>"
    )
    head = ["metric", "this", "other", "difference", "95 % interval", "p-value"]
    yield f'<div class="card scroll">{grid(head, _cells(difference_rows(report)))}</div>'


def _slices(column: Slices, link: str) -> Iterator[str]:
    rows = slice_rows(column)
    yield f'<details open="" id="{link}"><summary><span class="name">{shown(column.column)}</span>'
    rest = f", {column.others:,} more with {column.other_examples:,} examples" if column.others else ""
    yield f' <span class="soft">{len(rows):,} values{rest}</span></summary><div class="inside pair">'
    pairs = zip(rows, column.largest, strict=True)
    drawn = [Bar(row[0], own.auc, number(own.auc), link) for row, own in pairs if own.auc == own.auc]
    yield f"<div><h3>AUC</h3>{bars(f'AUC by {column.column}', drawn[:_BARS]) if drawn else '<p>No value has one.</p>'}"
    yield f'</div><div class="scroll">{grid(["value", *SLICE_HEAD], _cells(rows))}</div></div></details>'
