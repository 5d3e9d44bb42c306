"""The timeline: no stream overlaps itself, pieces wait for what they depend on, and it takes as long as the plan."""

import json
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megarec.config.load import load_config
from megarec.data.schema import schema_of
from megarec.planning.hardware import load_hardware
from megarec.planning.page import page
from megarec.planning.planner import Plan, plan_run
from megarec.planning.search import Search, Specs, choose
from megarec.planning.sweep import sweeps
from megarec.planning.trace import STEPS, streams_of, trace_events, write_trace

ROOT = Path(__file__).resolve().parents[2]
DLRM, WUKONG = "ds_configs/dlrm-criteo-terabyte.json", "ds_configs/ladder/wukong-0.53gflop.json"
CASES = [
    (DLRM, "h100", (1, 8), []),
    (DLRM, "h100", (4, 8), ["deepspeed.zero_optimization.stage=2", "deepspeed.zero_optimization.overlap_comm=true"]),
    (DLRM, "a100", (2, 4), ["deepspeed.gradient_accumulation_steps=4", "deepspeed.zero_optimization.stage=3"]),
    (DLRM, "epyc-2-cores", (2, 2), ["data.batch_size=4096"]),
    (DLRM, "h100", (2, 8), ["parallel.exchange=tower", "parallel.towers=4",
                            'tower_module={"name": "dlrm", "compression": 4}']),
    (WUKONG, "h100", (4, 8), ["parallel.tensor=2", "parallel.overlap=false"]),
]  # fmt: skip


def plan_of(case: tuple[str, str, tuple[int, int], list[str]]) -> Plan:
    config = load_config(ROOT / case[0], ["embedding.placement=auto", *case[3]])
    return plan_run(config, Specs(schema_of(config.data)).of(config), load_hardware(case[1]), *case[2])


@pytest.mark.parametrize("case", CASES)
def test_the_trace_is_the_plan(case: tuple[str, str, tuple[int, int], list[str]], tmp_path: Path) -> None:
    plan = plan_of(case)
    found = plan.timeline
    by_name = {run.piece.name: run for run in found.runs}
    assert len(by_name) == len(found.runs) == len(plan.pieces)
    assert max(run.end for run in found.runs) == pytest.approx(found.seconds)
    assert sum(found.exposed.values()) == pytest.approx(found.seconds)
    for run in found.runs:
        assert run.end - run.start == pytest.approx(run.piece.seconds, abs=1e-12)
        for name in run.piece.after:
            assert by_name[name].end <= run.start + 1e-12, f"{run.piece.name} waits for {name}"
        for name in run.piece.after_last:
            assert by_name[name].end - found.seconds <= run.start + 1e-12

    write_trace(plan, tmp_path / "step.json")
    read = json.loads((tmp_path / "step.json").read_text())
    assert read == json.loads(json.dumps(trace_events(plan)))
    slices = [event for event in read["traceEvents"] if event["ph"] == "X"]
    assert len(slices) == STEPS * sum(run.end > run.start for run in found.runs)
    for thread in range(len(streams_of(found))):
        own = sorted((event for event in slices if event["tid"] == thread), key=lambda event: event["ts"])
        assert own, "a stream without work is no thread"
        for before, after in pairwise(own):
            assert before["ts"] + before["dur"] <= after["ts"] + 0.01, "a stream overlaps itself"
    ends = [max(e["ts"] + e["dur"] for e in slices if e["args"]["step"] == step) for step in range(STEPS)]
    assert ends[1] - ends[0] == pytest.approx(1e6 * plan.seconds, abs=0.01)
    arrows = [event for event in read["traceEvents"] if event["ph"] in "sf"]
    starts = {event["id"]: event["ts"] for event in arrows if event["ph"] == "s"}
    assert all(starts[event["id"]] <= event["ts"] + 0.01 for event in arrows if event["ph"] == "f")


class _Parsed(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "path", "rect", "circle", "polyline", "br"):
            self.open.append(tag)
        self.outside += [
            str(value) for name, value in attrs if name in ("src", "href") and not str(value).startswith("#")
        ]
        assert tag != "script"

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()


def test_page_in_light_and_dark(tmp_path: Path) -> None:
    """It needs nothing from outside, and a browser draws it: dark is dark, and all sections are there."""
    config = load_config(ROOT / DLRM, [])
    schema = schema_of(config.data)
    h100 = load_hardware("h100")
    chosen = choose(Search(config, Specs(schema), h100, 2, 8))
    assert chosen.best.plan is not None
    curves = sweeps(chosen.best.config, schema, h100, 2, 8, on=(1, 4))
    assert {curve.axis for curve in curves} >= {"hosts", "examples a step", "stage", "compression"}
    strong = curves[0]
    assert strong.points[0].efficiency == 1 and [p.at for p in strong.points] == sorted(p.at for p in strong.points)
    here = next(point for point in strong.points if point.at == 2)
    assert here.seconds == chosen.best.plan.seconds
    text = page(chosen.best.plan, curves, chosen)
    assert text == page(chosen.best.plan, curves, chosen)
    parsed = _Parsed()
    parsed.feed(text)
    assert not parsed.open and not parsed.outside and "url(" not in text and "@import" not in text
    for section in ("The choice", "Timeline of a rank", "Memory of the largest rank", "Bytes that a rank sends"):
        assert section in text
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here")
    (tmp_path / "plan.html").write_text(text)
    backs = []
    for scheme in (1, 0):
        picture = tmp_path / f"{scheme}.png"
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--blink-settings=preferredColorScheme={scheme}", f"--user-data-dir={tmp_path / 'profile'}"]
        command += ["--window-size=1200,2400", f"--screenshot={picture}", (tmp_path / "plan.html").as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        with Image.open(picture) as image:
            pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
        backs.append(pixels[0].mean())
        colours, counts = np.unique(pixels, axis=0, return_counts=True)
        strong_colours = colours[(counts > 50) & (np.ptp(colours.astype(int), axis=1) > 60)]
        assert len(strong_colours) >= 4, "the timeline's parts are drawn in their colours"
    assert backs[0] > 240 and backs[1] < 40
