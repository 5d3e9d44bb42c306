"""The writers behind DeepSpeed's monitor: each gets the same points, and one that fails ends without the run."""

import csv
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from deepspeed.monitor.monitor import MonitorMaster
from deepspeed.runtime.config import get_monitor_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megarec.config.deepspeed import monitor_sections
from megarec.dense.monitor import Monitor


@pytest.fixture
def tracked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, float, int]]:
    """What stand-ins for wandb and comet_ml, which are not installed, are given: (service, tag, value, step)."""
    seen: list[tuple[str, str, float, int]] = []

    def log(data: dict[str, float], step: int, commit: bool | None = None) -> None:
        seen.extend(("wandb", tag, value, step) for tag, value in data.items())

    class Experiment:
        def __internal_api__log_metric__(self, name: str, value: float, step: int) -> None:
            seen.append(("comet", name, value, step))

    wandb = SimpleNamespace(init=lambda **_: None, log=log)
    comet = SimpleNamespace(start=lambda **_: Experiment())
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "comet_ml", comet)
    for module in ("wandb", "comet"):
        monkeypatch.setattr(f"deepspeed.monitor.{module}.check_{module}_availability", lambda: None)
    return seen


def opened(monkeypatch: pytest.MonkeyPatch, directory: Path, section: dict[str, Any], rank: int = 0) -> Any:
    """DeepSpeed's own monitor of a section."""
    for module in ("monitor", "tensorboard", "csv_monitor", "wandb", "comet"):
        monkeypatch.setattr(f"deepspeed.monitor.{module}.dist", SimpleNamespace(get_rank=lambda: rank))
    return MonitorMaster(get_monitor_config(monitor_sections(section, directory)))


def events(directory: Path) -> EventAccumulator:
    found: EventAccumulator = EventAccumulator(str(directory), size_guidance={"scalars": 0}).Reload()
    return found


def test_every_writer_of_the_section_gets_the_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracked: list[tuple[str, str, float, int]]
) -> None:
    section = {name: {"enabled": True} for name in ("csv_monitor", "wandb", "comet")}
    master = opened(monkeypatch, tmp_path, section)
    monitor = Monitor(master)
    assert not master.enabled, "the engine would write points of its own"
    for step in (20, 40):
        monitor.scalars(step, {"train/logloss": 10.0 / step, "train/gradient_norm": None})
    assert [(p.step, p.value) for p in events(tmp_path / "tensorboard").Scalars("train/logloss")] == [
        (20, 0.5),
        (40, 0.25),
    ]
    rows = list(csv.reader((tmp_path / "csv/train_logloss.csv").open()))
    assert rows == [["step", "logloss"], ["20", "0.5"], ["40", "0.25"]]
    for service in ("wandb", "comet"):
        assert [p[1:] for p in tracked if p[0] == service] == [("train/logloss", 0.5, 20), ("train/logloss", 0.25, 40)]
    assert {path.name for path in (tmp_path / "csv").iterdir()} == {"train_logloss.csv"}


def test_tensorboard_is_on_unless_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = Monitor(opened(monkeypatch, tmp_path / "on", {}))
    monitor.text("config", "{}")
    monitor.layout({"Quality": {"train/auc": ["Multiline", ["train/auc"]]}})
    monitor.histogram(1, "workload/rows_used/tables_of_rank_0", [0.25, 1.0])
    monitor.hyper_parameters({"model.layers": 3, "model.name": "wukong", "model.bias": True, "train.seed": 1})
    monitor.flush()
    found = events(tmp_path / "on/tensorboard")
    assert found.Tags()["histograms"] == ["workload/rows_used/tables_of_rank_0"]
    assert {"config/text_summary", "custom_scalars__config__", "_hparams_/session_start_info"} <= set(
        found.summary_metadata
    )
    assert "_hparams_/experiment" not in found.summary_metadata, "TensorBoard would show the columns of one run"
    named = Monitor(opened(monkeypatch, tmp_path, {"tensorboard": {"job_name": "mine"}}))
    named.flush()
    assert (tmp_path / "mine").is_dir()
    for section, rank in (({"tensorboard": {"enabled": False}}, 0), ({}, 1)):
        monitor = Monitor(opened(monkeypatch, tmp_path / "off", section, rank))
        monitor.scalars(1, {"train/logloss": 0.5})
        monitor.text("config", "{}")
        monitor.flush()
        assert not (tmp_path / "off").exists()


def points(directory: Path) -> list[tuple[int, float]]:
    return [(point.step, round(point.value, 3)) for point in events(directory / "tensorboard").Scalars("train/auc")]


def rows(path: Path) -> list[list[str]]:
    return list(csv.reader(path.open()))


def test_a_curve_has_one_point_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run, a resume from an earlier step with a rollback in it, and a run from scratch in the same place."""
    section = {"csv_monitor": {"enabled": True}}
    monitor = Monitor(opened(monkeypatch, tmp_path, section))
    assert not list(tmp_path.rglob("events*")), "nothing lies there before the run knows where it starts"
    monitor.start(0)
    for step in (10, 20, 30):
        monitor.scalars(step, {"train/auc": 0.5})
    monitor.flush()
    assert points(tmp_path) == [(10, 0.5), (20, 0.5), (30, 0.5)]

    resumed = Monitor(opened(monkeypatch, tmp_path, section))
    resumed.start(10)
    for step in (20, 30):
        resumed.scalars(step, {"train/auc": 0.6})
    resumed.start(20)
    resumed.scalars(30, {"train/auc": 0.7})
    resumed.flush()
    assert points(tmp_path) == [(10, 0.5), (20, 0.6), (30, 0.7)]
    assert rows(tmp_path / "csv/train_auc.csv") == [["step", "auc"], ["10", "0.5"], ["20", "0.6"], ["30", "0.7"]]

    fresh = Monitor(opened(monkeypatch, tmp_path, section))
    fresh.start(0)
    fresh.scalars(10, {"train/auc": 0.8})
    fresh.flush()
    assert points(tmp_path) == [(10, 0.8)]
    assert rows(tmp_path / "csv/train_auc.csv") == [["step", "auc"], ["10", "0.8"]]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread
def test_a_full_disk_ends_tensorboard_and_not_the_run(
    small_disk: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before, disk = set(threading.enumerate()), small_disk("size=64k")
    monitor = Monitor(opened(monkeypatch, disk, {}))
    monitor.scalars(1, {"train/logloss": 0.5})
    (disk / "filler").write_bytes(b"x" * (64 * 1024 - 12 * 1024))
    for step in range(2_000):
        monitor.scalars(step, {"train/logloss": 0.5})
    monitor.flush()
    monitor.scalars(2_001, {"train/logloss": 0.5})
    for thread in set(threading.enumerate()) - before:
        thread.join()
    assert caplog.messages == ["TENSORBOARD ENDS HERE, THE RUN GOES ON: No space left on device"]
    assert caplog.records[0].levelname == "WARNING"


def test_a_tag_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint of a stranger may name its causes of skipped steps as it likes."""
    monitor = Monitor(opened(monkeypatch, tmp_path / "out", {"csv_monitor": {"enabled": True}}))
    for number, cause in enumerate(["../../../victim", "/victim", "a\0b", "a" * 3_000]):
        monitor.scalars(number, {f"train/skipped_steps/{cause}": 1.0})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert all("victim" not in str(path.relative_to(tmp_path).parent) for path in tmp_path.rglob("*"))
