"""The line of progress: rows a second and the time left of all phases, by what was done of late."""

import itertools

import pytest

from megarec.data.preparation import work
from megarec.data.preparation.work import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(work.time, "monotonic", lambda: now[0])
    return now


def test_speed_and_time_left(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    progress.begin("reading", 1000.0, later=0.5)
    for _ in range(4):
        clock[0] += 10.0
        progress.add(50.0, 2_000)
    # A line at 30 s: 15 % of 200 s are done, what follows takes half of 200 s.
    assert capsys.readouterr().err.splitlines() == ["reading:  15%, 200 rows/s, 0:04:30 left"]
    for _ in range(9):
        clock[0] += 10.0
        progress.add(25.0)  # slower, and no rows
    assert capsys.readouterr().err.splitlines()[-1] == "reading:  40%, 0:07:20 left"


def test_what_an_earlier_process_finished_is_no_speed(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    progress.begin("writing", 100.0)
    for _ in range(5):
        clock[0] += 0.05
        progress.add(10.0, 1_000)
    for _ in itertools.repeat(None, 4):
        clock[0] += 10.0
        progress.add(5.0, 500)
    assert capsys.readouterr().err.splitlines() == ["writing:  65%, 50 rows/s, 0:01:10 left"]


def test_the_first_line_of_a_phase_may_know_no_speed(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    clock[0] += 40.0
    progress.begin("writing", 2.0)
    clock[0] += 0.1
    progress.add(1.0)
    assert capsys.readouterr().err == "writing:  50%\n"
