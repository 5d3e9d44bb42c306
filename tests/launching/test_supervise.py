import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

from megarec.launching.exit_report import Outcome
from megarec.launching.failure_report import failure_report
from megarec.launching.hosts import Host
from megarec.launching.supervise import Command, Record, Watch, _hangup_as_exit, supervise
from megarec.signals import Interruption

JOB = "0123abcd"
HOSTS = [Host("host1", 2, 0), Host("host2", 2, 2)]
ADDRESSES = {"host1": "10.77.0.1", "host2": "10.77.0.2"}
DONE = [Outcome(rank, f"host{1 + rank // 2}", 0) for rank in range(4)]
LOST = "lost the connection to 10.77.0.2 (closed by peer)"


def record(*outcomes: Outcome, launcher: int = 0, **hosts: int) -> Record:
    return Record({outcome.rank: outcome for outcome in outcomes}, hosts, launcher)


def test_success_is_reported_by_every_rank() -> None:
    assert failure_report(record(*DONE), HOSTS, ADDRESSES) == (0, [])


def test_a_launcher_that_says_0_is_not_believed_when_a_rank_is_missing() -> None:
    code, lines = failure_report(record(*DONE[:2]), HOSTS, ADDRESSES)
    assert code == 1
    assert lines == ["error: ranks 2-3 on host2: no report; its link may be down, or its ranks hang"]


def test_the_cause_comes_first_whatever_came_in_first() -> None:
    found = record(
        Outcome(1, "host1", 1, LOST, lost=True),
        Outcome(0, "host1", 1, LOST, lost=True),
        Outcome(3, "host2", 137, "killed by signal 9 (SIGKILL)"),
        launcher=137,
        host1=1,
    )
    code, lines = failure_report(found, HOSTS, ADDRESSES)
    assert code == 137
    assert lines == [
        "error: rank 3 on host2: killed by signal 9 (SIGKILL)",
        "  then: ranks 0 and 1 on host1: lost the connection to host2 (ranks 2-3) (closed by peer)",
    ]


WATCHDOG = (
    "host{host}: [rank{rank}]:[E1129 10:00:00.123456789 ProcessGroupNCCL.cpp:632] [Rank {rank}] Watchdog caught "
    "collective operation timeout: WorkNCCL(SeqNum=56, OpType=ALLREDUCE, NumelIn=1, NumelOut=1, Timeout(ms)=600000) "
    "ran for 600021 milliseconds before timing out.\n"
)


def test_ranks_that_nccl_aborts_because_they_waited_are_not_the_cause() -> None:
    found, word = Record(), Outcome(0, "host1", 134, "killed by signal 6 (SIGABRT)")
    for rank in (0, 2, 3):
        host = 1 + rank // 2
        assert not found.take(WATCHDOG.format(rank=rank, host=host), JOB)
        own = {**asdict(word), "rank": rank, "host": f"host{host}"}
        assert found.take(f"host{host}: @megarec {JOB} {json.dumps(own)}\n", JOB)
    code, lines = failure_report(found, HOSTS, ADDRESSES)
    assert code == 134
    waited = "no answer from other ranks for 600 s (parallel.timeout_seconds) in allreduce 56"
    assert lines == [
        f"error: rank 0 on host1, ranks 2 and 3 on host2: {waited}",
        "  then: rank 1 on host1: no report, while the others waited; may hang outside of NCCL",
    ]


def test_a_rank_that_died_goes_before_those_that_nccl_aborted() -> None:
    found = Record()
    found.take(WATCHDOG.format(rank=0, host=1), JOB)
    for outcome in (Outcome(0, "host1", 134, "killed by signal 6 (SIGABRT)"), Outcome(1, "host1", 1, "ValueError: x")):
        found.take(f"@megarec {JOB} {json.dumps(asdict(outcome))}\n", JOB)
    _, lines = failure_report(found, HOSTS[:1], ADDRESSES)
    assert lines[0] == "error: rank 1 on host1: ValueError: x"
    assert lines[1].startswith("  then: rank 0 on host1: no answer from other ranks for 600 s")


