"""Log lines of a run, on the console and in log.txt, and its progress bar.

Every module logs to its own `logging.getLogger(__name__)`; the handlers are here. Rank 0 speaks for all: the others
show errors alone.
"""

import logging
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console as RichConsole
from rich.highlighter import NullHighlighter
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megarec.errors import UserError, end_stream

LOG_FILE = "log.txt"
_NEVER = logging.CRITICAL + 1
_TIME = "%Y-%m-%d %H:%M:%S"
_PACKAGE = logging.getLogger("megarec")
_log = logging.getLogger(__name__)


class _LogFile(logging.FileHandler):
    """A log file that ends with a warning when its disk fails; the run goes on."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exception()
        self.setLevel(_NEVER)
        if self.stream is not None:
            with suppress(OSError):  # its buffer cannot be written either
                self.stream.close()
            self.stream = None
        _log.warning("%s ENDS HERE, THE RUN GOES ON: %s", self.baseFilename, getattr(error, "strerror", None) or error)


class _Shown(logging.StreamHandler[TextIO]):
    """Lines on standard output; when their reader is gone (`| head`), only log.txt goes on."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exception()
        self.setLevel(_NEVER)
        if self.stream is sys.stdout:
            end_stream(self.stream)
        _log.warning("THE CONSOLE ENDS HERE, THE RUN GOES ON: %s", getattr(error, "strerror", None) or error)


class Console:
    """The log and the progress bar of a run, for a `with` block; what ends the block early is log.txt's last line.

    Args:
        output: the directory of log.txt, made if it is missing; lines are appended. Rank 0 alone touches it.
        total_steps: of the progress bar, which only a terminal shows.

    Raises:
        UserError: log.txt cannot be written.
    """

    def __init__(self, rank: int, output: Path, total_steps: int, stream: TextIO | None = None) -> None:
        self._progress: Progress | None = None
        self._handlers: list[logging.Handler] = []
        stream = stream or sys.stdout
        line = logging.Formatter(f"[%(asctime)s] [%(levelname)s] [rank {rank}] %(message)s", _TIME)
        shown: logging.Handler = _Shown(stream)
        shown.setFormatter(line)
        if rank == 0:
            file = _open_log(output / LOG_FILE)
            file.setFormatter(line)
            self._handlers.append(file)
            if stream.isatty():
                columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
                self._progress = Progress(*columns, console=RichConsole(file=stream))
                self._task = self._progress.add_task("training", total=total_steps)
                shown = RichHandler(
                    console=self._progress.console,
                    show_path=False,
                    omit_repeated_times=False,
                    log_time_format=f"[{_TIME}]",
                    highlighter=NullHighlighter(),
                )
                shown.setFormatter(logging.Formatter("[rank 0] %(message)s"))
        else:
            shown.setLevel(logging.ERROR)
        self._handlers.append(shown)

    def __enter__(self) -> Self:
        for handler in self._handlers:
            _PACKAGE.addHandler(handler)
        self._before = _PACKAGE.level, _PACKAGE.propagate
        _PACKAGE.setLevel(logging.INFO)
        _PACKAGE.propagate = False  # a handler of the root logger would show every line again
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._progress:
            self._progress.stop()
        for handler in self._handlers:
            # Whatever catches the error shows it on the console.
            if error is not None and isinstance(handler, _LogFile) and handler.level < _NEVER:
                text = str(error) or type(error).__name__
                handler.handle(logging.LogRecord(_log.name, logging.ERROR, __file__, 0, text, None, None))
            _PACKAGE.removeHandler(handler)
            handler.close()
        level, _PACKAGE.propagate = self._before
        _PACKAGE.setLevel(level)

    def progress(self, step: int, description: str | None = None) -> None:
        """Move the bar to a step."""
        if self._progress:
            self._progress.update(self._task, completed=step, description=description)


def _open_log(path: Path) -> _LogFile:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return _LogFile(path, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"train.output_dir={str(path.parent)!r}: {path.name} cannot be written there ({error.strerror}); "
            "expected a directory that this user may write"
        ) from None
