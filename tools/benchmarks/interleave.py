"""Timing side by side: contestants take turns, so that a busy machine slows all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping


def interleave(
    contestants: Mapping[str, Callable[[], object]],
    repetitions: int,
    warmup: int = 3,
    before: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of every repetition of each contestant, `repetitions` rounds after `warmup` rounds that do not count.

    The order within a round turns by one from round to round, so that none profits from its predecessor.

    Args:
        before: called before each measurement and not timed (a barrier).
    """
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repetition in range(-warmup, repetitions):
        shift = repetition % len(names)
        for name in names[shift:] + names[:shift]:
            before()
            start = time.perf_counter()
            contestants[name]()
            if repetition >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ms(seconds: list[float]) -> float:
    return 1e3 * statistics.median(seconds)
