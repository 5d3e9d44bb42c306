"""Signals that ask a process to end: a run notes them for its next step, a tool cleans up and ends."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What schedulers and clouds send before they take a machine away."""


@contextmanager
def unwinding() -> Iterator[None]:
    """Inside, a signal that ends the process raises an exception, so half-written files are removed.

    Only the first one does, so a second one cannot interrupt the clean-up. As a decorator, of a tool's `main`.
    """
    asks = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    noticed = [number for number in asks if signal.getsignal(number) is not signal.SIG_IGN]

    def end(signum: int, frame: FrameType | None) -> None:
        for number in noticed:
            signal.signal(number, signal.SIG_IGN)
        if signum == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + signum)

    before = {number: signal.signal(number, end) for number in noticed}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Interruption:
    """Inside of `with`, the first SIGTERM or SIGUSR1 (or Ctrl-C) to this process is noted instead of ending it.

    So is SIGHUP, the end of a terminal or of an ssh session, unless it is ignored (nohup).

    Attributes:
        signum: the signal, None before it came.
    """

    def __init__(self) -> None:
        self.signum: int | None = None

    def __enter__(self) -> "Interruption":
        ends_here = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
        numbers = (*SIGNALS, signal.SIGHUP) if ends_here else SIGNALS
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def take_keyboard(self) -> None:
        """From now on note Ctrl-C too; a second one is a KeyboardInterrupt."""
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # nohup and background jobs of scripts
            self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._note)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, t: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum == signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = self.signum or signum

    @property
    def name(self) -> str:
        return signal.Signals(self.signum).name if self.signum else "no signal"
