"""A sweep killed at any moment ends with the table of an unbroken one; failures are reported; hosts of a hostfile."""

import fcntl
import json
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from megarec.errors import UserError
from megarec.launching.hosts import Host
from megarec.ray_cluster import RayCluster
from megarec.scaling.grid import read_grid
from megarec.scaling.law import NoLaw
from megarec.scaling.points import read_points
from megarec.scaling.results import Rows
from megarec.scaling.study import study
from megarec.scaling.sweep import command_of, environment_of, local_slots, slots_of, slots_on
from tests.scaling.studies import WUKONG, write_study

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools/scaling_law.py"
FAKE = Path(__file__).with_name("fake_train.py")
RATES = [{"dense.learning_rate": 0.01}, {"dense.learning_rate": 0.001}]
QUALITY = ["model", "seed", "rate", "config_hash", "steps", "logloss", "auc", "valid_logloss", "chosen"]
# The tool with another trainer.
FAKED = f"""
import runpy, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from megarec.scaling import sweep
sweep.TRAIN, sweep._POLL_SECONDS = Path({str(FAKE)!r}), 0.02
sys.argv[0] = {str(TOOL)!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
MODELS = {"wukong-1": {"model": WUKONG}, "wukong-2": {"model": {**WUKONG, "layers": 2}}}


def start(path: Path, output: Path, *options: str, real: bool = False, pace: bool = True) -> "subprocess.Popen[str]":
    tool = [str(TOOL)] if real else ["-c", FAKED]
    command = [sys.executable, *tool, "sweep", "--study", str(path), "--output", str(output)]
    stated = ["--gflop-per-second", "1"] if pace and not real else []
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *stated, *options], **pipes)  # type: ignore[call-overload, no-any-return]


def run_here(path: Path, output: Path, *options: str, pace: bool = True) -> None:
    """As `start`, to its end, in this process: which has loaded torch, as the sweep must."""
    argv = [str(TOOL), "sweep", "--study", str(path), "--output", str(output), *options]
    argv += ["--gflop-per-second", "1"] if pace else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        patch.setattr("megarec.scaling.sweep.TRAIN", FAKE)
        patch.setattr("megarec.scaling.sweep._POLL_SECONDS", 0.02)
        runpy.run_path(str(TOOL), run_name="__main__")


def finish(process: "subprocess.Popen[str]") -> None:
    _, complaints = process.communicate(timeout=250)
    assert process.returncode == 0, complaints


def table(output: Path) -> list[dict[str, Any]]:
    return parquet.read_table(output / "runs.parquet", columns=QUALITY).to_pylist()


def starts(output: Path) -> dict[str, int]:
    return {path.parent.name: len(path.read_text()) for path in (output / "runs").glob("*/starts")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A study of two models, two rates, two seeds, 6 runs, and where an unbroken sweep has run it."""
    directory = tmp_path_factory.mktemp("whole")
    path = write_study(directory, models=MODELS, learning_rates=RATES)
    run_here(path, directory / "out", "--jobs", "2")
    return path, directory / "out"


def test_a_killed_sweep_goes_on_and_gives_the_same_table(whole: tuple[Path, Path], tmp_path: Path) -> None:
    path, unbroken = whole
    assert set(starts(unbroken).values()) == {1} and len(table(unbroken)) == 6
    broken, draw = tmp_path / "broken", random.Random(1)
    for _ in range(2):
        sweep, before = start(path, broken, "--jobs", "2"), len(list(broken.glob("rows/*.json")))
        while len(list(broken.glob("rows/*.json"))) == before:
            assert sweep.poll() is None, sweep.communicate()
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.2))
        sweep.kill()
        sweep.communicate()
        done = {file.stem: starts(broken)[file.stem] for file in (broken / "rows").glob("*.json")}
    run_here(path, broken, "--jobs", "2")
    assert table(broken) == table(unbroken)
    assert {name: starts(broken)[name] for name in done} == done  # none again that had ended
    assert sum(starts(broken).values()) <= 6 + 2 * 2  # a kill costs a new start of what ran, and no more


