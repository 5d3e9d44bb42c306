"""A scaling study as text, and as one HTML page that needs no other file.

`write_report` writes the figure twice and the page; `log_image` shows it in TensorBoard.
"""

import math
from html import escape
from pathlib import Path

import numpy as np

from megarec.errors import UserError
from megarec.files import write_whole
from megarec.scaling.law import SIGNIFICANT_PERCENT, Law, NoLaw, size_means
from megarec.scaling.plot import LABEL, as_png, as_svg, draw, pixels
from megarec.scaling.points import UNIT
from megarec.scaling.study import EqualQuality, Study

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ max-width: 60rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 sans-serif }}
svg {{ width: 100%; height: auto }}
table {{ border-collapse: collapse; margin: 1rem 0 }}
th, td {{ border: 1px solid #ccc; padding: .2rem .6rem; text-align: left }}
</style>
<h1>{title}</h1>
{figure}
{families}
<h2>Runs</h2>
{runs}
</html>
"""
VERDICTS = {
    "improves": "still improves",
    "saturated": "saturated: more is not seen to help",
    "open": "unclear, its runs scatter too much",
}


def sentences(result: Study) -> dict[str, list[str]]:
    """Findings by heading: every family, then what equal quality costs."""
    found = {name: _family(result, name) for name in result.points.families}
    if result.comparisons:
        found["equal quality"] = [_equal(result, comparison) for comparison in result.comparisons]
    return found


def title(result: Study) -> str:
    return f"{result.points.source}: {LABEL[result.points.quality]} against {UNIT[result.points.axis]}"


def as_html(result: Study, svg: str) -> str:
    """One page; the figure is part of it."""
    blocks = []
    for heading, lines in sentences(result).items():
        items = "".join(f"<li>{escape(line)}</li>" for line in lines)
        blocks.append(f"<h2>{escape(heading)}</h2>\n<ul>{items}</ul>")
    head = f"<tr><th>family</th><th>{UNIT[result.points.axis]}</th><th>{LABEL[result.points.quality]}</th></tr>"
    rows = "\n".join(
        f"<tr><td>{escape(name)}</td><td>{run.cost:g}</td><td>{_quality(result, run.loss)}</td></tr>"
        for name, runs in result.points.families.items()
        for run in runs
    )
    return PAGE.format(
        title=escape(title(result)), figure=svg, families="\n".join(blocks), runs=f"<table>{head}\n{rows}</table>"
    )


def _family(result: Study, name: str) -> list[str]:
    law, end, unit = result.laws[name], result.ends[name], UNIT[result.points.axis]
    lines = [f"not called a law: {law.reason}"] if isinstance(law, NoLaw) else _law(result, law)
    if unmeasured := result.points.unmeasured.get(name):
        costs = ", ".join(f"{cost:g}" for cost in unmeasured)
        lines.append(f"rows without a quality, left out: {costs} {unit}")
    if result.points.optimum is not None:
        lines.append(_above(result, name, result.points.optimum))
    if end is not None:
        noise = "by its seeds" if end.noise == "seeds" else f"differences up to {SIGNIFICANT_PERCENT} % taken for noise"
        lines.append(
            f"large end, {end.span[0]:g} to {end.span[1]:g} {unit}: local exponent {end.slope:.3g} "
            f"{_interval(end.interval)} ({noise}): {VERDICTS[end.verdict]}"
        )
    return lines


def _law(result: Study, law: Law) -> list[str]:
    curve, unit = law.curve, UNIT[result.points.axis]
    constant = f" + {curve.constant:.6g}" if law.form == "power+constant" else ""
    what = {"seeds": "the seeds of each size", "residuals": "the sizes' residuals"}[law.bootstrap.resampled]
    # What is significant is a share of the LogLoss, not of what lies above its optimum.
    reference = result.points.quality != "excess_logloss"
    significance = (
        f": {abs(law.per_step) / SIGNIFICANT_PERCENT:.1f} times the {SIGNIFICANT_PERCENT} % that counts as significant"
    )
    lines = [
        f"law over {law.sizes} sizes and {law.runs} runs, {law.span[0]:g} to {law.span[1]:g} {unit} "
        f"({law.span[1] / law.span[0]:.3g}x): L = {curve.coefficient:.6g} C^{curve.exponent:.3g}{constant}",
        f"exponent {curve.exponent:.3g}, 95 % interval {_interval(law.exponent_interval)} "
        f"({len(law.bootstrap.curves)} refits, resampling {what})",
        f"the next 4x changes the loss by {law.per_step:+.3f} % [{law.per_step_interval[0]:+.3f}, "
        f"{law.per_step_interval[1]:+.3f}]{significance if reference else ''}",
        _forms(law),
    ]
    for held in law.held_out:
        errors = ", ".join(
            f"{percent:+.3f} % at {cost:g}" for cost, percent in zip(held.costs, held.percents, strict=True)
        )
        beside = "within" if max(map(abs, held.percents)) <= SIGNIFICANT_PERCENT else "above"
        lines.append(
            f"held out and predicted by the smaller sizes ({held.form}): {errors} {unit}"
            f"{f', {beside} {SIGNIFICANT_PERCENT} %' if reference else ''}"
        )
    if law.extrapolation_error is None:
        lines.append("too few sizes to hold one out")
    return lines


def _above(result: Study, name: str, optimum: float) -> str:
    """How far a family's best size stays from the optimum, and by its law's constant."""
    best = min(means := size_means(*np.array(result.points.families[name], dtype=np.float64).T)[1])
    text = f"optimum {optimum:.5f}: its best size loses {best - optimum:.5f} more ({100 * (best / optimum - 1):.2f} %)"
    return text if len(means) == 1 else f"{text}, its worst {max(means) - optimum:.5f}"


def _forms(law: Law) -> str:
    plain = law.fits["power"]
    other = law.fits["power+constant"]
    if plain.aicc is None or other.aicc is None:
        return "power: there are too few points to tell whether a constant loss remains"
    better = abs(plain.aicc - other.aicc)
    return (
        f"AICc {plain.aicc:.1f} for power, {other.aicc:.1f} for power+constant (exponent {other.curve.exponent:.3g}, "
        f"constant {other.curve.constant:.4g}): {law.form} is better by {better:.1f}"
        f"{'' if law.forms_differ else ', too little to tell them apart'}"
    )


def _equal(result: Study, comparison: EqualQuality) -> str:
    unit, reference = UNIT[result.points.axis], result.family
    loss = _quality(result, comparison.loss)
    text = f"{comparison.family}'s best, {loss} at {comparison.cost:g} {unit}: "
    if comparison.between is None:
        text += f"no measured sizes of {reference} enclose it"
    else:
        text += (
            f"{reference} reaches it at {comparison.between:.3g} between its points, "
            f"{_times(comparison.cost / comparison.between)}"
        )
    if comparison.by_law is None or comparison.by_law_interval is None:
        return text
    if comparison.by_law == math.inf:
        return f"{text}; by its law {reference} never reaches it"
    if comparison.times_by_law is None:
        return f"{text}; its law is too flat to say where {reference} reaches it"
    low, high = (f"{cost:.3g}" if math.isfinite(cost) else "never" for cost in comparison.by_law_interval)
    outside = ", outside its sizes" if comparison.extrapolated else ""
    return f"{text}; by its law at {comparison.by_law:.3g} [{low}, {high}], {_times(comparison.times_by_law)}{outside}"


def _times(ratio: float) -> str:
    return f"{ratio:.1f}x less" if ratio >= 1 else f"{1 / ratio:.1f}x more"


def _quality(result: Study, loss: float) -> str:
    if result.points.quality == "relative_logloss_percent":
        return f"{100 * (loss - 1):.2f} %"
    return f"{loss:.5f}"


def _interval(interval: tuple[float, float]) -> str:
    return f"[{interval[0]:.3g}, {interval[1]:.3g}]"


def write_report(result: Study, directory: Path) -> list[Path]:
    """Write scaling_law.png, scaling_law.svg and report.html, each whole or not at all.

    Raises:
        UserError: they cannot be written.
    """
    svg = as_svg(draw(result))
    contents = {
        "scaling_law.png": as_png(draw(result)),
        "scaling_law.svg": svg.encode(),
        "report.html": as_html(result, svg).encode(),
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            write_whole(directory / name, content)
    except OSError as error:
        raise UserError(f"{directory}: cannot be written ({error.strerror or error})") from error
    return [directory / name for name in contents]


def log_image(result: Study, directory: Path) -> None:
    """The figure as TensorBoard's image `scaling_law/<family>`.

    Raises:
        UserError: nothing can be written there.
    """
    from torch.utils.tensorboard import SummaryWriter  # takes seconds to load

    try:
        with SummaryWriter(str(directory)) as writer:
            writer.add_image(f"scaling_law/{result.family}", pixels(draw(result)), dataformats="HWC")
    except OSError as error:
        raise UserError(f"{directory}: cannot be written ({error.strerror or error})") from error
