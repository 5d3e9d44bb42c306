"""statistics.html: one page that needs no other file, no network and no script, in light and in dark."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape

from megarec.data.schema import Schema
from megarec.data.statistics import charts
from megarec.data.statistics.charts import Bar, count, percent
from megarec.data.statistics.drift import Drift
from megarec.data.statistics.figures import Categorical, Feature, Labels, Lengths, Numbers, Numeric

HIGH_UNKNOWN = 0.25  # as the warning of a preparation
HIGH_SHARING = 0.5
_BARS = 20  # of a chart
_OPEN = 40  # features whose details are shown at once
_NAMED = 10  # features that a sentence names
_LIST_BINS = 40

HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
:root {{ --back: #fff; --card: #f6f7f9; --text: #1c2024; --soft: #60666d; --line: #d8dce1; --bar: #7aa7d6;
  --alarm: #b3261e; --s0: #0072b2; --s1: #d55e00; --s2: #009e73; --s3: #8a5aa8 }}
@media (prefers-color-scheme: dark) {{ :root {{ --back: #14171a; --card: #1d2125; --text: #e6e8ea; --soft: #9aa2aa;
  --line: #363c42; --bar: #3f6f9f; --alarm: #ff8a80; --s0: #56b4e9; --s1: #f0954a; --s2: #3fc79a; --s3: #c79be0 }} }}
* {{ box-sizing: border-box }}
body {{ margin: 0 auto; max-width: 76rem; padding: 1.5rem 1rem 4rem; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif }}
h1 {{ font-size: 1.6rem; margin: 0 }} h2 {{ font-size: 1.2rem; margin: 2.2rem 0 .6rem }}
h3 {{ font-size: .95rem; margin: 0 0 .4rem }} p {{ margin: .3rem 0; max-width: 50rem }}
.soft, small {{ color: var(--soft) }} .alarm {{ color: var(--alarm); font-weight: 600 }}
a {{ color: inherit; text-decoration-color: var(--soft); text-underline-offset: .15em }}
h1, .name, li, p {{ overflow-wrap: anywhere }}
.cards {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(21rem, 100%), 1fr)); gap: 1rem;
  align-items: start }}
.card, details {{ background: var(--card); border-radius: .5rem; padding: .8rem 1rem; min-width: 0 }}
details {{ margin: .6rem 0; content-visibility: auto; contain-intrinsic-size: auto 3rem }}
summary {{ cursor: pointer }} summary .name {{ font-weight: 600 }}
.inside {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 1rem;
  margin-top: .8rem; scroll-margin-top: 4rem }}
@media (min-width: 56rem) {{ .pair {{ grid-template-columns: 21rem minmax(0, 1fr) }} }}
.wide {{ grid-column: 1 / -1 }} .scroll {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88rem }}
th {{ text-align: left; font-weight: 600; color: var(--soft); vertical-align: bottom }}
th, td {{ padding: .2rem .7rem .2rem 0; border-bottom: 1px solid var(--line) }}
.n {{ text-align: right; white-space: nowrap }} td.name {{ min-width: 3rem; max-width: 20rem }}
.all td.name {{ min-width: 6rem }}
.key span {{ margin-right: .9rem; white-space: nowrap }}
.key i {{ display: inline-block; width: .7rem; height: .7rem; border-radius: .15rem; margin-right: .3rem }}
svg {{ display: block; width: 100%; height: auto; max-width: 30rem }}
svg text {{ font-size: 10.5px; fill: var(--soft) }}
svg a text, svg .strong {{ fill: var(--text) }} svg a:hover text {{ text-decoration: underline }}
.grid {{ stroke: var(--line); fill: none }} .axis {{ stroke: var(--soft) }} .bar {{ fill: var(--bar) }}
.mark {{ stroke: var(--text); stroke-width: 1.5 }} .line {{ fill: none; stroke-width: 1.6 }}
.area {{ fill-opacity: .28; stroke-width: .8 }}
.s0 {{ stroke: var(--s0); fill: var(--s0); background: var(--s0) }}
.s1 {{ stroke: var(--s1); fill: var(--s1); background: var(--s1) }}
.s2 {{ stroke: var(--s2); fill: var(--s2); background: var(--s2) }}
.s3 {{ stroke: var(--s3); fill: var(--s3); background: var(--s3) }} path.line, polyline.line {{ fill: none }}
</style>
</head>
<body>
"""


