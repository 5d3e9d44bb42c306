"""Which ends of a job are followed by another start, from where, and what is printed."""

import os
import signal
from pathlib import Path

import pytest

from megarec.errors import UserError
from megarec.launching.restarts import End, run_with_restarts
from megarec.signals import Interruption

KILLED = End(137, "rank 1 on host2: killed by signal 9 (SIGKILL)")


class Job:
    """A job that ends as listed: after saving the step, if there is one, by a signal to this process, or by an End."""

    def __init__(self, directory: Path, *ends: tuple[int | None, End | int | UserError]) -> None:
        self.directory = directory / "checkpoints"
        self._ends = list(ends)
        self.resumed: list[bool] = []

    def save(self, step: int) -> None:
        name = f"step-{step:09d}"
        (self.directory / name).mkdir(parents=True, exist_ok=True)
        (self.directory / "latest").write_text(name + "\n")

    def start(self, number: int, resume: bool) -> End:
        assert number == len(self.resumed)
        self.resumed.append(resume)
        step, end = self._ends.pop(0)
        if step is not None:
            self.save(step)
        if isinstance(end, int):
            os.kill(os.getpid(), signal.SIGTERM)
            return End(end, "asked to end")
        if isinstance(end, UserError):
            raise end
        return end

    def run(self, restarts: int, resume: bool = False) -> int:
        with Interruption() as interruption:
            code = run_with_restarts(self.start, restarts, resume, self.directory, interruption)
        assert not self._ends, "not started as often as expected"
        return code


def test_crashes_and_pre_emptions_are_followed_by_a_start_from_the_latest_checkpoint(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    saved = End(75, "every rank: asked to end by a signal, and saved")
    job = Job(tmp_path, (None, KILLED), (40, KILLED), (None, saved), (80, End(0, "")))
    assert job.run(restarts=5) == 0
    assert job.resumed == [False, False, True, True]
    assert capfd.readouterr().err.splitlines() == [
        f"RESTART 1 OF 5: {KILLED.cause}; starting from scratch, as nothing was saved",
        f"RESTART 2 OF 5: {KILLED.cause}; resuming from step-000000040",
        f"RESTART 3 OF 5: {saved.cause}; resuming from step-000000040, the same as the last time: "
        "nothing newer was saved",
    ]


@pytest.mark.parametrize(
    ("code", "printed"),
    [
        (0, ""),
        (2, "NOT RESTARTED: exit code 2: its user has to fix this\n"),
        (70, "NOT RESTARTED: exit code 70: the fault policy stopped it, and would again\n"),
    ],
)
def test_ends_that_a_restart_would_not_change(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], code: int, printed: str
) -> None:
    assert Job(tmp_path, (40, End(code, "every rank: x"))).run(restarts=3) == code
    assert capfd.readouterr().err == printed


def test_at_most_k_restarts_in_all(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    job = Job(tmp_path, (1, KILLED), (2, KILLED), (3, KILLED))
    assert job.run(restarts=2) == 137
    assert capfd.readouterr().err.splitlines()[-1] == (
        "NOT RESTARTED: all 2 restarts are used up; step-000000003 is the latest checkpoint"
    )


def test_without_restarts_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert Job(tmp_path, (1, KILLED)).run(restarts=0) == 137
    assert capfd.readouterr().err == ""


def test_what_an_earlier_run_left_is_not_resumed_from(tmp_path: Path) -> None:
    """A first start that was to be fresh and ended before it set the old checkpoints aside."""
    job = Job(tmp_path, (None, KILLED), (10, KILLED), (20, End(0, "")))
    job.save(500)
    os.utime(job.directory / "latest", (1, 1))
    assert job.run(restarts=2) == 0
    assert job.resumed == [False, False, True]


@pytest.mark.parametrize("code", [75, 137])
def test_a_signal_to_the_launcher_ends_the_restarting(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], code: int
) -> None:
    assert Job(tmp_path, (7, code)).run(restarts=3) == 75
    printed = capfd.readouterr().err
    assert printed.startswith("PRE-EMPTED: SIGTERM") and "step-000000007 is the latest checkpoint" in printed
    assert ("before the ranks could say that they saved" in printed) == (code != 75)


def test_a_job_that_reached_its_end_in_spite_of_the_signal_is_done(tmp_path: Path) -> None:
    assert Job(tmp_path, (7, 0)).run(restarts=3) == 0


def test_a_job_that_cannot_be_started_again_keeps_its_exit_code(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    job = Job(tmp_path, (3, KILLED), (None, UserError("host2: ssh: no route")))
    assert job.run(restarts=3) == 137
    assert capfd.readouterr().err.endswith("NOT RESTARTED: host2: ssh: no route\n")
