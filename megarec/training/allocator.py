"""Freed memory stays with the process.

glibc maps every large block anew and gives it back when it is freed. A training step on a CPU frees and allocates the
same gigabytes over and over, and each time the kernel clears the pages again, one fault per 4 KiB: on a virtual machine
that cost a fifth of a dense step. With these two settings of mallopt(3) the next step finds the pages of the last one.
"""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_NEVER = -1
_TRIM_THRESHOLD, _MMAP_MAX = 128 * 1024, 65536  # glibc's own


def keep_freed_memory() -> tuple[bool, str]:
    """Set it for this process, whose resident memory then stays at its peak; whether it worked, and why (not)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False, "allocator: this C library has no mallopt, freed memory goes back to the system"
    if mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, _NEVER):
        return True, "allocator: freed memory stays with the process (mallopt)"
    return False, "allocator: mallopt refused, freed memory goes back to the system"


def give_back_freed_memory() -> None:
    """Undo `keep_freed_memory`: large blocks are mapped one by one again, and resident memory is memory in use."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, _MMAP_MAX)
        mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD)
