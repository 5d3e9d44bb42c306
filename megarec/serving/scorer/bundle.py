"""The files of an export: the manifest that lists them, maps of those that are large, and what goes wrong."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MANIFEST = "manifest.json"
FORMAT = "megarec scoring bundle"
VERSION = 1
_BLOCK = 1 << 22


class ScoringError(ValueError):
    """The export cannot be used; one line says which file, what was found and what was expected."""


class RowError(ValueError):
    """A row cannot be scored; one line names the column, the value and what was expected."""


def shown(value: object, most: int = 60) -> str:
    """A value in a message: short, on one line."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


class Bundle:
    """An export's directory.

    Attributes:
        manifest: what manifest.json holds.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        path = directory / MANIFEST
        try:
            self.manifest: dict[str, Any] = json.loads(path.read_bytes())
            found = self.manifest["format"], self.manifest["version"]
        except OSError as error:
            raise ScoringError(
                f"{path}: {error.strerror}; expected what 'megarec checkpoint export RUN DIR --format onnx' writes"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise ScoringError(f"{path}: is no manifest of an export ({error}); export the run again") from error
        if found != (FORMAT, VERSION):
            raise ScoringError(f"{path}: format and version are {found}, expected {(FORMAT, VERSION)}; export again")

    def path(self, name: str) -> Path:
        """A file that the manifest lists, of the size that it says.

        Raises:
            ScoringError: it is missing or has another size.
        """
        path, expected = self.directory / name, self.manifest["files"][name]["bytes"]
        try:
            size = path.stat().st_size
        except OSError as error:
            raise ScoringError(f"{path}: {error.strerror}; the manifest lists it; export the run again") from error
        if size != expected:
            raise ScoringError(f"{path}: has {size} bytes, the manifest says {expected}; export the run again")
        return path

    def array(self, name: str, dtype: str) -> NDArray[Any]:
        """A file as a mapped array [elements]; it is read where it is used."""
        path = self.path(name)
        return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)

    def verify(self) -> None:
        """Compare the checksum of every file; this reads all of them.

        Raises:
            ScoringError: names the first that differs.
        """
        for name, about in self.manifest["files"].items():
            if checksum(self.path(name)) != about["sha256"]:
                raise ScoringError(f"{self.directory / name}: is not what was exported; copy it again, or export again")


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