def page(schema: Schema, labels: Labels, features: Sequence[Feature]) -> str:
    """The page of a data set; the same figures give the same text.

    Args:
        features: in the schema's order; the page has the most drifted first, then the most unknown.
    """
    links = {feature.name: f"f{place}" for place, feature in enumerate(features, 1)}
    ordered = sorted(features, key=lambda f: (-max(_excess(f), 0.0), -(unknown_of(f) or 0.0)))
    title = f"{schema.name}: statistics"
    splits = {split: own.rows for split, own in next(iter(labels.values())).items()}
    parts = [HEAD.format(title=escape(title)), f"<h1>{shown(title)}</h1>"]
    kinds = [f"{sum(f.kind == kind for f in features)} {kind.replace('_', '-')}" for kind in _kinds(features)]
    parts.append(f'<p class="soft">{sum(splits.values()):,} rows; {", ".join(kinds)} features; ')
    parts.append(f"label: {shown(schema.label_rule or ', '.join(labels))}</p>")
    parts += _overview(schema, labels, features, links)
    parts += _rankings(features, links)
    parts += _table(ordered, list(splits), links)
    parts.append("<h2>Feature by feature</h2>")
    parts.append(_key(splits))
    parts += [_details(feature, links[feature.name], len(features) <= _OPEN) for feature in ordered]
    parts.append("</body>\n</html>\n")
    return "\n".join(parts)


def unknown_of(feature: Feature) -> float | None:
    """The largest share of unknown values in a split; None: there is no vocabulary."""
    if isinstance(feature, Numeric):
        return None
    return max((own.unknown for own in feature.splits.values() if own.unknown is not None), default=None)


def findings(labels: Labels, features: Sequence[Feature]) -> Iterator[tuple[str, list[str]]]:
    """What a reader should look at: (sentence, names of the features that it is about)."""
    for label, splits in labels.items():
        if bad := sum(own.invalid for own in splits.values()):
            yield f"{bad:,} of {label!r} are neither 0 nor 1: training stops there", []
        for split, own in splits.items():
            if own.rate in (0.0, 1.0):
                yield f"all {label!r} of {split} are {own.rate:.0f}: nothing can be learned or measured there", []
    for test, what in _LOOKED_AT:
        if names := [feature.name for feature in features if test(feature)]:
            yield f"{len(names)} {'feature' if len(names) == 1 else 'features'} {what}", names


_LOOKED_AT: tuple[tuple[Callable[[Feature], bool], str], ...] = (
    (
        lambda f: any(own.invalid for own in f.splits.values()),
        "with nulls, ids outside the table or numbers that are not finite (training stops there)",
    ),
    (lambda f: _excess(f) > 0, "drifted from training to another split by more than chance"),
    (
        lambda f: (unknown_of(f) or 0.0) >= HIGH_UNKNOWN,
        f"with {HIGH_UNKNOWN:.0%} or more unknown values in a split (spelled differently in the training files? "
        "min_count too high?)",
    ),
    (lambda f: _constant(f), "with a single value (nothing can be learned from it)"),
    (
        lambda f: isinstance(f, Categorical) and (f.sharing or 0.0) >= HIGH_SHARING,
        "hashed so that most of their distinct values share a row (more rows help)",
    ),
)


def _constant(feature: Feature) -> bool:
    if isinstance(feature, Numeric):
        return all(own.least == own.most for own in feature.splits.values())
    own = feature.splits[feature.base]
    return own.values > 0 and own.distinct <= 1 and own.row_0 in (0.0, 1.0) and own.lengths is None


def _excess(feature: Feature) -> float:
    return max((drift.excess for drift in feature.drift.values()), default=0.0)


