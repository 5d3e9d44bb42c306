"""Where the time of a step goes: data, exchange, dense, optimizer."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from deepspeed.accelerator import get_accelerator


class Clock:
    """Adds up wall-clock seconds by part.

    On an accelerator work is queued, so a part is only known after a synchronisation: `sampled` steps pay for it,
    the others are left out of the parts. On the CPU every step counts.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sampled = True
        self.seconds: dict[str, float] = defaultdict(float)
        self.steps = 0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        if not self.sampled:
            yield
            return
        start = self._now()
        yield
        self.seconds[name] += self._now() - start

    def next_step(self, sampled: bool) -> None:
        self.steps += self.sampled
        self.sampled = sampled or self.device.type == "cpu"

    def milliseconds(self) -> dict[str, float]:
        """Mean milliseconds a step by part since the last call."""
        steps = max(1, self.steps)
        result = {name: 1e3 * total / steps for name, total in self.seconds.items()}
        self.seconds.clear()
        self.steps = 0
        return result

    def _now(self) -> float:
        if self.device.type != "cpu":
            get_accelerator().synchronize()
        return time.perf_counter()
