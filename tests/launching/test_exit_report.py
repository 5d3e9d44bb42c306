import os
import subprocess
import sys
from pathlib import Path

import pytest

from megarec.errors import UserError
from megarec.launching.exit_report import Outcome, outcome_of, parse

ROOT = Path(__file__).parents[2]
JOB = "0123abcd"
# As torch 2.13 words them on two hosts.
RESET = (
    "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [10.77.0.2]:32393: Connection "
    "reset by peer. This is typically caused by a remote worker hanging or bugs in the application."
)
CLOSED = "[../third_party/gloo/gloo/transport/tcp/pair.cc:552] Connection closed by peer [10.77.0.2]:4711"
TIMEOUT = "[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 5000ms for recv operation"


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (RESET, "lost the connection to 10.77.0.2 (Connection reset by peer) in "),
        (CLOSED, "lost the connection to 10.77.0.2 (closed by peer) in "),
        (TIMEOUT, "no answer from other ranks for 5 s (parallel.timeout_seconds) in "),
        (
            "wait timeout after 5000ms, keys: /default_pg/0//cpu//0/0",
            "no answer from other ranks for 5 s (parallel.timeout_seconds) in ",
        ),
        ("NCCL error: remote process exited or there was a network error", "lost the connection to another rank in "),
    ],
)
def test_what_others_caused_is_distinguished(text: str, cause: str) -> None:
    outcome = outcome_of(RuntimeError(text))
    assert outcome.lost and outcome.code == 1
    assert outcome.cause.startswith(cause)


def test_a_fault_of_its_own_names_where_it_happened() -> None:
    from megarec.launching.hosts import read_hostfile

    with pytest.raises(AttributeError) as raised:
        read_hostfile(None)  # type: ignore[arg-type]
    outcome = outcome_of(raised.value)
    assert not outcome.lost
    assert outcome.cause.startswith("AttributeError: ") and " in launching/hosts.py:" in outcome.cause


def test_a_kernel_that_failed_is_looked_for_by_another_run() -> None:
    long = "Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions. " * 40
    outcome = outcome_of(RuntimeError(f"CUDA error: an illegal memory access was encountered\n{long}"))
    assert not outcome.lost
    assert outcome.cause.endswith("and whether an id lies outside of its table")
    assert "CUDA_LAUNCH_BLOCKING=1 and FBGEMM_TBE_BOUNDS_CHECK_MODE=0" in outcome.cause
    assert "LAUNCH_BLOCKING" not in outcome_of(RuntimeError("CUDA error: out of memory")).cause


def fail(error: str, job: str | None) -> "subprocess.CompletedProcess[str]":
    code = f"""
from megarec.errors import UserError
from megarec.launching.exit_report import reported
with reported():
    raise {error}
"""
    environment = {"PYTHONPATH": str(ROOT), "RANK": "3", **({"MEGAREC_JOB": job} if job else {})}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_one_line_first_and_the_traceback_only_of_the_culprit() -> None:
    own = fail("ZeroDivisionError('by zero')", None)
    assert own.returncode == 1
    first, second, *_ = own.stderr.splitlines()
    assert first.startswith("error: rank 3 on ") and ": ZeroDivisionError: by zero in " in first
    assert second == "Traceback (most recent call last):"
    lost = fail(f"RuntimeError({CLOSED!r})", None)
    assert lost.returncode == 1 and len(lost.stderr.splitlines()) == 1


def test_a_supervised_rank_reports_to_its_supervisor() -> None:
    done = fail("UserError('data.path=x: not there')", JOB)
    assert done.returncode == 2
    outcome = parse(f"host2: {done.stderr}", JOB)
    assert outcome is not None
    assert (outcome.rank, outcome.code, outcome.cause) == (3, 2, "data.path=x: not there")
    assert parse(done.stderr, "another") is None


def test_a_mistake_passes_through_where_nobody_supervises() -> None:
    assert UserError.__name__ in fail("UserError('x')", None).stderr
    assert parse("step 1/5  loss 0.7", JOB) is None
    assert parse('@megarec 0123abcd {"rank": 1, "host": "h", "code": 0, "cause": "", "lost": false}\n', JOB) == Outcome(
        1, "h", 0
    )


MISTAKE = """
import threading, time
from megarec.errors import UserError
from megarec.launching.exit_report import end_with_mistake
threading.Thread(target=time.sleep, args=(600,)).start()  # an interpreter that shuts down would wait for it
print('up', flush=True)
end_with_mistake(UserError("data.batch_size=7 does not divide"))
"""


@pytest.mark.parametrize("rank", ["0", "1", "x"])
def test_a_mistake_ends_a_rank_at_once_whatever_threads_it_has(rank: str) -> None:
    environment = {**os.environ, "RANK": rank, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", MISTAKE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (2, "up\n", "error: data.batch_size=7 does not divide\n")


WELL = """
import atexit, threading, time
from megarec.launching.exit_report import end_well
atexit.register(print, 'registered')
threading.Thread(target=time.sleep, args=(600,)).start()  # an interpreter that shuts down would wait for it
end_well()
"""


def test_a_good_end_runs_what_is_registered_and_does_not_shut_down() -> None:
    command = [sys.executable, "-c", WELL]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "registered\n", "")


INTERRUPTED = """
import os, signal
from megarec.launching.exit_report import reported
from megarec.signals import Interruption
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored
with reported(), Interruption() as interruption:
    interruption.take_keyboard()
    os.kill(os.getpid(), signal.SIGINT)
    print(interruption.name, flush=True)
    os.kill(os.getpid(), signal.SIGINT)
"""


def test_ctrl_c_is_noted_and_a_second_one_ends_the_rank() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for name in ("RANK", "MEGAREC_JOB"):
        environment.pop(name, None)
    command = [sys.executable, "-c", INTERRUPTED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (130, "SIGINT\n")
    assert done.stderr == "interrupted by Ctrl-C; --resume goes on from the latest checkpoint\n"