def _kinds(features: Sequence[Feature]) -> list[str]:
    return list(dict.fromkeys(feature.kind for feature in features))


def shown(text: str) -> str:
    """Escaped; what cannot be printed as Python writes it."""
    return escape(text if text.isprintable() else repr(text))


def _link(name: str, links: Mapping[str, str]) -> str:
    return f'<a href="#{links[name]}">{shown(name)}</a>'


def _key(splits: Iterable[str]) -> str:
    spans = "".join(f'<span><i class="s{place}"></i>{shown(split)}</span>' for place, split in enumerate(splits))
    return f'<p class="key soft">{spans}</p>'


def _overview(schema: Schema, labels: Labels, features: Sequence[Feature], links: Mapping[str, str]) -> Iterator[str]:
    yield '<h2>Splits</h2><div class="cards">'
    for label, splits in labels.items():
        rates = [(split, own.rate, own.interval) for split, own in splits.items() if own.rate is not None]
        shown_rates = {split: [percent(rate), " to ".join(map(percent, ends))] for split, rate, ends in rates}
        rows = [[shown(split), f"{own.rows:,}", *shown_rates.get(split, ["none", ""])] for split, own in splits.items()]
        yield f'<div class="card scroll"><h3 class="name">{shown(label) if len(labels) > 1 else "Rows"}</h3>'
        yield grid(["split", "rows", "label rate", "95 % interval"], rows)
        yield (charts.intervals("label rate by split", rates) if rates else "") + "</div>"
    if schema.bad_rows:
        total = sum(schema.bad_rows.values())
        yield f'<div class="card scroll"><h3>{total:,} bad rows left out by the preparation</h3>'
        by_count = sorted(schema.bad_rows.items(), key=lambda pair: (-pair[1], pair[0]))
        yield grid(["reason", "rows"], [[shown(reason), f"{n:,}"] for reason, n in by_count]) + "</div>"
    yield "</div><h2>To look at</h2><ul>"
    found = list(findings(labels, features))
    for sentence, names in found:
        named = ", ".join(_link(name, links) for name in names[:_NAMED])
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        yield f"<li>{shown(sentence)}{': ' if names else ''}{named}{more}</li>"
    if not found:
        yield "<li>Nothing stands out.</li>"
    yield "</ul>"


def _rankings(features: Sequence[Feature], links: Mapping[str, str]) -> Iterator[str]:
    """Charts of the features that lead in something."""
    ids = [feature for feature in features if isinstance(feature, Categorical)]
    drifted = [(f.name, min(f.drift.values(), key=lambda d: d.order)) for f in features if f.drift]
    drifted = sorted((pair for pair in drifted if pair[1].buckets > 1), key=lambda pair: pair[1].order)
    drift = [Bar(name, d.divergence, f"{d.divergence:.2g}", links[name], d.noise) for name, d in drifted]

    def shares(pairs: Iterator[tuple[str, float | None]]) -> list[Bar]:
        found = [Bar(name, share, percent(share), links[name]) for name, share in pairs if share]
        return sorted(found, key=lambda bar: (-bar.value, bar.name))

    rows = sorted((Bar(f.name, f.rows, count(f.rows), links[f.name]) for f in ids), key=lambda b: (-b.value, b.name))
    blocks: list[tuple[str, str, list[Bar], bool]] = [
        ("Drift from training", "Jensen-Shannon divergence in bits, of the split where it is largest; "
         "the mark is what chance alone reaches.", drift, False),
        ("Unknown values", "Share of the values that are there, of the split where it is largest.",
         shares((f.name, unknown_of(f)) for f in ids), False),
        ("Missing", "Share of rows without a value, of lists the empty ones, of the split where it is largest.",
         shares((f.name, max((s.missing or 0.0 for s in f.splits.values()), default=None)) for f in features), False),
        ("Top-heavy", "Share of values that the most frequent id has.",
         shares((f.name, f.top["1"]) for f in ids), False),
        ("Cardinality", "Rows of the table, on a logarithmic axis.", rows, True),
    ]  # fmt: skip
    yield '<h2>Rankings</h2><div class="cards">'
    for title, what, found, log in blocks:
        if found:
            most = f"The {_BARS} largest of {len(found)}. " if len(found) > _BARS else ""
            yield f'<div class="card"><h3>{title}</h3><p><small>{most}{what}</small></p>'
            yield charts.bars(title, found[:_BARS], log) + "</div>"
    yield "</div>"


