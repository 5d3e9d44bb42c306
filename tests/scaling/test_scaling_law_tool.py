"""tools/scaling_law.py: the keys of its JSON, its refusals, and files that stand alone."""

import json
import re
import runpy
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools/scaling_law.py"
SMALL = "model,train_gflop_per_example,seed,logloss\n" + "".join(
    f"{model}-{cost}gflop,{cost},{seed},{loss + seed / 1000}\n"
    for model, losses in {"wukong": (0.5, 0.48, 0.46), "<dnn>": (0.52, 0.51, 0.51)}.items()
    for cost, loss in zip((1, 4, 16), losses, strict=True)
    for seed in (1, 2)
)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
    runpy.run_path(str(TOOL), run_name="__main__")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "runs.csv"
    path.write_text(SMALL, encoding="utf-8")
    return path


def test_fit_json_of_the_published_ladder(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "fit", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["law"] is True
    assert found["family"] == "wukong"
    assert found["exponent"] == pytest.approx(-0.00071, rel=0.05)
    assert found["exponent_interval"][0] < found["exponent"] < found["exponent_interval"][1] < 0
    assert found["points"] == 7
    assert 0 < found["extrapolation_error"] < 0.1
    assert {name: family["law"] for name, family in found["families"].items()} == {
        "wukong": True,
        "dlrm": False,
        "dcnv2": False,
    }
    assert found["families"]["dlrm"]["large_end"]["verdict"] == "saturated"
    times = {row["family"]: row["times_between_points"] for row in found["equal_quality"]}
    assert times["dcnv2"] == pytest.approx(40, rel=0.1)


def test_too_little_is_not_called_a_law(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "fit", "--points", small, "--json")
    found = json.loads(capsys.readouterr().out)
    assert (found["law"], found["exponent"], found["exponent_interval"]) == (False, None, None)
    assert found["reason"] == "3 sizes measured, a law needs 4"
    assert found["equal_quality"][0]["needed_by_law"] is None
    run(monkeypatch, "fit", "--points", small)
    text = capsys.readouterr().out
    assert "not called a law: 3 sizes measured, a law needs 4" in text
    assert not re.search(r"^ *exponent", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--against", "parameters"), "no column parameters"),
        (("--family", "dlrm"), "no measured family dlrm; there are wukong, <dnn>"),
        (("--quality", "ne"), "no column ne"),
    ],
)
def test_what_is_not_there_exits_with_2(
    small: Path,
    options: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as raised:
        run(monkeypatch, "fit", "--points", small, *options)
    assert raised.value.code == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


class References(HTMLParser):
    """Collects whatever would make a browser load something."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            inside = (value or "").startswith("#")
            if name in ("src", "href", "xlink:href", "srcset", "data", "action") and not inside:
                self.loaded.append(f"{tag} {name}={value}")


def test_plot_writes_files_that_stand_alone(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "figures"
    run(monkeypatch, "plot", "--points", small, "--output", output, "--tensorboard", tmp_path / "tensorboard")
    names = ["report.html", "scaling_law.png", "scaling_law.svg"]
    assert sorted(path.name for path in output.iterdir()) == names
    assert sorted(Path(line).name for line in capsys.readouterr().out.splitlines()) == names
    assert (output / "scaling_law.png").read_bytes().startswith(b"\x89PNG")
    page = (output / "report.html").read_text(encoding="utf-8")
    references = References()
    references.feed(page)
    assert references.loaded == []
    assert {"svg", "path", "table"} <= references.tags
    assert not references.tags & {"link", "script", "img", "iframe", "dnn"}
    assert "@import" not in page
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)]*)", page))
    assert (output / "scaling_law.svg").read_text(encoding="utf-8") in page
    assert "not called a law" in page
    assert len(logged_images(tmp_path / "tensorboard")) == 1


def logged_images(directory: Path) -> list[object]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory)).Reload()
    assert events.Tags()["images"] == ["scaling_law/wukong"]
    return list(events.Images("scaling_law/wukong"))


def test_the_same_points_give_the_same_files(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two"):
        run(monkeypatch, "plot", "--points", small, "--output", tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_output_that_cannot_be_a_directory_exits_with_2(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        run(monkeypatch, "plot", "--points", small, "--output", small)
    assert raised.value.code == 2
    assert "cannot be written" in capsys.readouterr().err
