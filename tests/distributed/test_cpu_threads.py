"""A rank that a launcher bound computes on all of its cores; others share the machine's."""

import os

import pytest

from megarec.distributed.process import FLOP_FOR_THREADS, threads_that_pay
from tests.processes import python

CORES = sorted(os.sched_getaffinity(0))
pytestmark = pytest.mark.skipif(len(CORES) < 2, reason="needs two cores")


def threads_of_a_child(before: str, local_ranks: int) -> int:
    """What a process finds that runs `before` first."""
    lines = ("import os", "from megarec.distributed.process import threads_of_rank", before)
    code = "\n".join((*lines, f"print(threads_of_rank({local_ranks}))"))
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_a_share_of_the_machine() -> None:
    assert threads_of_a_child("", 1) == len(CORES)
    assert threads_of_a_child("", 2) == len(CORES) // 2
    assert threads_of_a_child("", len(CORES) + 1) == 1


def test_all_cores_of_a_bound_rank() -> None:
    bound = CORES[: len(CORES) - 1]
    assert threads_of_a_child(f"os.sched_setaffinity(0, {bound})", 8) == len(bound)


def test_a_small_step_takes_one_thread() -> None:
    assert threads_that_pay(8, FLOP_FOR_THREADS - 1) == 1
    assert threads_that_pay(8, FLOP_FOR_THREADS) == 8