def test_a_mistake_of_the_user_is_one_line_and_exit_2() -> None:
    found = record(*(Outcome(o.rank, o.host, 2, "data.path=x: not there") for o in DONE), launcher=2)
    assert failure_report(found, HOSTS, ADDRESSES) == (2, ["error: every rank: data.path=x: not there"])


def test_a_pre_emption_that_all_saved_for_is_no_failure() -> None:
    saved = [Outcome(o.rank, o.host, 75, "asked to end, and saved") for o in DONE]
    assert failure_report(record(*saved, launcher=75), HOSTS, ADDRESSES) == (
        75,
        ["pre-empted: every rank: asked to end, and saved"],
    )
    others = [Outcome(3, "host2", 1, LOST, lost=True), *saved[:3]]
    assert failure_report(record(*others), HOSTS, ADDRESSES)[0] == 75
    code, lines = failure_report(
        record(Outcome(2, "host2", 137, "killed by signal 9 (SIGKILL)"), *saved[:2]), HOSTS, ADDRESSES
    )
    assert code == 137 and lines[0].startswith("error: rank 2 on host2: killed")


def test_a_fault_that_stopped_one_rank_stops_the_job() -> None:
    found = record(Outcome(0, "host1", 1, "RuntimeError: x"), Outcome(3, "host2", 70, "replicas differ"))
    assert failure_report(found, HOSTS, ADDRESSES)[0] == 70


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
    exit_code, lines = failure_report(found, HOSTS, ADDRESSES)
    assert exit_code == 1
    assert lines[0] == f"error: ranks 2-3 on host2: no report; {meaning}"
    assert lines[1].startswith("  then: rank 0 on host1: lost the connection to host2")


def test_addresses_are_distinguished_from_longer_ones() -> None:
    cause = "lost the connection to 10.77.0.12 (closed by peer)"
    _, lines = failure_report(record(Outcome(0, "host1", 1, cause, lost=True), *DONE[1:]), HOSTS, ADDRESSES)
    assert lines == [f"error: rank 0 on host1: {cause}"]


def command(code: str, host: str | None = None) -> Command:
    return Command([sys.executable, "-c", code], dict(os.environ), host)


def test_lines_pass_and_words_to_the_supervisor_do_not(capfd: pytest.CaptureFixture[str]) -> None:
    word = f'@megarec {JOB} {{"rank": 0, "host": "host1", "code": 0, "cause": "", "lost": false}}'
    chatter = "host1: [2026-11-24 12:02:44,944] [INFO] [launch.py:152:main] WORLD INFO DICT"
    code = f"import sys; print('host1: step 1'); print({chatter!r}); print('host1: ' + {word!r}, file=sys.stderr)"
    found = supervise(JOB, [command(code)], Watch(Interruption()))
    assert found.outcomes == {0: Outcome(0, "host1", 0)} and not found.failed()
    assert capfd.readouterr() == ("host1: step 1\n", "")


def test_the_exit_code_of_a_host_is_read_off_pdsh_or_its_own_process() -> None:
    pdsh = "import sys; print('pdsh@here: host2: ssh exited with exit code 247', file=sys.stderr); sys.exit(247)"
    found = supervise(JOB, [command(pdsh)], Watch(Interruption()))
    assert (found.host_codes, found.launcher_code) == ({"host2": 247}, 247)
    assert supervise(JOB, [command("raise SystemExit(3)", "host2")], Watch(Interruption())).host_codes == {"host2": 3}


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
    found = supervise(JOB, [command(linger, "host1"), command("raise SystemExit(3)", "host2")], Watch(Interruption()))
    assert found.host_codes == {"host2": 3}
    assert time.monotonic() - started < 10
    wait_until(lambda: not sleepers(marker))


