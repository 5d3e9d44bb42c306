"""Files that are there whole or not at all."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


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
