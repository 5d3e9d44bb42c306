"""The watcher of a rank, as a launcher starts it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megarec.launching import rank_process
from megarec.launching.exit_report import parse
from megarec.launching.rank_process import Assignment
from tests.processes import lives

ROOT = Path(__file__).parents[2]
JOB = "0123abcd"
SLEEP = "import time; print('up', flush=True); time.sleep(100)"


def start(code: str, directory: Path, **environment: str) -> "subprocess.Popen[str]":
    word = Assignment(JOB, str(directory), ["-c", code], {"GREETING": "it's $me"}, ["lo", "eth7"]).encode()
    command = [sys.executable, str(ROOT / "launch/rank.py"), word]
    variables = {**os.environ, "RANK": "5", "CROSS_RANK": "1", **environment}
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def rank_of(watcher: "subprocess.Popen[str]") -> psutil.Process:
    assert watcher.stdout is not None and watcher.stdout.readline() == "up\n"
    (rank,) = psutil.Process(watcher.pid).children()
    return rank


def assert_ends(process: psutil.Process) -> None:
    deadline = time.monotonic() + 60
    while lives(process):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(("code", "exit_code", "cause"), [("pass", 0, ""), ("raise SystemExit(7)", 7, "exit code 7")])
def test_the_true_exit_code(tmp_path: Path, code: str, exit_code: int, cause: str) -> None:
    with start(code, tmp_path) as watcher:
        _, errors = watcher.communicate()
    outcome = parse(errors, JOB)
    assert outcome is not None
    assert (watcher.returncode, outcome.rank, outcome.code, outcome.cause) == (exit_code, 5, exit_code, cause)


def test_directory_variables_and_the_interface_of_the_node(tmp_path: Path) -> None:
    directory = tmp_path / "it's $(here)"
    directory.mkdir()
    code = "import os; print(os.getcwd(), os.environ['GREETING'], os.environ['GLOO_SOCKET_IFNAME'], sep='\\n')"
    with start(code, directory) as watcher:
        output, _ = watcher.communicate()
    assert output.splitlines() == [str(directory), "it's $me", "eth7"]


def test_nccl_takes_the_interface_of_the_user_or_infiniband(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assignment = Assignment("0" * 8, "/", [], {}, ["eth0"])
    monkeypatch.setenv("CROSS_RANK", "0")
    monkeypatch.setattr(rank_process, "_INFINIBAND", tmp_path / "infiniband")

    def interface() -> str | None:
        return rank_process._environment(assignment).get("NCCL_SOCKET_IFNAME")

    assert interface() == "eth0"
    (tmp_path / "infiniband").mkdir()
    assert interface() == "eth0"  # the kernel's module without a device
    (tmp_path / "infiniband/mlx5_0").mkdir()
    assert interface() is None
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    assert interface() == "ib0"


def test_a_killed_rank_is_named(tmp_path: Path) -> None:
    with start(SLEEP, tmp_path) as watcher:
        rank_of(watcher).kill()
        _, errors = watcher.communicate()
    outcome = parse(errors, JOB)
    assert outcome is not None
    assert watcher.returncode == outcome.code == 137
    assert outcome.cause.startswith("killed by signal 9 (SIGKILL)")


def test_nohup_keeps_the_watcher_from_hanging_up(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what a child inherits
    try:
        watcher = start("import os, signal, time; print('up', flush=True); time.sleep(100)", tmp_path)
    finally:
        signal.signal(signal.SIGHUP, before)
    with watcher:
        rank = rank_of(watcher)
        watcher.send_signal(signal.SIGHUP)
        watcher.send_signal(signal.SIGCONT)  # harmless, and comes after
        assert lives(rank) and watcher.poll() is None
        watcher.send_signal(signal.SIGUSR2)  # as when its parent dies
        watcher.communicate()
    assert_ends(rank)


def test_a_rank_that_is_asked_to_end_has_nothing_to_report(tmp_path: Path) -> None:
    with start(SLEEP, tmp_path) as watcher:
        rank = rank_of(watcher)
        watcher.send_signal(signal.SIGTERM)
        _, errors = watcher.communicate()
    assert (watcher.returncode, errors) == (143, "")
    assert_ends(rank)


def test_a_rank_ends_with_its_watcher(tmp_path: Path) -> None:
    with start(SLEEP, tmp_path) as watcher:
        rank = rank_of(watcher)
        watcher.kill()
    assert_ends(rank)


def test_a_rank_ends_when_nobody_reads_its_output_any_more(tmp_path: Path) -> None:
    watcher = start(SLEEP, tmp_path)
    rank = rank_of(watcher)
    assert watcher.stdout is not None and watcher.stderr is not None
    watcher.stdout.close()
    assert_ends(rank)
    assert watcher.wait(timeout=60) == 143
    watcher.stderr.close()


SAVE = """
import signal, sys, time
def save(signum, frame):
    time.sleep(3.5)
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGUSR1, save)
print('up', flush=True)
time.sleep(100)
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_rank_that_is_asked_to_end_has_time_to_save(tmp_path: Path, signum: signal.Signals) -> None:
    with start(SAVE, tmp_path) as watcher:
        rank = rank_of(watcher)
        watcher.send_signal(signum)
        _, errors = watcher.communicate()
    outcome = parse(errors, JOB)
    assert outcome is not None
    assert (watcher.returncode, outcome.code, outcome.cause) == (
        75,
        75,
        "asked to end by a signal, and saved (exit code 75)",
    )
    assert_ends(rank)
