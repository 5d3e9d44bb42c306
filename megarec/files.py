"""Files that are there whole or not at all, and the one reader of JSON."""

import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from megarec.errors import UserError


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write into that becomes `path` by a rename when the block ends without an error.

    A reader finds all of it or what was there before, also after a power cut. An error leaves nothing behind; an
    OSError of the file itself is raised as it is.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_directory(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """`whole_file`, of bytes that are in memory."""
    with whole_file(path) as file:
        file.write(content)


def write_json(path: Path, value: Any) -> None:
    """`write_whole`, of one JSON value; NaN and infinity are a ValueError."""
    write_whole(path, (json.dumps(value, allow_nan=False) + "\n").encode())


def sync_directory(directory: Path) -> None:
    """Make names that were created or changed in a directory survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


MAX_JSON_BYTES = 256 << 20
MAX_DIGITS = 400
"""Of one number in a JSON: float64 ends at 309."""


def read_json(path: Path, expected: str, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """The value of a JSON file: the one reader of every kind of JSON that people or earlier runs wrote.

    UTF-8, with or without a byte order mark, or UTF-16 as its mark says.

    Args:
        expected: what the file should be, for the message: "the JSON of a run".

    Raises:
        UserError: one line that names the file: it cannot be read, is no regular file or too large, is no JSON, has a
            key twice in one object, NaN or infinity, a number beyond float64 or with too many digits, a string that
            is no text, or is nested too deep.
    """
    content = regular_file(path, expected, max_bytes)
    encoding = json.detect_encoding(content)
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not {encoding.removesuffix('-sig').upper()} text at byte {error.start}") from error
    return parse_json(text, str(path))


def read_object(path: Path, expected: str) -> dict[str, Any]:
    """`read_json`, of a file that must hold an object.

    Raises:
        UserError: as `read_json`, or the file holds another kind of value.
    """
    value = read_json(path, expected)
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds {_short(value)}, expected a JSON object: {expected}")
    return value


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text, as `read_json` takes it.

    Args:
        where: file or argument that holds the text, for the message.

    Raises:
        UserError: as `read_json`, of the text.
    """
    repeated: list[tuple[dict[str, Any], str, Any, Any]] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            key = next(key for index, (key, _) in enumerate(pairs) if key in dict(pairs[:index]))
            first, second = [value for name, value in pairs if name == key][:2]
            repeated.append((found, key, first, second))
        return found

    try:
        value = json.loads(
            text, object_pairs_hook=unique, parse_int=_integer, parse_float=_real, parse_constant=_no_number
        )
        path_to = dict(_containers(value)) if repeated else {}
    except json.JSONDecodeError as error:
        raise UserError(f"{where}:{error.lineno}:{error.colno}: not JSON: {error.msg}") from error
    except RecursionError as error:
        raise UserError(f"{where}: nested too deep to be read; nothing here needs more than ten levels") from error
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    for container, key, first, second in repeated:
        name = ".".join([*path_to.get(id(container), ()), key])
        raise UserError(
            f"{where}: the key {name!r} is there twice, as {_short(first)} and as {_short(second)}; keep one"
        )
    if "\\u" in text or "\0" in text:
        for string in _strings(value):
            if "\0" in string or any("\ud800" <= letter <= "\udfff" for letter in string):
                raise UserError(f"{where}: {_short(string)}: a NUL or half a character, which no name or path can hold")
    return value


def regular_file(path: Path, expected: str, max_bytes: int) -> bytes:
    """The content of a file of at most so many bytes; never waits.

    Args:
        expected: what the file should be, for the message.

    Raises:
        UserError: it cannot be read, is no regular file or too large.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a FIFO without a writer must not block
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or str(error)
        name = str(path).replace("\0", "\\0")
        raise UserError(f"{name}: cannot be read ({reason}); expected {expected}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            kind = next((name for is_kind, name in _KINDS if is_kind(status.st_mode)), "no file")
            raise UserError(f"{path}: cannot be read (is {kind}); expected {expected}")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            content = file.read(max_bytes + 1) if status.st_size <= max_bytes else b""
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected {expected}") from error
    finally:
        os.close(descriptor)
    if max(status.st_size, len(content)) > max_bytes:
        size = f"{max(status.st_size, len(content)):,} bytes"
        raise UserError(f"{path}: {size}; expected {expected}, of at most {max_bytes:,}")
    return content


_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text):,} digits ({text[:20]}...); nothing here needs more than 20")
    return int(text)


def _real(text: str) -> float:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text):,} digits ({text[:20]}...); nothing here needs more than 20")
    if math.isinf(value := float(text)):
        raise ValueError(f"{text}: beyond the range of numbers, which ends at 1.8e308")
    return value


def _no_number(text: str) -> float:
    raise ValueError(f"{text}: no number of JSON; every number here is finite")


def _containers(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[int, tuple[str, ...]]]:
    """(id, keys that lead to it) of every object below a value."""
    if isinstance(value, dict):
        yield id(value), path
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from _containers(part, (*path, str(key)))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from _strings(part)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def file_name(name: str, suffix: str = "") -> str:
    """The name of a file for a thing of any name: one part of a path, never a way out of its directory.

    Letters, digits and "_- +=,()[]~@" stand for themselves, as does a dot that is not first; everything else is
    written %XX, byte by byte, so that two names never share a file. A name too long for a file ends in its hash.
    """
    plain = "_- +=,()[]~@"
    escaped = "".join(
        c
        if c.isalnum() or c in plain or (c == "." and place > 0)
        else "".join(f"%{byte:02X}" for byte in c.encode("utf-8", "surrogatepass"))
        for place, c in enumerate(name)
    )
    if len(escaped.encode()) > 200:
        digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        escaped = f"{escaped.encode()[:150].decode(errors='ignore')}%{digest}"
    return (escaped or "%") + suffix
