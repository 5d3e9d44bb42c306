"""Freed memory stays: a large tensor that is made again faults no page in. In a process of its own."""

from tests.processes import python

PROGRAM = """
import resource, sys
import torch
from megarec.distributed.process import give_back_freed_memory, keep_freed_memory

if sys.argv[1] != "usual":
    worked, reason = keep_freed_memory()
    assert worked, reason
if sys.argv[1] == "give back":
    give_back_freed_memory()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def touch():
    torch.empty(64 << 20, dtype=torch.uint8).fill_(1)

for _ in range(20):  # glibc's small bins fill first: they keep the gaps between the first few blocks
    touch()
before = faults()
for _ in range(5):
    touch()
print(faults() - before)
"""


def faults(mode: str) -> int:
    done = python("-c", PROGRAM, mode)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_freed_memory_is_found_again() -> None:
    pages = 5 * (64 << 20) // 4096
    assert faults("keep") < pages / 100
    assert faults("usual") > pages / 2
    assert faults("give back") > pages / 2