@pytest.mark.slow  # six processes; shares of an array are proven in test_sweep_array.py as well
def test_tasks_side_by_side_give_the_same_table(
    whole: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Task 3 of 3 never came: it is named, with the command that runs its share."""
    path, unbroken = whole
    output, tasks = tmp_path / "out", []
    for name, value in {"MIN": 0, "MAX": 2, "STEP": 1, "COUNT": 3}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    for number in (0, 1):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(number))
        tasks.append(start(path, output, "--array", pace=False))
    for task in tasks:
        finish(task)
    run_here(path, output, "--array", "2/3", pace=False)  # its other seeds, should task 1 have ended later
    capsys.readouterr()
    with pytest.raises(SystemExit) as raised:
        run_here(path, output)
    printed = capsys.readouterr()
    assert raised.value.code == 2 and "1 of the array's 3 tasks have runs to go, as named above" in printed.err
    (line,) = re.findall("MISSING task 3/3: 2 runs to go: (python .*)", printed.out)
    command = shlex.split(line)
    assert command[:3] == ["python", os.path.relpath(TOOL), "sweep"]
    assert command[3:7] == ["--study", str(path), "--output", str(output)]
    run_here(path, output, *command[7:], pace=False)
    run_here(path, output)
    assert table(output) == table(unbroken) and set(starts(output).values()) == {1}


@pytest.mark.slow
@pytest.mark.timeout(3_600)
@pytest.mark.parametrize("real", [False, True])
def test_twenty_kills_at_random_moments(tmp_path: Path, real: bool) -> None:
    path = write_study(tmp_path, models=MODELS, learning_rates=RATES)
    options = ("--jobs", "2", "--gflop-per-second", "1") if real else ("--jobs", "2")
    began = time.time()
    finish(start(path, tmp_path / "whole", *options, real=real))
    takes = time.time() - began
    broken, draw, kills = tmp_path / "broken", random.Random(2), 0
    while kills < 20:
        sweep = start(path, broken, *options, real=real)
        try:
            sweep.communicate(timeout=draw.uniform(1, takes / 2))
        except subprocess.TimeoutExpired:
            sweep.kill()
            sweep.communicate()
            kills += 1
        else:  # done before 20 kills: once more from the start
            assert table(broken) == table(tmp_path / "whole")
            broken = tmp_path / f"broken-after-{kills}"
    finish(start(path, broken, *options, real=real))
    assert table(broken) == table(tmp_path / "whole")


def test_processes_end_with_the_sweep(tmp_path: Path) -> None:
    sweep = start(write_study(tmp_path, models={"a": {"model": WUKONG}}, seeds=[1]), tmp_path / "out")
    folder = tmp_path / "out/runs"
    while not list(folder.glob("*/at-work-*")):
        assert sweep.poll() is None, sweep.communicate()
        time.sleep(0.01)
    (mark,) = folder.glob("*/at-work-*")
    pid = int(mark.name.rpartition("-")[2])
    os.kill(pid, signal.SIGSTOP)  # it cannot end by itself
    sweep.kill()
    sweep.communicate()
    deadline = time.time() + 20
    while Path(f"/proc/{pid}").exists() and time.time() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()


def test_an_end_that_no_sweep_saw_is_taken_in(whole: tuple[Path, Path], tmp_path: Path) -> None:
    path, unbroken = whole
    shutil.copytree(unbroken / "runs", tmp_path / "out/runs")
    run_here(path, tmp_path / "out")
    assert table(tmp_path / "out") == table(unbroken) and set(starts(tmp_path / "out").values()) == {1}
    assert {json.loads(file.read_text())["seconds"] for file in (tmp_path / "out/rows").glob("*.json")} == {None}


def test_two_sweeps_in_one_directory_are_refused_and_a_plan_only_shows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(tmp_path, models=MODELS)
    run_here(path, tmp_path / "out", "--plan", "--budget-gflop", "1e-9")
    printed = capsys.readouterr().out
    assert printed.count("left out: ") == 2 and "0 runs, 1 at a time" in printed
    assert not (tmp_path / "out/runs").exists()
    with (tmp_path / "out/lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SystemExit) as raised:
            run_here(path, tmp_path / "out")
    assert raised.value.code == 2 and "another sweep is at work there" in capsys.readouterr().err


def test_a_sweep_of_another_study_is_set_aside_whole(
    whole: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And goes on where it is the same: an edited file, a file that moved, a directory of before such notes."""
    path, unbroken = whole
    output = tmp_path / "out"
    shutil.copytree(unbroken, output)
    other = write_study(tmp_path / "other", models={"lr": {"model": {"name": "lr", "dim": 4}}}, seeds=[1])
    with pytest.raises(SystemExit) as raised:
        run_here(other, output, "--plan")
    assert raised.value.code == 2 and f"{output}: holds a sweep of the study {path}; choose" in capsys.readouterr().err
    assert table(output) == table(unbroken)

    run_here(other, output)
    assert f"{output}: the sweep of another study there is in {output}/previous now" in capsys.readouterr().out
    assert [row["model"] for row in table(output)] == ["lr"] and table(output / "previous") == table(unbroken)
    assert set(starts(output / "previous").values()) == {1} and len(starts(output)) == 1

    run_here(path, output / "previous")  # a sweep's directory in its own right
    moved = tmp_path / "moved"
    shutil.copytree(path.parent, moved, ignore=lambda *_: ["out"])
    base = json.loads((moved / "base.json").read_text())
    run_here(moved / "study.json", output / "previous")
    (output / "previous/sweep.json").unlink()
    run_here(path, output / "previous")
    assert set(starts(output / "previous").values()) == {1}
    (moved / "base.json").write_text(json.dumps(base | {"train": {**base["train"], "epochs": 2}}))
    run_here(moved / "study.json", output / "previous", "--budget-gflop", "1e-9")
    assert (output / "previous/previous/runs.parquet").is_file()
    (moved / "base.json").write_text(json.dumps(base | {"train": {**base["train"], "epochs": 3}}))
    run_here(moved / "study.json", output / "previous", "--budget-gflop", "1e-9")
    assert not (output / "previous/previous-2").exists()


def test_a_real_sweep_feeds_fit_plot_and_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(tmp_path, models={"wukong-1": {"model": WUKONG}}, seeds=[1])
    finish(start(path, tmp_path / "out", "--gflop-per-second", "1", real=True))
    (trial,) = read_grid(path)
    (row,) = parquet.read_table(tmp_path / "out/runs.parquet").to_pylist()
    assert (row["config_hash"], row["parameters"], row["steps"]) == (trial.config_hash, trial.cost.parameters, 8)
    assert row["examples_per_second"] > 0 and row["seconds"] > 0
    optimum = trial.schema.optimum["test"].drawn
    assert row["optimum_logloss"] == optimum and row["excess_logloss"] == row["logloss"] - optimum
    points = read_points(tmp_path / "out/runs.parquet")
    assert points.optimum == optimum and isinstance(study(points).laws["wukong"], NoLaw)
    tags = logged(tmp_path / "out/runs" / trial.name / "tensorboard")
    assert {"train/logloss", "valid/logloss", "test/logloss"} <= tags["scalars"]
    assert {"_hparams_/session_start_info", "_hparams_/session_end_info"} <= tags["hparams"]
    for command in ("fit", "table"):
        argv = [str(TOOL), command, "--points", str(tmp_path / "out/runs.parquet")]
        monkeypatch.setattr(sys, "argv", argv)
        runpy.run_path(str(TOOL), run_name="__main__")
    printed = capsys.readouterr().out
    assert f"optimum {optimum:.5f}: its best size loses" in printed
    assert f"| wukong-1 | 1 | {row['auc']:.4f} | {row['logloss']:.4f} |" in printed


def logged(directory: Path) -> dict[str, set[str]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory)).Reload()
    return {
        "scalars": set(events.Tags()["scalars"]),
        "hparams": set(events.summary_metadata),
    }


