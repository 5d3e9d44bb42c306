"""Files that are there whole or not at all."""

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