def test_the_launcher_ends_even_when_the_supervisor_is_killed() -> None:
    marker = f"1001.{os.getpid()}"
    linger = f"import subprocess; subprocess.run(['sleep', '{marker}'], start_new_session=True)"
    code = (
        "import os, sys; from megarec.signals import Interruption\n"
        "from megarec.launching.supervise import Command, Watch, supervise\n"
        f"supervise('x', [Command([sys.executable, '-c', {linger!r}], dict(os.environ))], Watch(Interruption()))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, "-c", code], env=environment) as supervisor:
        wait_until(lambda: sleepers(marker) > 0)
        supervisor.kill()
    wait_until(lambda: not sleepers(marker))


def test_a_job_goes_on_when_nobody_reads_its_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    talks = f"for i in range(99): print(i, flush=True)\nopen({str(tmp_path / 'done')!r}, 'w')"
    with os.fdopen(writer, "w") as nobody:
        monkeypatch.setattr(sys, "stdout", nobody)
        found = supervise(JOB, [command(talks)], Watch(Interruption()))
        monkeypatch.undo()
    assert not found.failed() and (tmp_path / "done").is_file()


SAVING_RANK = """
import os, signal, subprocess, sys, time
def save(signum, frame):
    time.sleep(4)  # longer than what the others get after a failure
    child.kill()
    print(f'saved after {signum}', flush=True)
    os._exit(75)  # as a rank does: the signal comes again, and a shutdown would no longer take it
signal.signal(signal.SIGUSR1, save)
child = subprocess.Popen(['sleep', '1000'])  # must not get the signal: it is no rank
print('up', flush=True)
time.sleep(1000)
"""


def test_a_signal_goes_to_the_ranks_which_have_time_to_save(capfd: pytest.CaptureFixture[str]) -> None:
    environment = {**os.environ, "MEGAREC_JOB": JOB}
    start = f"subprocess.run([sys.executable, '-c', {SAVING_RANK!r}], env={environment!r})"
    watcher = f"import subprocess, sys; sys.exit({start}.returncode)"
    with Interruption() as interruption:
        timer = threading.Timer(2.0, os.kill, (os.getpid(), signal.SIGUSR1))
        timer.start()
        found = supervise(JOB, [command(watcher, "host1")], Watch(interruption, None, grace=30.0))
        timer.join()
    assert interruption.name == "SIGUSR1"
    assert found.host_codes == {"host1": 75}
    assert "saved after 10" in capfd.readouterr().out


def test_ranks_that_do_not_end_in_time_are_killed() -> None:
    marker = f"1002.{os.getpid()}"
    deaf = f"import subprocess; subprocess.run(['sleep', '{marker}'])"
    with Interruption() as interruption:
        interruption.signum = signal.SIGTERM
        started = time.monotonic()
        found = supervise(JOB, [command(deaf)], Watch(interruption, None, grace=1.0))
    assert 1.0 <= time.monotonic() - started < 10
    assert not found.outcomes
    wait_until(lambda: not sleepers(marker))


def test_a_hangup_ends_the_supervisor_unless_nohup_ignores_it() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with _hangup_as_exit():
            os.kill(os.getpid(), signal.SIGHUP)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with pytest.raises(SystemExit, match="129"), _hangup_as_exit():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_lost_ssh_connection_is_no_pre_emption() -> None:
    """The watchers of that host ask their ranks to end, and so all ranks save and end with 75."""
    saved = [Outcome(rank, "host1", 75, "asked to end by a signal, and saved") for rank in (0, 1)]
    code, lines = failure_report(record(*saved, launcher=255, host2=255), HOSTS, ADDRESSES)
    assert code == 255
    assert lines[0].startswith("error: ranks 2-3 on host2: no report; its ssh connection failed or was lost")
    assert lines[1:] == ["  then: ranks 0 and 1 on host1: asked to end by a signal, and saved"]
