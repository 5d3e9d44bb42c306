"""Raw rows of files: CSV and TSV by the standard library, parquet and Arrow where pyarrow is installed."""

import csv
import sys
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

from .bundle import RowError, ScoringError
from .rows import Row
from .scorer import ROWS_AT_ONCE, Scorer

TEXT = {".csv": ",", ".tsv": "\t", ".txt": "\t"}


def rows_of(path: Path, about: dict[str, Any]) -> Iterator[list[Row | RowError]]:
    """The rows of a file, ROWS_AT_ONCE at a time, and why one cannot be read.

    Args:
        about: the format of the files that the model was trained on: `encoding` and `delimiter`; `header`, whether text
            has a line of names, or "auto"; `columns`, the names where it has none, and `labels`, those that files of
            rows to score may not have.

    Raises:
        ScoringError: the file cannot be read.
    """
    try:
        suffix = path.suffix.lower()
        if suffix in (".parquet", ".arrow", ".feather"):
            yield from _arrow(path, suffix)
        elif suffix in TEXT or about["delimiter"] is not None:
            with path.open(newline="", encoding=about["encoding"]) as file:
                yield from _text(file, about["delimiter"] or TEXT[suffix], about)
        else:
            raise ScoringError(f"{path}: expected a name that ends in {', '.join(TEXT)}, .parquet, .arrow or .feather")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ScoringError(f"{path}: cannot be read ({error})") from error


def _text(file: TextIO, delimiter: str, about: dict[str, Any]) -> Iterator[list[Row | RowError]]:
    csv.field_size_limit(1 << 24)
    quoting: Any = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    lines: Iterator[list[str]] = (line for line in csv.reader(file, delimiter=delimiter, quoting=quoting) if line)
    first = next(lines, [])
    names, are_names = _names(first, about)
    if not are_names:
        lines = chain([first], lines)
    while some := list(islice(lines, ROWS_AT_ONCE)):
        yield [_row(names, line) for line in some]


def _names(first: list[str], about: dict[str, Any]) -> tuple[list[str], bool]:
    """The names of the columns, and whether the first line of a file has them, as preparation decides it."""
    columns = about["columns"]
    header = about.get("header", columns is None)  # earlier exports do not have it
    if header is True or (header == "auto" and 2 * sum(name in columns for name in first) >= len(first)):
        return first, True
    without = [name for name in columns if name not in about.get("labels", ())]
    return (without if len(first) == len(without) else columns), not first


def _row(names: list[str], line: list[str]) -> Row | RowError:
    if len(line) != len(names):
        return RowError(f"the row has {len(line)} values, expected {len(names)}")
    return dict(zip(names, line, strict=True))


def _arrow(path: Path, suffix: str) -> Iterator[list[Row | RowError]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ScoringError(
            f"{path}: parquet and Arrow files need pyarrow ({error}); install it, or give CSV"
        ) from error
    try:
        if suffix == ".parquet":
            for batch in pq.ParquetFile(path).iter_batches(ROWS_AT_ONCE):
                yield batch.to_pylist()
            return
        with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as reader:
            for number in range(reader.num_record_batches):
                whole = reader.get_batch(number)
                for start in range(0, len(whole), ROWS_AT_ONCE):
                    yield whole.slice(start, ROWS_AT_ONCE).to_pylist()
    except pa.ArrowException as error:
        raise ScoringError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from error


def main(directory: Path) -> None:
    """`python score.py FILE`: predictions of a file's rows as CSV on standard output, an error beside a bad row."""
    if len(sys.argv) != 2:
        print("usage: python score.py rows.csv > predictions.csv", file=sys.stderr)
        sys.exit(2)
    try:
        scorer = Scorer(directory)
        out = csv.writer(sys.stdout, lineterminator="\n")
        out.writerow([*([f"{label}:prediction" for label in scorer.labels] or ["prediction"]), "error"])
        for rows in rows_of(Path(sys.argv[1]), scorer.bundle.manifest["text"]):
            scores = scorer.score(rows)
            for place, found in enumerate(scores.probabilities.reshape(len(rows), -1).tolist()):
                error = scores.errors.get(place, "")
                out.writerow([*("" if error else repr(probability) for probability in found), error])
    except ScoringError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
