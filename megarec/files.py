"""Files that are there whole or not at all, and the one reader of JSON."""

import errno
import hashlib
import json
import math
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

from megarec.errors import UserError


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write into that becomes `path` by a rename when the block ends without an error.

    A reader finds all of it or what was there before, also after a power cut. An error leaves nothing behind; an
    OSError of the file itself is raised as it is. A link stays a link, and a device, a FIFO or a socket is an OSError:
    the rename would put a file in its place.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    path = path.resolve() if path.is_symlink() else path
    partial = path.with_name(f".{path.name}.partial-{uuid4().hex[:12]}")  # another machine may write it as well
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_directory(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def renamed_to(path: Path, beside: Path | None = None) -> Iterator[Path]:
    """A path to write to that becomes `path` by a rename when the block ends without an error; not synced.

    Its name is unique on all machines, so two processes may write the same file at the same time.

    Args:
        beside: the file to write beside, in place of `path`: on the same file system.
    """
    partial = (beside or path).with_name(f".{path.name}.partial-{uuid4().hex[:12]}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """`whole_file`, for bytes that are in memory."""
    with whole_file(path) as file:
        file.write(content)


def write_json(path: Path, value: Any) -> None:
    """`write_whole`, of one JSON value; NaN and infinity are a ValueError."""
    write_whole(path, (json.dumps(value, allow_nan=False) + "\n").encode())


def check_json_output(option: str, output: Path, example: str) -> None:
    """Make the directory of a JSON to write; call it before long work.

    Args:
        option: that names the file, and `example` a name for it, for messages.

    Raises:
        UserError: it is no .json, or nothing can be written there.
    """
    if output.suffix != ".json":
        raise UserError(f"{option} {output}: expected the name of a JSON file, such as {example}")
    if output.exists() and not output.is_file():
        what = "is a directory" if output.is_dir() else "is not a regular file"
        raise UserError(f"{option} {output}: {what}; name a file, such as {output / example}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option} {output}: {output.parent} cannot be made ({error.strerror})") from error
    if not os.access(output.parent, os.W_OK):
        raise UserError(f"{option} {output}: {output.parent} cannot be written; choose another directory")


def check_output_file(path: Path, option: str, kind: str) -> None:
    """Before long work.

    Raises:
        UserError: it is a directory, a device or the like, or its directory does not exist.
    """
    if path.is_dir():
        raise UserError(f"--{option} {path}: is a directory; expected the name of a file ({kind}), new or to replace")
    if path.exists() and not path.is_file():
        raise UserError(f"--{option} {path}: is not a regular file; expected the name of a file ({kind})")
    if not path.parent.is_dir():
        raise UserError(f"--{option} {path}: {path.parent} is not a directory; make it, or choose another path")


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
MAX_DEPTH = 100
"""Nesting of objects and lists: deeper values would break code that recurses."""


class NotJson(UserError):
    """A text that is not JSON at all, in contrast to JSON that is refused."""


def read_json(path: Path, expected: str, max_bytes: int = MAX_JSON_BYTES, *, nan: bool = False) -> Any:
    """The value of a JSON file: the one reader of every kind of JSON that people or earlier runs wrote.

    UTF-8, with or without a byte order mark, or UTF-16 as its mark says.

    Args:
        expected: what the file should be, for the message: "the JSON of a run".
        nan: whether NaN and infinity are allowed: in measurements of runs, as Python writes them.

    Raises:
        UserError: one line that names the file: it cannot be read, is not a regular file or too large, is not JSON, has
            a key twice in one object, NaN or infinity, a number beyond float64 or with too many digits, a string that
            is not text, or is nested too deep.
    """
    return parse_json(regular_file(path, expected, max_bytes), str(path), nan=nan)


def read_object(path: Path, expected: str, *, nan: bool = False) -> dict[str, Any]:
    """`read_json`, of a file that must hold an object.

    Raises:
        UserError: as `read_json`, or the file holds another kind of value.
    """
    return an_object(read_json(path, expected, nan=nan), str(path), expected)


def an_object(value: Any, where: str, expected: str) -> dict[str, Any]:
    """The value itself.

    Raises:
        UserError: it is not an object.
    """
    if not isinstance(value, dict):
        raise UserError(f"{where}: holds {_short(value)}, expected a JSON object: {expected}")
    return value


def parse_json(text: str | bytes, where: str, *, nan: bool = False) -> Any:
    """The value of a JSON text, as `read_json` takes it.

    Args:
        where: file, argument or program that the text is of, for the message.
        nan: as of `read_json`.

    Raises:
        NotJson: the text is not JSON.
        UserError: as `read_json`, of the text.
    """
    if isinstance(text, bytes):
        text = _decoded(text, where)
    repeated: list[tuple[dict[str, Any], str, Any, Any]] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs) and not repeated:
            repeated.append((found, *_first_twice(pairs)))
        return found

    try:
        value = json.loads(
            text,
            object_pairs_hook=unique,
            parse_int=_integer,
            parse_float=_real,
            parse_constant=None if nan else _no_number,
        )
    except json.JSONDecodeError as error:
        raise NotJson(f"{where}:{error.lineno}:{error.colno}: not JSON: {error.msg}") from error
    except RecursionError as error:
        raise UserError(f"{where}: {_TOO_DEEP}") from error
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    if _too_deep(value):
        raise UserError(f"{where}: {_TOO_DEEP}")
    for container, key, first, second in repeated:
        name = ".".join([*_path_to(container, value), key])
        raise UserError(
            f"{where}: the key {name!r} appears twice, as {_short(first)} and as {_short(second)}; keep one"
        )
    if "\\u" in text or "\0" in text:
        for string in _strings(value):
            if "\0" in string or any("\ud800" <= letter <= "\udfff" for letter in string):
                raise UserError(f"{where}: {_short(string)}: a NUL or half a character, which no name or path can hold")
    return value


_TOO_DEEP = "nested too deep to be read; nothing here needs more than ten levels"


def regular_file(path: Path, expected: str, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """The bytes of a regular file, or of one that a link leads to; it waits for nothing else.

    Args:
        expected: as of `read_json`.

    Raises:
        UserError: one line that names the file: it cannot be read, is not a regular file, or has more bytes.
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


def _decoded(content: bytes, where: str) -> str:
    encoding = json.detect_encoding(content)
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise NotJson(f"{where}: not {encoding.removesuffix('-sig').upper()} text at byte {error.start}") from error


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
    raise ValueError(f"{text}: not a JSON number; every number here is finite")


def _first_twice(pairs: list[tuple[str, Any]]) -> tuple[str, Any, Any]:
    """(key, first value, second value) of the first key that comes again."""
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            return key, seen[key], value
        seen[key] = value
    raise AssertionError("no repeated key")


def _parts(value: Any) -> Iterable[tuple[Any, Any]]:
    """(key or index, value) of the entries of an object or a list; nothing for other values."""
    return value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()


def _too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for whole in level:
            parts = whole.values() if isinstance(whole, dict) else whole if isinstance(whole, list) else ()
            below += [part for part in parts if isinstance(part, (dict, list))]
        if not (level := below):
            return False
    return True


def _path_to(container: dict[str, Any], value: Any, path: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The keys that lead from a value to an object in it; () where a key that came twice hides it."""
    if value is container:
        return path
    for key, part in _parts(value):
        if isinstance(part, dict | list) and (found := _path_to(container, part, (*path, str(key)))):
            return found
    return ()


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for key, part in _parts(value):
        if isinstance(key, str):
            yield key
        yield from _strings(part)


def _short(value: Any) -> str:
    if isinstance(value, dict | list) and len(value) > 30:
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value):,}"
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def file_name(name: str, suffix: str = "") -> str:
    """A file name for an arbitrary name: one part of a path, which cannot leave its directory.

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
