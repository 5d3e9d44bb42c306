"""SIGTERM and SIGUSR1, which schedulers and clouds send before they take a machine away, noted for the next step."""

import signal
from types import FrameType, TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Interruption:
    """Inside of `with`, the first SIGTERM or SIGUSR1 (or Ctrl-C) to this process is noted instead of ending it.

    Attributes:
        signum: the signal, None before it came.
    """

    def __init__(self) -> None:
        self.signum: int | None = None

    def __enter__(self) -> "Interruption":
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def take_keyboard(self) -> None:
        """From now on note Ctrl-C as well; a second one is a KeyboardInterrupt."""
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
