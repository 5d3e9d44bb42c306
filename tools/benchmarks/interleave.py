"""Timing side by side: contestants take turns, so that a busy machine slows all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

CPU = torch.device("cpu")


def interleave(
    contestants: Mapping[str, Callable[[], object]],
    repetitions: int,
    warmup: int = 3,
    before: Callable[[], object] = lambda: None,
    device: torch.device = CPU,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every repetition of each contestant, `repetitions` rounds after `warmup` rounds that do not count.

    The order within a round turns by one from round to round, so that none profits from its predecessor.

    Args:
        before: called before each measurement and not timed (a barrier).
        device: whose clock counts: an accelerator's own, between two events.
        clock: of the CPU; `time.thread_time` where the calling thread does everything, so that other jobs count less.
    """
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repetition in range(-warmup, repetitions):
        shift = repetition % len(names)
        for name in names[shift:] + names[:shift]:
            before()
            taken = seconds_of(contestants[name], device, clock)
            if repetition >= 0:
                seconds[name].append(taken)
    return seconds


def seconds_of(
    work: Callable[[], object], device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Of one call of `work`, by the clock of the device that it runs on."""
    if device.type == "cpu":
        start = clock()
        work()
        return clock() - start
    first, last = (torch.Event(device=device, enable_timing=True) for _ in range(2))
    first.record()
    work()
    last.record()
    last.synchronize()
    return 1e-3 * first.elapsed_time(last)


def median_ms(seconds: list[float]) -> float:
    return 1e3 * statistics.median(seconds)
