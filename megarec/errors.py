"""Errors for people: what a user can mend is a `UserError`, shown as one line, exit code 2."""

import functools
import sys
from collections.abc import Callable

USER_ERROR_EXIT = 2


class UserError(ValueError):
    """A mistake in a config, data, hostfile, checkpoint or command that its user can mend.

    The message is one line: the file, key, row or rank, the value seen, what was expected, the remedy.
    """


class RunEnded(Exception):
    """A run ends before its end, on all ranks alike and for a reason that was agreed on.

    Attributes:
        code: the exit code (exit_codes.py).
    """

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def exits_cleanly(main: Callable[[], None]) -> Callable[[], None]:
    """Wrap a command's `main`: a `UserError` becomes one line on standard error and exit code 2."""

    @functools.wraps(main)
    def wrapped() -> None:
        try:
            main()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(USER_ERROR_EXIT)

    return wrapped
