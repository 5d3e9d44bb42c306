"""Standard output that nobody reads, that is full or closed: a command ends quietly, or with one line."""

import errno
import importlib
import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megarec.commands.cli import COMMANDS, LAUNCH
from megarec.errors import OUTPUT_CLOSED, USER_MISTAKE
from megarec.launching import exit_report
from megarec.training.console import Console

ROOT = Path(__file__).parents[1]
WITH_BUFFER = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["config-schema"]], ids=" ".join)
@pytest.mark.parametrize(
    "environment", [WITH_BUFFER, {**WITH_BUFFER, "PYTHONUNBUFFERED": "1"}], ids=["held", "at once"]
)
def test_output_that_nobody_reads_ends_a_command_silently(words: list[str], environment: dict[str, str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "megarec", *words]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
    os.close(writer)
    assert (done.returncode, done.stderr) == (OUTPUT_CLOSED, "")


def test_output_that_is_full_is_one_line_and_output_that_is_closed_is_none() -> None:
    def run(words: str) -> "subprocess.CompletedProcess[str]":
        command = ["sh", "-c", f"{sys.executable} -m megarec {words}"]
        return subprocess.run(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=WITH_BUFFER)

    full = run("--help > /dev/full")
    assert (full.returncode, full.stderr) == (
        USER_MISTAKE,
        "error: standard output cannot be written (No space left on device)\n",
    )
    assert run("--help >&-").returncode == 0 and run("nonsense >&- 2>&-").returncode == USER_MISTAKE


@pytest.mark.parametrize("command", [c for c in (*COMMANDS.values(), *LAUNCH.values()) if c.module], ids=str)
def test_every_command_ends_like_that(command: object) -> None:
    main = getattr(importlib.import_module(command.module), command.function)  # type: ignore[attr-defined]
    assert hasattr(main, "__wrapped__"), "megarec.errors.exits_cleanly"


class Gone(io.StringIO):
    """A terminal or a pipe whose reader has gone, from its second line on."""

    def write(self, text: str) -> int:
        if self.getvalue().count("\n"):
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        return super().write(text)

    def flush(self) -> None:
        if self.getvalue().count("\n") > 1:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def test_a_run_goes_on_when_nobody_reads_its_lines(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shown = Gone()
    with Console(0, tmp_path, 10, shown):
        for step in range(4):
            logging.getLogger("megarec.somewhere").info("step %d", step)
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split("] ")[-1] for line in lines] == [
        "step 0",
        "step 1",
        "THE CONSOLE ENDS HERE, THE RUN GOES ON: Broken pipe",
        "step 2",
        "step 3",
    ]
    assert shown.getvalue().count("\n") == 1 and capfd.readouterr().err == ""


def test_the_end_of_a_rank_does_not_fail_at_its_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(io.StringIO):
        def flush(self) -> None:
            raise BrokenPipeError

    ended: list[int] = []
    monkeypatch.setattr(sys, "stdout", Broken())
    monkeypatch.setattr(exit_report.os, "_exit", ended.append)
    monkeypatch.setattr(exit_report.atexit, "_run_exitfuncs", lambda: None)
    exit_report.end_well()
    assert ended == [0]
