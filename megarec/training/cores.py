"""How many CPU threads a rank computes with."""

import os

FLOP_FOR_THREADS = 2e9  # of a step, from which on more threads pay: 1.2 x on two cores at 1.3e9, 1.8 x at 1.0e10


def threads_of_rank(local_ranks: int) -> int:
    """The rank's own cores where a launcher has bound it to some (`deepspeed --bind_cores_to_rank`), else its share.

    Args:
        local_ranks: ranks of this machine.
    """
    cores = os.sched_getaffinity(0)
    return len(cores) if _bound(cores) else max(1, len(cores) // local_ranks)


def threads_that_pay(threads: int, flop: float) -> int:
    """One for a small step: its many short operations gain little from more threads, and beside any other load these
    wait for one another twenty times as long as they compute.

    Args:
        threads: what the rank may use.
        flop: of its micro-batch, forward and backward.
    """
    return threads if flop >= FLOP_FOR_THREADS else 1


def _bound(cores: set[int]) -> bool:
    """Whether this process may use fewer cores than the one that started it."""
    try:
        return cores != os.sched_getaffinity(os.getppid())
    except (ProcessLookupError, PermissionError):  # a parent that ended, or is another user's
        return False
