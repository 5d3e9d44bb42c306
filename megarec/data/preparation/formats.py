"""A file's format by its name, and its text as UTF-8: compression and other encodings are undone here."""

import codecs
import contextlib
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, cast

import pyarrow as pa

from megarec.errors import UserError

UTF_8 = "utf-8"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
DELIMITERS = {".csv": ",", ".tsv": "\t", ".txt": "\t"}
_JSON = (".jsonl", ".ndjson", ".json")
_ARROW = (".arrow", ".feather")
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


class Kind(NamedTuple):
    """The format of a file.

    Attributes:
        suffix: without that of the compression, in lower case.
        compression: of text.
    """

    format: Literal["text", "json", "parquet", "arrow"]
    suffix: str
    compression: str | None


def kind_of(path: Path, delimiter: str | None = None) -> Kind:
    """The format that a file's name says.

    Args:
        delimiter: of text, where the spec says it; a file of any other name is text then.

    Raises:
        UserError: the suffix is not of a file that can be read; with the remedy.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    compression = _COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    inner = suffixes[:-1] if compression else suffixes
    suffix = inner[-1] if inner else ""
    if suffix in _JSON:
        return Kind("json", suffix, compression)
    if compression is None and (suffix == ".parquet" or suffix in _ARROW):
        return Kind("parquet" if suffix == ".parquet" else "arrow", suffix, None)
    if suffix in DELIMITERS or (delimiter is not None and suffix != ".parquet" and suffix not in _ARROW):
        return Kind("text", suffix, compression)
    remedy = "convert it, or decompress it; for text with other suffixes, state the delimiter in the spec"
    if suffix == ".parquet" or suffix in _ARROW:
        remedy = "decompress it (these formats compress by themselves)"
    expected = "expected .csv, .tsv, .txt, .jsonl, .ndjson or .json (also with .gz or .zst), .parquet, .arrow, .feather"
    raise UserError(f"{path}: suffix {path.suffix!r}, {expected}; {remedy}")


def is_utf8(encoding: str) -> bool:
    """Whether text of that encoding can be read as it lies there."""
    return codecs.lookup(encoding).name == UTF_8


def check_encoding(encoding: str) -> str:
    """The name of an encoding of text.

    Raises:
        ValueError: there is none of that name.
    """
    try:
        codecs.getincrementaldecoder(encoding)("surrogateescape").decode("".encode(encoding), True)
    except (LookupError, ValueError, TypeError):
        raise ValueError(f"{encoding!r} is not a text encoding; examples are 'utf-8', 'latin-1', 'utf-16'") from None
    return encoding


@contextlib.contextmanager
def open_text(path: Path, compression: str | None, encoding: str, start: int = 0) -> Iterator[BinaryIO]:
    """The text of a file as UTF-8, from a byte on; only `read` is there.

    A byte that is not a character of the encoding stays as it is, and is then not UTF-8.

    Raises:
        UserError: damaged compression.
        OSError, UnicodeError: the file cannot be read.
    """
    try:
        with contextlib.ExitStack() as files:
            if compression == "zstd":
                raw = files.enter_context(pa.OSFile(str(path)))
                file = files.enter_context(pa.CompressedInputStream(raw, compression))
            elif compression == "gzip":
                file = files.enter_context(gzip.open(path, "rb"))
            else:
                file = files.enter_context(path.open("rb"))
            if start:
                file.seek(start)
            yield cast(BinaryIO, file if is_utf8(encoding) else _Recoded(file, encoding))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: cannot be read: damaged gzip data ({error})") from error


class _Recoded:
    """A file of another encoding as UTF-8."""

    def __init__(self, file: BinaryIO, encoding: str) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder(encoding)("surrogateescape")

    def read(self, size: int) -> bytes:
        while chunk := self._file.read(size):
            if text := self._decoder.decode(chunk):
                return text.encode(UTF_8, "surrogateescape")
        return self._decoder.decode(b"", True).encode(UTF_8, "surrogateescape")
