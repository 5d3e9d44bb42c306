"""What a checkpoint looks like on disk, and the checks before anything is allocated or trusted.

    <checkpoints>/step-000000100/index.json               what is inside, and which slice lies where
    <checkpoints>/step-000000100/rank-00000.safetensors   slices, as any safetensors reader knows them
    <checkpoints>/latest, best                            the name of a whole checkpoint

A checkpoint from a stranger can be wrong but not dangerous: JSON and plain numbers are all that is ever read, names
stay inside its directory, and every size is checked.
"""

import json
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from xxhash import xxh3_128

from megarec.errors import DamagedCheckpoint, UserError
from megarec.files import an_object, parse_json, regular_file

INDEX = "index.json"
SEALED_INDEX = 3
"""The version of index.json that has a seal; version 2 had none."""
MODEL_FILE, MODEL_CONFIG = "model.safetensors", "config.json"  # of an exported model
SEALED_EXPORT = 2
"""The version of an export's config.json that has a seal; version 1 had none."""
MAX_INDEX_BYTES = 1 << 28  # about a million slices
MAX_DIMENSIONS = 8
_SEAL = b'{"seal": "%s", '
_SEALED = len(_SEAL % (b"0" * 32))
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own bound

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

DtypeName = Literal["F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL"]
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*\.safetensors$", max_length=200)]
Size = Annotated[int, Field(ge=0, lt=1 << 62)]
Sizes = Annotated[tuple[Size, ...], Field(max_length=MAX_DIMENSIONS)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, strict=True, allow_inf_nan=False)


class Slice(_Strict):
    """A rectangle [start, stop) of a tensor: tensor `key` of `file`."""

    file: FileName
    key: str
    start: Sizes
    stop: Sizes


class TensorEntry(_Strict):
    """A global tensor and the slices that make it up."""

    dtype: DtypeName
    shape: Sizes
    slices: tuple[Slice, ...]


class FileEntry(_Strict):
    """Size and XXH3 (64 bits, hexadecimal) of a file: enough against accidents, not against a forger."""

    bytes: Size
    xxh3: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]


class Index(_Strict):
    """index.json.

    Attributes:
        seal: XXH3 (128 bits, hexadecimal) of the text behind it, which is all the rest; null in version 2, which had
            none.
        position: the run's position (position.py).
        topology: ranks, ranks_per_host, tensor, zero, exchange, placement it was written on; for people.
        config: the resolved config of the run.
        data_schema: schema.json of its data, the features in use alone.
        towers: features by tower; null: no towers.
        optimizer: class of the dense optimizer.
        tower_optimizer: that of the tower modules, as configs name it; null: none, or an earlier version wrote it.
        loss_scale: state of the dynamic loss scale; null without one.
    """

    seal: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")] | None = None
    format: Literal["megarec checkpoint"]
    version: Literal[2, 3]
    step: Size
    position: dict[str, bool | int | float | str | list[int | float] | dict[str, int] | None]
    topology: dict[str, int | str]
    config: dict[str, Any]
    data_schema: dict[str, Any] = Field(alias="schema")
    towers: list[list[str]] | None
    optimizer: str
    tower_optimizer: str | None = None
    loss_scale: dict[str, int | float] | None
    tensors: dict[str, TensorEntry]
    files: dict[FileName, FileEntry]

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.files.values())


class Export(_Strict):
    """config.json of an exported model.

    Attributes:
        seal: as of `Index`; null in version 1, which had none.
        step, config, data_schema, towers: as of `Index`.
        file: of the weights, MODEL_FILE.
    """

    seal: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")] | None = None
    format: Literal["megarec model"]
    version: Literal[1, 2]
    step: Size
    config: dict[str, Any]
    data_schema: dict[str, Any] = Field(alias="schema")
    towers: list[list[str]] | None
    file: FileEntry


Kind = TypeVar("Kind", Index, Export)


