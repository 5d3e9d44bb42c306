"""The files of an export: the manifest that lists them, maps of large ones, and errors."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MANIFEST = "manifest.json"
FORMAT = "megarec scoring bundle"
VERSION = 3  # version 1 had no seal, version 2 no sequences
_BLOCK = 1 << 22
_SMALL = 1 << 24  # bytes of a file whose checksum is compared whenever it is opened
_AGAIN = "copy the export again, or export again"


class ScoringError(ValueError):
    """The export cannot be used; one line says which file, what was found and what was expected."""


class RowError(ValueError):
    """A row cannot be scored; one line names the column, the value and what was expected."""


def shown(value: object, most: int = 60) -> str:
    """A value in a message: short, on one line."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply, or an integer of thousands of digits
        text = f"a value of type {type(value).__name__}"
    text = text if len(text) <= most else f"{text[:most]}..."
    return text.replace("\n", " ")  # as arrays have between their rows


class Bundle:
    """An export's directory.

    Attributes:
        manifest: what manifest.json holds.

    Raises:
        ScoringError: it is missing, damaged, or of another version.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        path = directory / MANIFEST
        try:
            text = path.read_bytes()
            self.manifest: dict[str, Any] = json.loads(text)
            found = self.manifest["format"], self.manifest["version"]
            whole = found == (FORMAT, 1) or text == sealed(self.manifest)
        except OSError as error:
            raise ScoringError(
                f"{path}: {error.strerror}; expected what 'megarec checkpoint export RUN DIR --format onnx' writes"
            ) from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ScoringError(f"{path}: is not the manifest of an export ({error}); {_AGAIN}") from error
        if found not in [(FORMAT, version) for version in range(1, VERSION + 1)]:
            what = f"format and version are {shown(found)}, expected {(FORMAT, VERSION)}"
            raise ScoringError(f"{path}: {what}; export again, or take the scorer of that export")
        if not whole:
            raise ScoringError(f"{path}: is not what was exported; {_AGAIN}")

    def path(self, name: str, whole: bool = False) -> Path:
        """A file that the manifest lists, of its size there; the content of a small one is verified.

        Args:
            whole: verify a large one as well.

        Raises:
            ScoringError: it is missing, or differs.
        """
        path, about = self.directory / name, self.manifest["files"].get(name)
        if about is None or Path(name).is_absolute() or ".." in Path(name).parts:
            raise ScoringError(f"{self.directory / MANIFEST}: {shown(name)} is not a file of the export; {_AGAIN}")
        try:
            size = path.stat().st_size
            if size != about["bytes"]:
                raise ScoringError(f"{path}: has {size} bytes, the manifest says {about['bytes']}; {_AGAIN}")
            if (whole or size <= _SMALL) and checksum(path) != about["sha256"]:
                raise ScoringError(f"{path}: is not what was exported; {_AGAIN}")
        except OSError as error:
            raise ScoringError(f"{path}: {error.strerror}; the manifest lists it; {_AGAIN}") from error
        return path

    def array(self, name: str, dtype: str) -> NDArray[Any]:
        """A file as a mapped array [elements]; a large one is read where it is used."""
        path = self.path(name)
        return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)

    def verify(self) -> None:
        """Compare the checksum of every file; this reads all of them.

        Raises:
            ScoringError: names the first that differs.
        """
        for name in self.manifest["files"]:
            self.path(name, whole=True)


def sealed(manifest: dict[str, Any]) -> bytes:
    """The text of manifest.json: its last entry is the checksum of all the others."""
    entries = {name: value for name, value in manifest.items() if name != "sealed"}
    digest = hashlib.sha256(json.dumps(entries).encode()).hexdigest()
    return json.dumps({**entries, "sealed": digest}).encode() + b"\n"


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
