"""SIGTERM and SIGUSR1: schedulers send them before they take a machine away."""

import signal
from types import FrameType, TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preemption:
    """Inside of `with`, such a signal is only noted: the ranks agree on it at the next step, save, and end.

    Attributes:
        signum: the signal, 0 before it came.
    """

    def __init__(self) -> None:
        self.signum = 0

    def __enter__(self) -> "Preemption":
        self._before = [signal.signal(number, self._note) for number in SIGNALS]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, t: TracebackType | None) -> None:
        for number, handler in zip(SIGNALS, self._before, strict=True):
            signal.signal(number, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = self.signum or signum
