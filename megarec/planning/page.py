"""A plan as one HTML page: memory, links, the step's timeline, scaling curves, and the choice; no script, no network.

In light and in dark; style and charts are those of the pages of data and of evaluations.
"""

from collections.abc import Iterator, Sequence
from html import escape

from megarec.data.statistics.charts import WIDTH, Bar, Scale, axes, bars, percent, svg
from megarec.data.statistics.page import HEAD, grid, shown
from megarec.planning.choice_report import alternative_rows, change_rows
from megarec.planning.planner import Plan
from megarec.planning.search import Chosen
from megarec.planning.sweep import Curve
from megarec.planning.trace import NAMES, streams_of

_WIDE, _LANE, _LEFT = 1000, 30, 90  # of the timeline
_COLOURS = 4  # of the pages' style; parts beyond them are paler
_NAMED = 55  # width from which a piece carries its name
_HEIGHT = 200  # of a curve
_EXTRA = """<style>
svg.wide { max-width: none; min-width: 42rem } .pale { fill-opacity: .45 } rect.s0, rect.s1, rect.s2, rect.s3
{ stroke: var(--back); stroke-width: .5 } svg .on { fill: var(--back); font-size: 10px; pointer-events: none }
i.pale { opacity: .45 } .card + .cards, .card + .card { margin-top: 1rem } .cards > .card { margin-top: 0 }
.scroll td.name { white-space: nowrap; max-width: none }
</style>
"""


def page(plan: Plan, curves: Sequence[Curve], chosen: Chosen | None = None) -> str:
    """The page of a plan; the same plan gives the same text.

    Args:
        curves: sweep.py's, of the same run.
        chosen: the search that the plan is the outcome of.
    """
    job = f"{plan.hosts} {'host' if plan.hosts == 1 else 'hosts'} x {plan.ranks_per_host} {plan.hardware.name}"
    title = f"Plan: {job}"
    parts = [HEAD.format(title=shown(title)).replace("</head>", f"{_EXTRA}</head>"), f"<h1>{shown(title)}</h1>"]
    total = plan.examples * plan.hosts * plan.ranks_per_host
    parts.append(
        f'<p class="soft">Predicted, not measured: {plan.examples:,} examples a rank, {total:,} a step; '
        f"{1e3 * plan.seconds:,.2f} ms a step, {plan.examples_per_second:,.0f} examples/s, MFU {plan.mfu:.1%}</p>"
    )
    if not plan.fits:
        missing = (plan.memory["total"] - plan.available) / 1e9
        parts.append(f'<p class="alarm">It does not fit: {missing:,.1f} GB are missing on the largest rank</p>')
    if chosen is not None:
        parts += _choice(chosen)
    parts += ["<h2>A step</h2>", *_timeline(plan), '<div class="cards">', *_parts(plan), *_memory(plan), *_links(plan)]
    parts += ["</div>", "<h2>Scaling</h2>", '<div class="cards">']
    parts += [_curve(curve) for curve in curves]
    parts += ["</div>", "</body>\n</html>\n"]
    return "\n".join(parts)


