"""Log lines: their form, who shows them, what ends a log file, and what a terminal gets."""

import io
import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from megarec.errors import RunEnded, UserError
from megarec.training.console import Console

STAMP = r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] "
LOG = logging.getLogger("megarec.somewhere")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_has_time_level_and_rank_and_is_in_the_file_as_well(tmp_path: Path) -> None:
    shown = io.StringIO()
    with Console(0, tmp_path / "new/out", 10, shown):
        LOG.info("step %d", 20)
        LOG.warning("FAULTY")
    first, second = shown.getvalue().splitlines()
    assert re.fullmatch(STAMP + r"\[INFO\] \[rank 0\] step 20", first)
    assert re.fullmatch(STAMP + r"\[WARNING\] \[rank 0\] FAULTY", second)
    assert (tmp_path / "new/out/log.txt").read_text() == shown.getvalue()
    with Console(0, tmp_path / "new/out", 10, io.StringIO()):
        LOG.info("resumed")
    assert (tmp_path / "new/out/log.txt").read_text().splitlines()[:2] == [first, second]


def test_only_rank_0_speaks_but_for_errors(tmp_path: Path) -> None:
    shown = io.StringIO()
    with Console(3, tmp_path / "out", 10, shown):
        LOG.warning("the same on all ranks")
        LOG.error("mine")
    assert re.fullmatch(STAMP + r"\[ERROR\] \[rank 3\] mine\n", shown.getvalue())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [RunEnded(75, "pre-empted"), ValueError("broken"), KeyboardInterrupt()], ids=repr)
def test_what_ends_a_run_is_the_last_line_of_the_file_alone(error: BaseException, tmp_path: Path) -> None:
    shown = io.StringIO()
    with pytest.raises(type(error)), Console(0, tmp_path, 10, shown):
        raise error
    last = (tmp_path / "log.txt").read_text()
    assert re.fullmatch(STAMP + rf"\[ERROR\] \[rank 0\] {str(error) or 'KeyboardInterrupt'}\n", last)
    assert shown.getvalue() == "", "whoever catches the error shows it"
    assert not [handler for handler in logging.getLogger("megarec").handlers if handler.name == "log.txt"]


def test_a_terminal_has_a_bar_and_the_same_texts(tmp_path: Path) -> None:
    shown = Terminal()
    with Console(0, tmp_path, 10, shown) as console:
        console.progress(4, "2,000 examples/s")
        LOG.info("a [text] in brackets")
    assert "[rank 0] a [text] in brackets" in shown.getvalue()
    assert "4/10" in shown.getvalue() and "2,000 examples/s" in shown.getvalue()
    assert (tmp_path / "log.txt").read_text().endswith("[INFO] [rank 0] a [text] in brackets\n")


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"train\.output_dir='.*/file': log\.txt cannot be written there \(.+\); expected"
    ):
        Console(0, tmp_path / "file", 10, io.StringIO())


def test_a_full_disk_ends_the_file_and_not_the_run(small_disk: Callable[[str], Path]) -> None:
    shown, disk = io.StringIO(), small_disk("size=16k")
    with Console(0, disk, 10, shown):
        for step in range(1_000):
            LOG.info("step %d", step)
    lines = shown.getvalue().splitlines()
    assert len(lines) == 1_001
    (warning,) = (line for line in lines if "WARNING" in line)
    assert warning.endswith(f"{disk / 'log.txt'} ENDS HERE, THE RUN GOES ON: No space left on device")