def test_the_rate_that_is_best_on_validation_is_chosen(whole: tuple[Path, Path]) -> None:
    path, output = whole
    rows, trials = table(output), read_grid(path)
    assert len(rows) == 6 and len(read_points(output / "runs.parquet").families["wukong"]) == 4
    for model in MODELS:
        tried = {row["rate"]: row["valid_logloss"] for row in rows if row["model"] == model and row["seed"] == 1}
        best = min(tried, key=lambda rate: tried[rate])
        assert Rows(output, trials).chosen_rate(model) == best
        assert [(row["seed"], row["rate"]) for row in rows if row["model"] == model and row["chosen"]] == [
            (1, best),
            (2, best),
        ]


def test_places_for_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [(slot.host, slot.place) for slot in local_slots(2)] == [(None, 0), (None, 1)]
    slots = slots_of([Host("a", 2, 0), Host("b", 2, 2)])
    assert [(slot.host, slot.place, slot.threads) for slot in slots] == [
        ("a", 0, 1),
        ("a", 1, 1),
        ("b", 0, 1),
        ("b", 1, 1),
    ]
    assert slots_of([Host("a", 1, 0)])[0].threads is None
    monkeypatch.setattr("megarec.scaling.sweep.accelerator", lambda: "cuda")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    places = [*local_slots(2), *slots[:2]]
    assert [environment_of(slot)["CUDA_VISIBLE_DEVICES"] for slot in places] == list("4601")
    with pytest.raises(UserError, match="--jobs above 2, with CUDA_VISIBLE_DEVICES='4,6'"):
        environment_of(local_slots(3)[2])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert [environment_of(slot)["CUDA_VISIBLE_DEVICES"] for slot in local_slots(2)] == list("01")
    assert "DS_ACCELERATOR" not in environment_of(slots[0])  # the host's own, whatever this machine has
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert environment_of(slots[0])["DS_ACCELERATOR"] == "cpu"
    (trial, *_) = read_grid(write_study(tmp_path))
    assert "train.threads=3" not in command_of(trial, tmp_path, 3)  # the base says how many