def _cells(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    return [[shown(cell) for cell in row] for row in rows]


def _choice(chosen: Chosen) -> Iterator[str]:
    yield f"<h2>The choice</h2><p>{chosen.looked_at:,} configs were compared.</p>"
    head, rows = change_rows(chosen)
    yield f'<div class="card scroll"><h3>What it changes</h3>{grid(head, _cells(rows), texts=4)}</div>'
    head, rows = alternative_rows(chosen)
    yield '<div class="card scroll"><h3>The choice with one setting changed</h3>'
    yield grid(head, _cells(rows), texts=2) + "</div>"


def _colours(plan: Plan) -> dict[str, str]:
    """By part, the classes of its colour."""
    names = [name for name, busy in plan.timeline.busy.items() if busy > 0]
    return {
        name: f"s{place % _COLOURS}" + (" pale" if place // _COLOURS % 2 else "") for place, name in enumerate(names)
    }


def _timeline(plan: Plan) -> Iterator[str]:
    found, colours = plan.timeline, _colours(plan)
    lanes = streams_of(found)
    runs = [run for run in found.runs if run.end > run.start]
    start, end = min([0.0, *(run.start for run in runs)]), max(run.end for run in found.runs)
    x = Scale(1e3 * start, 1e3 * end, _LEFT, _WIDE - 8)
    bottom = len(lanes) * _LANE + 8
    drawn = []
    for value in x.ticks():
        drawn.append(f'<path class="grid" d="M{x(value)} 4V{bottom}"/>')
        drawn.append(f'<text x="{x(value)}" y="{bottom + 14}" text-anchor="middle">{value:g} ms</text>')
    for place, lane in enumerate(lanes):
        y = 6 + place * _LANE
        drawn.append(
            f'<text class="strong" x="{_LEFT - 8}" y="{y + 16}" text-anchor="end">{lane}'
            f"<title>{escape(NAMES[lane])}</title></text>"
        )
        for run in runs:
            if run.piece.stream != lane:
                continue
            left, right = x(1e3 * run.start), x(1e3 * run.end)
            width = max(right - left, 0.4)
            told = escape(f"{run.piece.name}: {1e3 * (run.end - run.start):,.3f} ms ({run.piece.part})")
            drawn.append(
                f'<rect class="{colours[run.piece.part]}" x="{left}" y="{y}" width="{width:.1f}" height="{_LANE - 8}">'
                f"<title>{told}</title></rect>"
            )
            if width >= _NAMED and "pale" not in colours[run.piece.part]:
                name = run.piece.name[: int(width / 5.5)]
                drawn.append(f'<text class="on" x="{left + 4}" y="{y + 15}">{escape(name)}</text>')
    drawn.append(
        f'<path class="mark" d="M{x(0)} 2V{bottom}"/><path class="mark" d="M{x(1e3 * found.seconds)} 2V{bottom}"/>'
    )
    picture = svg("timeline of a step", "".join(drawn), bottom + 20)
    picture = picture.replace(f'viewBox="0 0 {WIDTH} ', f'class="wide" viewBox="0 0 {_WIDE} ', 1)
    key = "".join(f'<span><i class="{style}"></i>{shown(name)}</span>' for name, style in colours.items())
    yield f'<div class="card scroll"><h3>Timeline of a rank, stream by stream</h3>{picture}'
    yield f'<p class="key soft">{key}</p>'
    yield '<p class="soft">What lies before the first line began while the step before still ran.</p></div>'


def _parts(plan: Plan) -> Iterator[str]:
    rows = [
        [name, f"{1e3 * plan.timeline.exposed[name]:,.2f}", f"{1e3 * busy:,.2f}"]
        for name, busy in plan.timeline.busy.items()
        if busy > 0
    ]
    rows.append(["total", f"{1e3 * plan.seconds:,.2f}", ""])
    yield '<div class="card scroll" id="parts"><h3>Time by part, ms</h3>'
    yield grid(["part", "waited for", "busy"], _cells(rows)) + "</div>"


def _memory(plan: Plan) -> Iterator[str]:
    sums = ("total", "model_states", "snapshot")
    own = {name: size for name, size in plan.memory.items() if name not in sums and size > 0}
    rows = [*own.items(), ("total", plan.memory["total"]), ("available", plan.available)]
    drawn = bars("memory by part", [Bar(name, size, f"{size / 1e9:,.2f} GB", "memory") for name, size in rows])
    yield f'<div class="card" id="memory"><h3>Memory of the largest rank</h3>{drawn}'
    yield '<p class="soft">Activations and communication are gone when the optimizer steps: not all parts add up.</p>'
    yield "</div>"


def _links(plan: Plan) -> Iterator[str]:
    yield '<div class="card" id="links"><h3>Bytes that a rank sends in a step</h3>'
    names = {"host": "to its own host", "network": "to other hosts"}
    for link, name in names.items():
        own = sorted((sent for sent in plan.traffic if sent.link == link), key=lambda sent: -sent.bytes)
        if own:
            rows = [Bar(sent.what, sent.bytes, f"{sent.bytes / 1e6:,.1f} MB", "links") for sent in own]
            yield f"<h3>{name}</h3>{bars(f'bytes {name}', rows)}"
    if not plan.traffic:
        yield "<p>Nothing: there is one rank.</p>"
    yield "</div>"


def _curve(curve: Curve) -> str:
    if curve.axis != "hosts":
        rows = [
            Bar(
                f"{point.at:,g}" if point.at < 1e6 else f"{point.at:,.0f}",
                1e3 * point.seconds,
                f"{1e3 * point.seconds:,.1f} ms" if point.fits else "does not fit",
                "scaling",
            )
            for point in curve.points
        ]
        return f'<div class="card"><h3>{shown(curve.name)}: ms of a step</h3>{bars(curve.name, rows)}</div>'
    x = Scale(curve.points[0].at, curve.points[-1].at, 44, WIDTH - 12, log=True)
    y = Scale(0.0, max(1.0, *(point.efficiency for point in curve.points)), _HEIGHT - 30, 24)
    line = " ".join(f"{x(point.at)},{y(point.efficiency)}" for point in curve.points)
    drawn = [axes(x, y, curve.axis, "efficiency", as_percent=True), f'<polyline class="s0 line" points="{line}"/>']
    for point in curve.points:
        told = f"{point.at:g} hosts: {percent(point.efficiency)}, {point.examples_per_second:,.0f} examples/s"
        style = "s0" if point.fits else "s1"
        told += "" if point.fits else ", does not fit"
        drawn.append(
            f'<circle class="{style}" cx="{x(point.at)}" cy="{y(point.efficiency)}" r="3">'
            f"<title>{told}</title></circle>"
        )
    key = '<p class="key soft"><span><i class="s0"></i>fits</span><span><i class="s1"></i>does not fit</span></p>'
    return (
        f'<div class="card" id="scaling"><h3>Scaling over {shown(curve.name)}</h3>'
        f"{svg(f'scaling over {curve.name}', ''.join(drawn), _HEIGHT)}{key}</div>"
    )
