"""The picture of `bench.py towers` shows every variant over every link, the unshaped one last."""

from pathlib import Path

from matplotlib.figure import Figure

from tools.benchmarks import towers_plot


def test_lines_and_links(tmp_path: Path) -> None:
    rows = [
        {"model": "dlrm", "variant": variant, "link_gbit": link, "step_ms": 9.0 + link, "exchange_ms": 3.0}
        for variant in ("flat", "torchrec flat")
        for link in (0.0, 0.25, 1.0)
    ]
    axes = Figure().add_subplot()
    towers_plot._panel(axes, rows, "step_ms")
    assert [line.get_label() for line in axes.lines] == ["flat", "torchrec flat"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.25", "1", "unshaped"]
    assert list(axes.lines[0].get_ydata()) == [9.25, 10.0, 9.0]
    towers_plot.plot(rows, tmp_path / "towers.png")
    assert (tmp_path / "towers.png").read_bytes().startswith(b"\x89PNG")