class FileTensor(NamedTuple):
    """A tensor in a safetensors file, `start` bytes into the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int


def sealed(about: Mapping[str, Any], version: int = SEALED_INDEX) -> bytes:
    """The text of a JSON of that version: its first entry is the checksum of all the text behind that."""
    entries = {**about, "version": version}
    entries.pop("seal", None)
    text = json.dumps(entries, allow_nan=False).encode()[1:] + b"\n"
    return _SEAL % xxh3_128(text).hexdigest().encode() + text


def _read_sealed(path: Path, kind: type[Kind], expected: str, since: int) -> Kind:
    """What `sealed` wrote, or an earlier version without a seal.

    Args:
        expected: what the file should be, for the message.
        since: the version from which on there is a seal.
    """
    with _as_damage():
        content = regular_file(path, expected, MAX_INDEX_BYTES)
        has_seal = content.startswith(_SEAL[:9])
        if has_seal and content[:_SEALED] != _SEAL % xxh3_128(content[_SEALED:]).hexdigest().encode():
            found = xxh3_128(content[_SEALED:]).hexdigest()
            raise DamagedCheckpoint(f"{path}: its checksum is {found}, not the one of its seal: damaged, or edited")
        about = an_object(parse_json(content, str(path)), str(path), expected)
    version = about.get("version")
    if (type(version) is int and (version >= since) != has_seal) or has_seal != ("seal" in about):
        raise DamagedCheckpoint(f"{path}: version {version!r} with{'' if has_seal else 'out'} a seal: edited")
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DamagedCheckpoint(f"{path}: {where or 'content'}: {first['msg']}; not {expected}") from error


@contextmanager
def _as_damage() -> Iterator[None]:
    """An unreadable part of a checkpoint counts as damage: another one may be good."""
    try:
        yield
    except UserError as error:
        raise DamagedCheckpoint(str(error)) from error


def read_index(directory: Path) -> Index:
    """The index of a checkpoint; no tensor is read.

    Raises:
        DamagedCheckpoint: it cannot be read, is not an index, or is inconsistent.
    """
    path = directory / INDEX
    try:
        _check_plain(path)
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{path} is missing: not a checkpoint, or an incomplete one") from error
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: cannot be read ({error.strerror})") from error
    index = _read_sealed(path, Index, "the index of a checkpoint", SEALED_INDEX)
    _check_keys(path, index)
    for name, entry in index.tensors.items():
        _check_tensor(path, name, entry, index)
    return index


def read_export(directory: Path) -> Export:
    """The config.json of an exported model; no weight is read.

    Raises:
        DamagedCheckpoint: it cannot be read, or is not what an export wrote.
    """
    return _read_sealed(
        directory / MODEL_CONFIG, Export, "the config of a model that tools/checkpoint.py exported", SEALED_EXPORT
    )


def _check_keys(path: Path, index: Index) -> None:
    """Every slice has its own numbers: none is used twice."""
    seen = set()
    for name, entry in index.tensors.items():
        for part in entry.slices:
            if (part.file, part.key) in seen:
                raise DamagedCheckpoint(f"{path}: {name}: {part.key} of {part.file} is the source of two slices")
            seen.add((part.file, part.key))


def _check_tensor(path: Path, name: str, entry: TensorEntry, index: Index) -> None:
    """Slices lie inside the tensor, in listed files that are large enough, and have as many elements as it."""
    elements, width = 0, DTYPES[entry.dtype].itemsize
    for part in entry.slices:
        inside = len(part.start) == len(part.stop) == len(entry.shape) and all(
            0 <= start < stop <= size for start, stop, size in zip(part.start, part.stop, entry.shape, strict=True)
        )
        if not inside:
            raise DamagedCheckpoint(f"{path}: {name}: slice {part.start} to {part.stop} is not in shape {entry.shape}")
        count = prod(stop - start for start, stop in zip(part.start, part.stop, strict=True))
        if part.file not in index.files or count * width > index.files[part.file].bytes:
            raise DamagedCheckpoint(f"{path}: {name}: {part.file} is not listed, or too small for {count:,} elements")
        elements += count
    if elements != prod(entry.shape):
        raise DamagedCheckpoint(f"{path}: {name}: its slices have {elements:,} elements, shape {entry.shape} another")


def _check_plain(path: Path) -> None:
    if not stat.S_ISREG(path.lstat().st_mode):
        raise DamagedCheckpoint(f"{path}: not a plain file (a link or a device leads outside the checkpoint)")


def checked_size(directory: Path, name: str, entry: FileEntry) -> Path:
    """The path of a listed file: a plain one of the right size.

    Raises:
        DamagedCheckpoint: it is not.
    """
    path = directory / name
    try:
        _check_plain(path)
        size = path.stat().st_size
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: cannot be read ({error.strerror})") from error
    if size != entry.bytes:
        raise DamagedCheckpoint(f"{path}: {size:,} bytes, the index says {entry.bytes:,}: truncated, or another file")
    return path


def read_header(path: Path) -> dict[str, FileTensor]:
    """The tensors of a safetensors file, by name.

    Raises:
        DamagedCheckpoint: it is not one (for example a pickle), or its header does not fit its size.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
            header = an_object(parse_json(file.read(length), "its header"), "its header", "tensors by name")
        header.pop("__metadata__", None)
        found = {name: _checked(name, entry, 8 + length, size) for name, entry in header.items()}
        _check_apart(found)
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        raise DamagedCheckpoint(f"{path}: not a safetensors file ({kind}{reason})") from error


def _checked(name: str, entry: dict[str, Any], data: int, size: int) -> FileTensor:
    dtype, shape, (begin, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    if len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{name}: {len(shape)} dimensions")
    if not all(type(number) is int and 0 <= number < 1 << 62 for number in (*shape, begin, end)):
        raise ValueError(f"{name}: sizes that are not natural numbers below 2^62")
    if end - begin != prod(shape) * dtype.itemsize or data + end > size:
        raise ValueError(f"{name}: {shape} {entry['dtype']} at {begin} to {end} in a file of {size:,} bytes")
    return FileTensor(dtype, tuple(shape), data + begin)


def _check_apart(tensors: Mapping[str, FileTensor]) -> None:
    """No byte of a file belongs to two tensors."""
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        if size := prod(tensor.shape) * tensor.dtype.itemsize:
            if tensor.start < end:
                raise ValueError(f"{name}: overlaps another tensor of the file")
            end = tensor.start + size