def grid(head: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """A table of texts that are HTML; the first columns are `texts`, the others numbers."""
    kind = ["name"] * texts + ["n"] * (len(head) - texts)
    cells = "".join(f"<th class={style}>{text}</th>" for style, text in zip(kind, head, strict=True))
    body = "\n".join(
        f"<tr>{''.join(f'<td class={style}>{text}</td>' for style, text in zip(kind, row, strict=True))}</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{cells}</tr></thead><tbody>\n{body}\n</tbody></table>"


def _table(features: Sequence[Feature], splits: Sequence[str], links: Mapping[str, str]) -> Iterator[str]:
    """One line a feature."""
    others = list(dict.fromkeys(split for feature in features for split in feature.drift))
    head = ["feature", "kind", "table rows", "distinct", "missing", "unknown", "top 1", "top 100"]
    head += [f"drift to {shown(split)}" for split in others]
    rows = []
    for feature in features:
        row = [_link(feature.name, links), feature.kind.replace("_", "-")]
        if isinstance(feature, Categorical):
            own, unknown = feature.splits[feature.base], unknown_of(feature)
            row += [f"{feature.rows:,}", f"{own.distinct:,}", _share(own.missing)]
            row.append(_alarm(_share(unknown), (unknown or 0.0) >= HIGH_UNKNOWN))
            row += [percent(feature.top["1"]), percent(feature.top["100"])]
        else:
            row += ["", "", _share(feature.splits[splits[0]].missing), "", "", ""]
        rows.append(row + [_drift(feature.drift.get(split)) for split in others])
    yield "<h2>All features</h2>"
    yield (
        '<p class="soft">The most drifted first, then the most unknown. Distinct ids, missing and top-heavy are of '
        f"{shown(splits[0])}; unknown is of the split where it is largest. Drift is “chance” where chance explains "
        "it, and “-” where no value is frequent enough to be compared, or there is only one.</p>"
    )
    yield f'<div class="scroll all">{grid(head, rows, 2)}</div>'


def _share(value: float | None) -> str:
    return "" if value is None else percent(value)


def _alarm(text: str, on: bool) -> str:
    return f'<span class="alarm">{text}</span>' if on else text


def _drift(drift: Drift | None) -> str:
    if drift is None:
        return ""
    if drift.buckets < 2:
        return '<span class="soft">-</span>'
    return _alarm(f"{drift.divergence:.2g}", True) if drift.excess > 0 else '<span class="soft">chance</span>'


def _details(feature: Feature, link: str, open_: bool) -> str:
    """Everything about a feature."""
    inside, pair = (_ids(feature), "") if isinstance(feature, Categorical) else (_numeric(feature), " pair")
    what = feature.kind.replace("_", "-")
    if isinstance(feature, Categorical):
        what += f", {feature.rows:,} rows"
        if feature.table is not None:
            what += f" of the table of {shown(feature.table)}"
    if feature.way:
        what += f"; {shown(feature.way)}"
    alarm = " <span class=alarm>drifted</span>" if _excess(feature) > 0 else ""
    return (
        f"<details{' open' if open_ else ''}><summary><span class=name>{shown(feature.name)}</span> "
        f'<small>{what}</small>{alarm}</summary><div class="inside{pair}" id="{link}">{"".join(inside)}</div></details>'
    )


def _ids(feature: Categorical) -> Iterator[str]:
    if feature.curve:
        tops = ", ".join(f"{percent(share)} by the top {top}" for top, share in feature.top.items() if share < 1)
        yield f"<div><h3>Frequency of ids</h3>{charts.frequencies('frequency of ids by rank', feature.curve)}"
        yield f"<small>of {shown(feature.base)}: {tops or 'at most 1 id'}</small></div>"
    lists = {split: own.lengths for split, own in feature.splits.items() if own.lengths is not None}
    if lists:
        yield f"<div><h3>Lengths of lists</h3>{_lengths(lists)}</div>"
    weights = {split: own.weights for split, own in feature.splits.items() if own.weights is not None}
    if weights:
        drawn = charts.histogram("weights", feature.weight_edges, [w.histogram for w in weights.values()], "weight")
        yield f"<div><h3>Weights</h3>{drawn}</div>"
    if feature.frequent:
        rows = [[f"{one.row:,}", percent(one.share)] for one in feature.frequent]
        if known := any(one.value is not None for one in feature.frequent):
            rows = [[shown(_short(one.value or "")), *row] for one, row in zip(feature.frequent, rows, strict=True)]
        head = [*["value"] * known, "row", "share"]
        yield f'<div class="scroll"><h3>Most frequent</h3>{grid(head, rows)}</div>'
    head = ["split", "values", "distinct", "missing", "unknown", "row 0", "drift", "by chance up to"]
    extra = ["mean length", "longest"] if lists else []
    invalid = any(own.invalid for own in feature.splits.values())
    rows = []
    for split, own in feature.splits.items():
        row = [shown(split), f"{own.values:,}", f"{own.distinct:,}", _share(own.missing), _share(own.unknown)]
        row += [percent(own.row_0), *_drift_cells(feature.drift.get(split))]
        row += [f"{own.lengths.mean:.3g}", f"{own.lengths.longest:,}"] if own.lengths is not None else []
        rows.append(row + ([_alarm(f"{own.invalid:,}", own.invalid > 0)] if invalid else []))
    yield f'<div class="wide scroll">{grid(head + extra + ["invalid"] * invalid, rows)}'
    if feature.sharing is not None:
        yield f"<small>Hashed: {percent(feature.sharing)} of its distinct values share a row with another.</small>"
    yield "</div>"


def _lengths(lists: Mapping[str, Lengths]) -> str:
    """Lists by length; long ones in bins of several lengths."""
    longest = max(len(own.histogram) for own in lists.values())
    step = -(-longest // _LIST_BINS)
    bins = -(-longest // step)
    counts = [[sum(own.histogram[i * step : (i + 1) * step]) for i in range(bins)] for own in lists.values()]
    return charts.histogram("lengths of lists", [i * step - 0.5 for i in range(bins + 1)], counts, "length")


def _numeric(feature: Numeric) -> Iterator[str]:
    counts = [own.histogram for own in feature.splits.values()]
    yield f"<div><h3>Histogram</h3>{charts.histogram('histogram', feature.edges, counts, 'value')}"
    yield "<small>the first and the last bin hold what lies further out</small></div>"
    head = ["split", "missing", "mean", "deviation", "least", "1 %", "25 %", "median", "75 %", "99 %", "most", "drift",
            "by chance up to"]  # fmt: skip
    invalid = any(own.invalid for own in feature.splits.values())
    rows = [
        [shown(split), *_number_cells(own), *_drift_cells(feature.drift.get(split))]
        + ([_alarm(f"{own.invalid:,}", own.invalid > 0)] if invalid else [])
        for split, own in feature.splits.items()
    ]
    yield f'<div class="scroll">{grid(head + ["invalid"] * invalid, rows)}</div>'


def _number_cells(own: Numbers) -> list[str]:
    shown = [own.mean, own.deviation, own.least, *(own.quantiles[q] for q in ("0.01", "0.25", "0.5", "0.75", "0.99"))]
    return [_share(own.missing), *(f"{value:.4g}" for value in [*shown, own.most])]


def _drift_cells(drift: Drift | None) -> list[str]:
    if drift is None or drift.buckets < 2:
        return ["", ""]
    return [_alarm(f"{drift.divergence:.2g}", drift.excess > 0), f"{drift.noise:.2g}"]


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:39]}…"
