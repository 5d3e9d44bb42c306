"""How many CPU threads a rank computes with."""

import os


def threads_of_rank(local_ranks: int) -> int:
    """The rank's own cores where a launcher has bound it to some (`deepspeed --bind_cores_to_rank`), else its share.

    Args:
        local_ranks: ranks of this machine.
    """
    cores = os.sched_getaffinity(0)
    return len(cores) if _bound(cores) else max(1, len(cores) // local_ranks)


def _bound(cores: set[int]) -> bool:
    """Whether this process may use fewer cores than the one that started it."""
    try:
        return cores != os.sched_getaffinity(os.getppid())
    except (ProcessLookupError, PermissionError):  # a parent that ended, or is another user's
        return False