def test_places_on_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trials = read_grid(write_study(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr("megarec.ray_cluster.importlib.util.find_spec", lambda name: name)
        cluster = RayCluster()
    cluster.nodes = [{"CPU": 4.0, "GPU": 2.0}, {"CPU": 1.0, "GPU": 4.0}, {"CPU": 8.0}]
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr("megarec.scaling.sweep.accelerator", lambda: "cuda")
    slots = slots_on(cluster, trials)
    assert [slot.gpus for slot in slots] == [1, 1, 1]
    assert environment_of(slots[0]).keys().isdisjoint({"CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR"})  # the node's own
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert [slot.gpus for slot in slots_on(cluster, trials)] == [0] * 13
    cluster.nodes = [{"GPU": 1.0}]
    with pytest.raises(UserError, match=r"no node of the Ray cluster has the 1 cores \(train.threads\)"):
        slots_on(cluster, trials)


def test_over_ssh_every_word_arrives_as_it_is_and_what_fails_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An ssh that does here what sshd would do there: hand its last argument to a shell."""
    spaced = tmp_path / "a $(b) 'c'"
    spaced.mkdir()
    models = {"lr": {"model": {"name": "lr", "dim": 4}}, "bad": {"model": {**WUKONG, "dropout": 0.9}}}
    path = write_study(spaced, models=models)
    ssh = tmp_path / "bin/ssh"
    ssh.parent.mkdir()
    asked = shlex.quote(str(tmp_path / "asked"))
    ssh.write_text(f'#!/bin/sh\nfor word; do last=$word; done\necho "$@" >> {asked}\nexec sh -c "$last"\n')
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ssh.parent}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "hostfile").write_text("elsewhere slots=2\n")
    with pytest.raises(SystemExit) as raised:
        run_here(path, spaced / "out", "--hostfile", str(tmp_path / "hostfile"))
    printed = capsys.readouterr()
    assert raised.value.code == 1
    assert "1 runs failed: bad-seed1-" in printed.err  # its other seed has no rate to run at
    (line,) = (line for line in printed.out.splitlines() if line.startswith("FAILED"))
    assert "this run fails" in Path(line.split("; ")[1]).read_text()
    assert [(row["model"], row["seed"]) for row in table(spaced / "out")] == [("lr", 1), ("lr", 2)]
    assert " elsewhere exec " in (tmp_path / "asked").read_text()
    assert set(parquet.read_table(spaced / "out/runs.parquet")["host"].to_pylist()) == {"elsewhere"}


def test_a_host_that_cannot_be_reached_is_given_up_and_its_runs_go_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(tmp_path, learning_rates=RATES)
    ssh = tmp_path / "bin/ssh"
    ssh.parent.mkdir()
    ssh.write_text(
        '#!/bin/sh\nfor word; do last=$word; done\ncase "$*" in *gone*) exit 255;; esac\nexec sh -c "$last"\n'
    )
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ssh.parent}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "hostfile").write_text("gone slots=1\nhere slots=1\n")
    run_here(path, tmp_path / "out", "--hostfile", str(tmp_path / "hostfile"))
    assert "LOST gone slot 0: ssh failed; " in capsys.readouterr().out
    assert len(table(tmp_path / "out")) == 6
    (tmp_path / "hostfile").write_text("gone slots=1\n")
    with pytest.raises(SystemExit) as raised:
        run_here(path, tmp_path / "none", "--hostfile", str(tmp_path / "hostfile"))
    assert raised.value.code == 2 and "gone: ssh failed, and no other host is left" in capsys.readouterr().err


def test_a_rate_that_failed_keeps_the_other_seeds_waiting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_study(tmp_path, learning_rates=[*RATES, {"model.dropout": 0.9}], models=MODELS)
    with pytest.raises(SystemExit) as raised:
        run_here(path, tmp_path / "out", "--jobs", "2")
    assert raised.value.code == 1 and "2 runs failed" in capsys.readouterr().err
    assert {row["seed"] for row in table(tmp_path / "out")} == {1}
