import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from megarec.launching.hostfile import Host
from megarec.launching.outcomes import Outcome
from megarec.launching.supervise import Command, Record, supervise, verdict

JOB = "0123abcd"
HOSTS = [Host("host1", 2, 0), Host("host2", 2, 2)]
ADDRESSES = {"host1": "10.77.0.1", "host2": "10.77.0.2"}
DONE = [Outcome(rank, f"host{1 + rank // 2}", 0) for rank in range(4)]
LOST = "lost the connection to 10.77.0.2 (closed by peer)"


def record(*outcomes: Outcome, launcher: int = 0, **hosts: int) -> Record:
    return Record({outcome.rank: outcome for outcome in outcomes}, hosts, launcher)


def test_success_is_every_rank_saying_so() -> None:
    assert verdict(record(*DONE), HOSTS, ADDRESSES) == (0, [])


def test_a_launcher_that_says_0_is_not_believed_when_a_rank_is_missing() -> None:
    code, lines = verdict(record(*DONE[:2]), HOSTS, ADDRESSES)
    assert code == 1
    assert lines == ["error: ranks 2-3 on host2: no word; its link may be down, or its ranks hang"]


def test_the_cause_comes_first_whatever_came_in_first() -> None:
    found = record(
        Outcome(1, "host1", 1, LOST, lost=True),
        Outcome(0, "host1", 1, LOST, lost=True),
        Outcome(3, "host2", 137, "killed by signal 9 (SIGKILL)"),
        launcher=137,
        host1=1,
    )
    code, lines = verdict(found, HOSTS, ADDRESSES)
    assert code == 137
    assert lines == [
        "error: rank 3 on host2: killed by signal 9 (SIGKILL)",
        "  then: ranks 0 and 1 on host1: lost the connection to host2 (ranks 2-3) (closed by peer)",
    ]


def test_a_mistake_of_the_user_is_one_line_and_exit_2() -> None:
    found = record(*(Outcome(o.rank, o.host, 2, "data.path=x: not there") for o in DONE), launcher=2)
    assert verdict(found, HOSTS, ADDRESSES) == (2, ["error: every rank: data.path=x: not there"])


@pytest.mark.parametrize(
    ("code", "meaning"),
    [
        (247, "its launcher ended with exit code 247 (signal 9)"),
        (255, "its ssh connection failed or was lost (exit code 255)"),
        (3, "its launcher ended with exit code 3"),
    ],
)
def test_a_host_that_ended_without_a_word_goes_before_what_followed(code: int, meaning: str) -> None:
    found = record(Outcome(0, "host1", 1, LOST, lost=True), launcher=code, host2=code)
    exit_code, lines = verdict(found, HOSTS, ADDRESSES)
    assert exit_code == 1
    assert lines[0] == f"error: ranks 2-3 on host2: no word; {meaning}"
    assert lines[1].startswith("  then: rank 0 on host1: lost the connection to host2")


def test_addresses_are_told_apart_from_longer_ones() -> None:
    cause = "lost the connection to 10.77.0.12 (closed by peer)"
    _, lines = verdict(record(Outcome(0, "host1", 1, cause, lost=True), *DONE[1:]), HOSTS, ADDRESSES)
    assert lines == [f"error: rank 0 on host1: {cause}"]


def command(code: str, host: str | None = None) -> Command:
    return Command([sys.executable, "-c", code], dict(os.environ), host)


def test_lines_pass_and_words_to_the_supervisor_do_not(capfd: pytest.CaptureFixture[str]) -> None:
    word = f'@megarec {JOB} {{"rank": 0, "host": "host1", "code": 0, "cause": "", "lost": false}}'
    chatter = "host1: [2026-11-24 12:02:44,944] [INFO] [launch.py:152:main] WORLD INFO DICT"
    code = f"import sys; print('host1: step 1'); print({chatter!r}); print('host1: ' + {word!r}, file=sys.stderr)"
    found = supervise(JOB, [command(code)])
    assert found.outcomes == {0: Outcome(0, "host1", 0)} and not found.failed()
    assert capfd.readouterr() == ("host1: step 1\n", "")


def test_the_exit_code_of_a_host_is_read_off_pdsh_or_its_own_process() -> None:
    pdsh = "import sys; print('pdsh@here: host2: ssh exited with exit code 247', file=sys.stderr); sys.exit(247)"
    found = supervise(JOB, [command(pdsh)])
    assert (found.host_codes, found.launcher_code) == ({"host2": 247}, 247)
    assert supervise(JOB, [command("raise SystemExit(3)", "host2")]).host_codes == {"host2": 3}


def sleepers(seconds: str) -> int:
    return sum(process.info["cmdline"] == ["sleep", seconds] for process in psutil.process_iter(["cmdline"]))


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_one_failure_ends_all_processes_and_their_children() -> None:
    marker = f"1000.{os.getpid()}"
    linger = f"import subprocess; subprocess.run(['sleep', '{marker}'], start_new_session=True)"
    started = time.monotonic()
    found = supervise(JOB, [command(linger, "host1"), command("raise SystemExit(3)", "host2")])
    assert found.host_codes == {"host2": 3}
    assert time.monotonic() - started < 10
    wait_until(lambda: not sleepers(marker))


def test_the_launcher_ends_even_when_the_supervisor_is_killed() -> None:
    marker = f"1001.{os.getpid()}"
    linger = f"import subprocess; subprocess.run(['sleep', '{marker}'], start_new_session=True)"
    code = (
        "import os, sys; from megarec.launching.supervise import Command, supervise\n"
        f"supervise('x', [Command([sys.executable, '-c', {linger!r}], dict(os.environ))])"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, "-c", code], env=environment) as supervisor:
        wait_until(lambda: sleepers(marker) > 0)
        supervisor.kill()
    wait_until(lambda: not sleepers(marker))
