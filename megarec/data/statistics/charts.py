"""Small pictures as inline SVG: no library, no script, nothing outside the page; colours are classes of its style.

Texts are escaped here; `s0`, `s1`, ... are the colours of splits in the order in which they are given.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 340, 180
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 8, 8, 30
_ROW = 18  # height of a bar


def count(value: float) -> str:
    """A number for an axis: 12k, 3M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def percent(value: float) -> str:
    return f"{100 * value:.3g} %" if value < 0.1 else f"{100 * value:.1f} %"


@dataclass(frozen=True)
class Scale:
    """From values to places; both ends lie inside the picture."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(max(v, 1e-300)) if self.log else v for v in (self.low, self.high, value))
        return round(self.start + (value - low) / ((high - low) or 1) * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        """A handful of round values."""
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            return [10.0**power for power in range(first, last + 1, max(1, -(-(last - first) // 5)))]
        span = (self.high - self.low) or 1.0
        step = 10.0 ** math.floor(math.log10(span / 4))
        step *= next(times for times in (1, 2, 5, 10) if span / (step * times) <= 5)
        first = math.ceil(self.low / step - 1e-9)
        return [place * step for place in range(first, math.floor(self.high / step + 1e-9) + 1)]


def svg(title: str, body: str, height: int = HEIGHT) -> str:
    """A picture of what is drawn, under its title."""
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">{body}</svg>'


def axes(x: Scale, y: Scale, x_label: str, y_label: str, as_percent: bool = False) -> str:
    """Grid, ticks and labels."""
    parts = []
    for value in y.ticks():
        text = percent(value) if as_percent else count(value)
        parts.append(f'<path class="grid" d="M{x.start} {y(value)}H{x.end}"/>')
        parts.append(f'<text x="{x.start - 4}" y="{y(value) + 3.5}" text-anchor="end">{text}</text>')
    for value in x.ticks():
        parts.append(f'<path class="grid" d="M{x(value)} {y.start}v3"/>')
        parts.append(f'<text x="{x(value)}" y="{y.start + 13}" text-anchor="middle">{count(value)}</text>')
    parts.append(f'<path class="axis" d="M{x.start} {y.start}H{x.end}"/>')
    parts.append(f'<text x="{x.end}" y="{y.start + 26}" text-anchor="end">{escape(x_label)}</text>')
    parts.append(f'<text x="{x.start}" y="{y.end - 8}">{escape(y_label)}</text>')
    return "".join(parts)


def frequencies(title: str, points: Sequence[tuple[int, int]]) -> str:
    """How often the id of a rank is there, both axes logarithmic."""
    most, least = max(n for _, n in points), min(n for _, n in points)
    x = Scale(1, max(points[-1][0], 2), _LEFT, WIDTH - _RIGHT, log=True)
    y = Scale(min(least, most / 2), most, HEIGHT - _BOTTOM, _TOP + 12, log=True)
    line = " ".join(f"{x(rank)},{y(n)}" for rank, n in points)
    body = axes(x, y, "rank of the id", "times")
    if len(points) < 20:
        body += "".join(f'<circle class="s0 dot" cx="{x(rank)}" cy="{y(n)}" r="2.5"/>' for rank, n in points)
    return svg(title, f'{body}<polyline class="s0 line" points="{line}"/>')


def histogram(title: str, edges: Sequence[float], counts: Sequence[Sequence[int]], x_label: str) -> str:
    """Shares by bin: the first split as areas, the others as lines."""
    shares = [[n / max(sum(own), 1) for n in own] for own in counts]
    x = Scale(edges[0], edges[-1], _LEFT, WIDTH - _RIGHT)
    y = Scale(0, max(max(own) for own in shares) or 1, HEIGHT - _BOTTOM, _TOP + 12)
    drawn = []
    for place, own in enumerate(shares):
        path = f"M{x(edges[0])} {y(0)}"
        path += "".join(f"V{y(share)}H{x(end)}" for share, end in zip(own, edges[1:], strict=True)) + f"V{y(0)}"
        drawn.append(f'<path class="s{place} {"line" if place else "area"}" d="{path}"/>')
    return svg(title, axes(x, y, x_label, "share", as_percent=True) + "".join(drawn))


def intervals(title: str, rows: Sequence[tuple[str, float, tuple[float, float]]]) -> str:
    """A dot with its interval for each row, from one axis."""
    low, high = min(ends[0] for _, _, ends in rows), max(ends[1] for _, _, ends in rows)
    pad = (high - low) * 0.15 or 0.01
    x = Scale(low - pad, high + pad, 60, WIDTH - 20)
    bottom = len(rows) * 24 + 6
    parts = []
    for value in x.ticks():
        parts.append(f'<path class="grid" d="M{x(value)} 4V{bottom}"/>')
        parts.append(f'<text x="{x(value)}" y="{bottom + 12}" text-anchor="middle">{percent(value)}</text>')
    for place, (name, value, ends) in enumerate(rows):
        y = place * 24 + 18
        parts.append(f'<text x="52" y="{y + 4}" text-anchor="end">{escape(_cut(name, 8))}</text>')
        parts.append(f'<path class="s{place} line" d="M{x(ends[0])} {y}H{x(ends[1])}"/>')
        parts.append(f'<circle class="s{place} dot" cx="{x(value)}" cy="{y}" r="4"/>')
    return svg(title, "".join(parts), bottom + 18)


@dataclass(frozen=True)
class Bar:
    """A bar of a chart; `mark` is a value that a line in it shows, `link` an id of the page."""

    name: str
    value: float
    text: str
    link: str
    mark: float | None = None


def bars(title: str, rows: Sequence[Bar], log: bool = False) -> str:
    """Horizontal bars, names on the left and values on the right."""
    ends = [v for row in rows for v in (row.value, row.mark or row.value)]
    x = Scale(0.7 if log else 0, max(max(ends), 1.0 if log else 1e-12), 120, WIDTH - 58, log)
    parts = []
    for place, row in enumerate(rows):
        y = place * _ROW
        width = max(x(row.value) - x.start, 1)
        parts.append(
            f'<a href="#{row.link}"><text x="114" y="{y + 13}" text-anchor="end">{escape(_cut(row.name, 18))}'
            f"<title>{escape(row.name)}</title></text></a>"
            f'<rect class="bar" x="{x.start}" y="{y + 3}" width="{round(width, 1)}" height="{_ROW - 6}"/>'
            f'<text class="strong" x="{WIDTH - 4}" y="{y + 13}" text-anchor="end">{escape(row.text)}</text>'
        )
        if row.mark is not None:
            parts.append(f'<path class="mark" d="M{x(row.mark)} {y + 1}v{_ROW - 2}"/>')
    return svg(title, "".join(parts), len(rows) * _ROW + 2)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
