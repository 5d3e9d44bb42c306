"""What the package logs in this process, as lines; for tests whose code runs on the ranks of a pool."""

import logging

_PACKAGE = logging.getLogger("megarec")


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno == logging.INFO else f"{record.levelname}: "
        self.lines.append(level + record.getMessage())


def logged_lines() -> list[str]:
    """A list that every line logged from now on is added to; the list of an earlier call ends."""
    for handler in [handler for handler in _PACKAGE.handlers if isinstance(handler, _Lines)]:
        _PACKAGE.removeHandler(handler)
    collector = _Lines()
    _PACKAGE.addHandler(collector)
    _PACKAGE.setLevel(logging.INFO)
    return collector.lines
