"""Collectives of a job by their size, and the figures of a machine that follow from them (see measure.py).

    delay     what the smallest message takes
    rate      bytes of the largest over what it takes beyond the delay
    ramp      what messages between them reach of that rate

A pass of a ring is an all-gather, or half of an all-reduce, whichever takes longer.
"""

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megarec.distributed.pieces import start_exchange
from megarec.distributed.topology import Topology

SIZES = 64, 2**14, 2**18, 2**21, 2**24  # bytes that a rank holds of a collective
BYTES_IN_A_ROW, MOST_IN_A_ROW = 2**22, 64


class Timed(Protocol):
    """Seconds of a call that all ranks make together, so many times in a row."""

    def __call__(self, work: Callable[[], object], times: int = 1) -> float: ...


LEAST = 1e-3  # of a rate, that any message reaches


def collective_seconds(timed: Timed, device: torch.device, topology: Topology) -> dict[str, float]:
    """Microseconds of each collective, by "<link> <op>_us <bytes>"; of the links that this job has; collective.

    Args:
        timed: see `timer`.
    """
    found = {}
    for link, group in (("host", topology.tower), ("network", topology.peer)):
        if group is None:
            continue
        ring = group if link == "host" else topology.world  # gradients travel over all ranks
        for size in SIZES:
            for op, over in (("all_to_all", group), ("all_gather", ring), ("all_reduce", ring)):
                found[f"{link} {op}_us {size}"] = 1e6 * timed(_call(op, size, over, device), _times_in_a_row(size))
    return found


def _times_in_a_row(size: int) -> int:
    """So that the moment at which each rank begins does not count; the same on all ranks."""
    return max(1, min(MOST_IN_A_ROW, BYTES_IN_A_ROW // size))


def _call(op: str, size: int, group: Any, device: torch.device) -> Callable[[], object]:
    """Of `size` bytes: sent to all ranks together, as the exchange sends, gathered from all together, or summed."""
    ranks = group.size()
    numbers = torch.ones(max(size // 4, ranks) // ranks * ranks, device=device)
    part, received = numbers[: len(numbers) // ranks].clone(), torch.empty_like(numbers)
    sizes = ranks * [len(part)]
    calls: dict[str, Callable[[], object]] = {
        "all_to_all": lambda: start_exchange(numbers, received, sizes, sizes, group)(),
        "all_gather": lambda: dist.all_gather_into_tensor(received, part, group=group),
        "all_reduce": lambda: dist.all_reduce(numbers, group=group),
    }
    return calls[op]


def link_figures(taken: dict[str, float], topology: Topology, source: str) -> dict[str, Any]:
    """What a machine's JSON says of its links.

    Args:
        taken: `collective_seconds` of the slowest rank.
        source: of all figures; the times by size are added to it.
    """
    found: dict[str, Any] = {}
    local, hosts, world = topology.ranks_per_host, topology.hosts, topology.world_size
    if f"host all_to_all_us {SIZES[0]}" in taken:
        times, said = _times(taken, "host", "all_to_all")
        found |= {f"host_{key}": _entry(value, said, source) for key, value in _fit(times, local).items()}
        times, said = _passes(taken, "host")
        ring = _fit(times, local)
        found["host_ring_us"] = _entry(ring["link_us"], said, source)
        found["host_ring_gb_s"] = _entry(ring["link_gb_s"], said, source)
    if f"network all_to_all_us {SIZES[0]}" in taken:
        times, said = _times(taken, "network", "all_to_all")
        fitted = _fit(times, hosts)
        rate = fitted["link_gb_s"]
        found["network_us"] = _entry({str(hosts): fitted["link_us"]}, said, source)
        found["network_gb_s"] = _entry(rate, said, source)
        found["network_ramp"] = _entry(fitted["ramp"], said, source)
        # An all-to-all over as many hosts reaches what was measured; nothing is taken off.
        found["network_incast"] = _entry(0.0, "in network_gb_s", source)
        times, said = _passes(taken, "network")
        ring = _fit(times, world)
        found["ring_us_per_host"] = _entry(ring["link_us"] / hosts, said, source)
        found["ring_share"] = _entry(ring["link_gb_s"] / local / rate, said, source)
    return found


def _times(taken: dict[str, float], link: str, op: str) -> tuple[dict[int, float], str]:
    """Seconds by size, and in words."""
    found = {size: 1e-6 * taken[f"{link} {op}_us {size}"] for size in SIZES}
    return (
        found,
        f"{op} of {', '.join(map(str, SIZES))} bytes: {', '.join(f'{1e6 * s:.0f}' for s in found.values())} us",
    )


def _passes(taken: dict[str, float], link: str) -> tuple[dict[int, float], str]:
    (gathered, told), (summed, also) = (_times(taken, link, op) for op in ("all_gather", "all_reduce"))
    return {size: max(gathered[size], summed[size] / 2) for size in SIZES}, f"{told}; {also}"


def _fit(times: dict[int, float], ranks: int) -> dict[str, Any]:
    """link_us, link_gb_s and ramp of seconds by size; the ramp by bytes for each pair."""
    delay, largest = times[SIZES[0]], SIZES[-1] * (ranks - 1) / ranks
    rate = largest / max(times[SIZES[-1]] - delay, 1e-9)
    ramp = {}
    for size in SIZES[1:]:
        reached = size * (ranks - 1) / ranks / max(times[size] - delay, 1e-9) / rate
        ramp[str(max(1, size // ranks))] = min(1.0, max(LEAST, reached))
    return {"link_us": 1e6 * delay, "link_gb_s": rate / 1e9, "ramp": ramp}


def _entry(value: float | dict[str, float], said: str, source: str) -> dict[str, Any]:
    return {"value": rounded(value), "source": f"{source}; {said}"}


def rounded(value: float | dict[str, float]) -> float | dict[str, float]:
    """To four digits."""
    if isinstance(value, dict):
        return {key: float(f"{own:.4g}") for key, own in value.items()}
    return float(f"{value:.4g}")


def timer(device: torch.device, topology: Topology, repetitions: int) -> Timed:
    """Seconds of a call by `repetitions` of so many in a row, which all ranks start together: the median, after one
    that does not count."""

    def seconds(work: Callable[[], object], times: int = 1) -> float:
        taken = []
        for _ in range(1 + repetitions):
            if topology.world is not None:
                dist.barrier(group=topology.world)
            start = time.perf_counter()
            for _ in range(times):
                work()
            if device.type != "cpu":
                torch.accelerator.synchronize()
            taken.append((time.perf_counter() - start) / times)
        taken = sorted(taken[1:])
        return (taken[(len(taken) - 1) // 2] + taken[len(taken) // 2]) / 2

    return seconds


def sustained(timed: Timed, work: Callable[[], object], seconds: float) -> float:
    """Seconds of a call of this rank alone, over as many in a row as take so long; collective.

    Where more ranks than cores compute, a short call sees a core of its own, and only a long one its share.
    """
    return timed(work, max(1, round(seconds / max(timed(work), 1e-6))))
