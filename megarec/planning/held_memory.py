"""Memory of this process where it computes: what it may still take, what it holds, and the most it held.

On a CPU that is the process's resident memory (Linux). On an accelerator it is what torch's allocator gave out; beside
it, in no tensor, lies what the runtime needs: `runtime`.
"""

import resource
from pathlib import Path

import torch

from megarec.dense.memory import Parts
from megarec.distributed.topology import Topology

_CGROUPS = (  # limit and use, versions 2 and 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
# On one GPU, from a review of the code for CUDA; not measured.
CONTEXT = 500_000_000  # of CUDA: its kernels, and what they need to run
WORKSPACE = 2 * 32 * 2**20  # of cuBLAS, for the stream of the step and the one beside it
CONNECTION = 250_000_000  # of NCCL, for a group of ranks


def available_bytes(device: torch.device) -> int:
    """What this process can still take: what the accelerator has free; or the machine's available memory, or less where
    a cgroup sets a limit."""
    if device.type != "cpu":
        return int(torch.cuda.mem_get_info(device)[0])
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    for limit, used in ((Path(limit), Path(used)) for limit, used in _CGROUPS):
        if limit.is_file() and used.is_file() and limit.read_text().strip().isdigit():
            free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


def resident_bytes() -> int:
    """What this process holds now of the machine's memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak_resident_bytes() -> int:
    """The most that this process ever held of it."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def runtime_bytes(topology: Topology, device: torch.device, connected: bool = True) -> int:
    """Predicted: what an accelerator's libraries take of its memory for a rank; 0 on a CPU, see `process`.

    Args:
        connected: whether NCCL connects the groups of ranks, which a rehearsal's do not.
    """
    if device.type == "cpu":
        return 0
    hosts, per_host = topology.hosts, topology.ranks_per_host
    sizes = [topology.world_size, hosts, topology.tensor_size]
    sizes += [per_host if hosts > 1 else 1, topology.data_size if topology.tensor_size > 1 else 1]
    return CONTEXT + WORKSPACE + connected * CONNECTION * sum(size > 1 for size in sizes)


def peak_parts(device: torch.device, process: int) -> Parts:
    """Measured at the end of the steps: `process` and `runtime`, which no tensor holds, and the `total` at its peak.

    On an accelerator `cached` is what the allocator took beyond that and held in pieces that nothing fitted into.

    Args:
        process: what this process held on this device before there was a model, in no tensor.
    """
    if device.type == "cpu":
        return {"process": process, "runtime": 0, "cached": 0, "total": peak_resident_bytes()}
    free, there = torch.cuda.mem_get_info(device)
    runtime = there - free - torch.cuda.memory_reserved(device)  # of other processes on this device as well
    peak, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return {"process": process, "runtime": runtime, "cached": reserved - peak, "total": peak + runtime}


def forget_peak(device: torch.device) -> None:
    """Start to measure: what was held before does not count. A process cannot forget its peak of resident memory."""
    if device.type != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
