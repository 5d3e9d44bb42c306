"""`bench.py towers`: its picture shows every variant over every link, the unshaped one last; its ratios have aims."""

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from tools.benchmarks import towers_plot
from tools.benchmarks.towers import BITS_16, CONTESTANTS, IN_16_BITS, LINKS, LINKS_IN_16_BITS, ratios


def test_lines_and_links(tmp_path: Path) -> None:
    rows = [
        {"model": "dlrm", "variant": variant, "link_gbit": link, "step_ms": 9.0 + link, "exchange_ms": 3.0}
        for variant in ("flat", "torchrec flat")
        for link in (0.0, 0.25, 1.0)
    ]
    half = {"model": "dlrm", "variant": "flat, 16-bit messages", "link_gbit": 1.0, "step_ms": 5.0, "exchange_ms": 2.0}
    rows.append(half)
    axes = Figure().add_subplot()
    towers_plot._panel(axes, rows, "step_ms")
    assert [line.get_label() for line in axes.lines] == ["flat", "torchrec flat", half["variant"]]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.25", "1", "unshaped"]
    assert list(axes.lines[0].get_ydata()) == [9.25, 10.0, 9.0]
    assert (list(axes.lines[2].get_xdata()), list(axes.lines[2].get_ydata())) == ([1], [5.0])
    towers_plot.plot(rows, tmp_path / "towers.png")
    assert (tmp_path / "towers.png").read_bytes().startswith(b"\x89PNG")


def test_ratios_and_their_aims() -> None:
    step = {"flat": 600.0, "tower": 610.0, "tower, compression 4": 300.0, "torchrec flat": 660.0}
    rows = [
        {"model": model, "variant": v, "link_gbit": link, "step_ms": step.get(v, 200.0), "exchange_ms": 50.0}
        for model, variants in CONTESTANTS.items()
        for link in LINKS
        for v in variants
    ]
    rows += [
        {
            "model": model,
            "variant": v,
            "link_gbit": link,
            "step_ms": step[v.removesuffix(BITS_16)] / 2,
            "exchange_ms": 1.0,
        }
        for model, variants in IN_16_BITS.items()
        for link in LINKS_IN_16_BITS
        for v in variants
    ]
    found, aims = ratios(rows)
    assert found["step_compression_4_over_torchrec_at_0.25"] == pytest.approx(2.2)
    assert found["step_compression_8_over_torchrec_at_1"] == pytest.approx(3.3)
    assert found["wukong_step_compression_4_over_flat_at_0.25"] == pytest.approx(2.0)
    assert found["wukong_sptt_over_flat_unshaped"] == pytest.approx(610 / 600)
    assert found["flat_over_torchrec_at_0.25_in_16_bits"] == pytest.approx(600 / 660)
    assert aims["sptt_over_flat_at_2.5"] == "at most 1.05"
    assert aims["flat_over_torchrec_unshaped"] == "at most 0.95"
    assert aims["step_compression_8_over_torchrec_at_0.25"] == "at least 2.8"
    links, halves = len(LINKS), len(LINKS_IN_16_BITS)
    assert len(aims) == 7 + 2 * links + links
    assert len(found) == len(aims) + 4 + 2 * halves, "the same in 16 bits, where both were measured"
    assert ratios([row for row in rows if row["variant"] == "flat"]) == ({}, {})
