"""Errors for people: what a user can fix is a `UserError`, shown as one line, exit code 2.

A training process's exit code says why it ended; launchers and restart scripts rely on these numbers.
"""

import argparse
import difflib
import functools
import io
import os
import select
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import IO, Any

DONE = 0
USER_MISTAKE = 2
"""Something its user must fix: a config, data, a checkpoint that does not fit."""
STOPPED = 70
"""Stopped by the fault policy or because replicas differed: a restart would meet the same fault."""
INTERRUPTED = 130
"""By Ctrl-C, as shells count it."""
PREEMPTED = 75
"""Asked to end by a signal, and saved: a restart with --resume continues."""
OUTPUT_CLOSED = 141
"""Nobody reads standard output any more (`| head`): as a shell names the end of a program by SIGPIPE."""


class UserError(ValueError):
    """A mistake in a config, data, hostfile, checkpoint or command that its user can fix.

    The message is one line: the file, key, row or rank, the value seen, what was expected, the remedy. Names in it may
    be anything, so characters that would break the line or control a terminal are shown escaped.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(str(message)))


def one_line(text: str, most: int = 4_000) -> str:
    """A text as one line of printable letters: line breaks, control codes and broken letters as escapes; cut."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:most])
    return shown if len(text) <= most else shown + "..."


class RunEnded(Exception):
    """A run ends early, on all ranks and for a reason that they agreed on.

    Attributes:
        code: the exit code, STOPPED or PREEMPTED.
    """

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def exits_cleanly(main: Callable[[], None]) -> Callable[[], None]:
    """Wrap a command's `main`: a `UserError` becomes one line on standard error and exit code 2, Ctrl-C one and 130.

    So does a standard output that cannot be written; one that nobody reads any more ends the command silently.
    """

    @functools.wraps(main)
    def wrapped() -> None:
        _open_standard_streams()
        code: Any = None
        try:
            main()
        except UserError as error:
            code = _print(error)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr, flush=True)
            code = INTERRUPTED
        except SystemExit as end:
            code = end.code
        except OSError:
            if _output_error() is None:
                raise
        if (failed := _output_error()) is not None:
            end_stream(sys.stdout)
            why = f"standard output cannot be written ({failed.strerror})"
            code = code or (OUTPUT_CLOSED if isinstance(failed, BrokenPipeError) else _print(why))
        if code is not None:
            sys.exit(code)

    return wrapped


def _print(error: object) -> int:
    with suppress(OSError):  # nobody reads that either
        print(f"error: {error}", file=sys.stderr, flush=True)
    return USER_MISTAKE


def _open_standard_streams() -> None:
    """Where the shell closed one (`>&-`), open /dev/null: else the next file opened would take its number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8", closefd=False))


def _output_error() -> OSError | None:
    """Why standard output cannot be written; what it could not write stays in its buffer, and fails again.

    Without a buffer (`python -u`) only a reader that is gone can still be seen.
    """
    try:
        sys.stdout.flush()
        watched = select.poll()
        watched.register(sys.stdout, 0)
        if any(event & select.POLLERR for _, event in watched.poll(0)):
            return BrokenPipeError()
    except OSError as error:
        return None if isinstance(error, io.UnsupportedOperation) else error
    return None


def end_stream(stream: IO[str]) -> None:
    """Discard what is still written to a stream, its buffer included: its reader is gone."""
    with suppress(OSError, ValueError):  # a stream without a file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


class _Once(argparse._StoreAction):
    """argparse's own handling of an option, where the last of several would win silently."""

    given = False

    def __call__(self, parser: argparse.ArgumentParser, *rest: Any, **named: Any) -> None:
        if self.given and self.option_strings:
            parser.error(f"{self.option_strings[0]} is given twice; the last would win: keep one")
        self.given = True
        super().__call__(parser, *rest, **named)


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser, for one command line, that refuses an option given twice; lists take `append` or `extend`."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        for name in (None, "store"):
            self.register("action", name, _Once)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name: the nearest known one, or all of them."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"


class DamagedCheckpoint(UserError):
    """A checkpoint that is damaged, whatever the run: an earlier one may be good."""
