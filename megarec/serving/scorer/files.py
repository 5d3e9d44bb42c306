"""Raw rows of files: CSV and TSV by the standard library, parquet and Arrow where pyarrow is installed."""

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from .bundle import ScoringError
from .scorer import ROWS_AT_ONCE, Scorer

TEXT = {".csv": ",", ".tsv": "\t", ".txt": "\t"}


def rows_of(path: Path, about: dict[str, Any]) -> Iterator[list[dict[str, Any]]]:
    """The rows of a file, ROWS_AT_ONCE at a time.

    Args:
        about: how the files look that the model was trained on: `encoding`, `delimiter`, and `columns` where they have
            no header.

    Raises:
        ScoringError: the file cannot be read.
    """
    try:
        if path.suffix in (".parquet", ".arrow", ".feather"):
            yield from _arrow(path)
        elif path.suffix in TEXT or about["delimiter"] is not None:
            with path.open(newline="", encoding=about["encoding"]) as file:
                yield from _text(file, about["delimiter"] or TEXT[path.suffix], about["columns"])
        else:
            raise ScoringError(f"{path}: expected a name that ends in {', '.join(TEXT)}, .parquet, .arrow or .feather")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ScoringError(f"{path}: cannot be read ({error})") from error


def _text(file: TextIO, delimiter: str, columns: list[str] | None) -> Iterator[list[dict[str, Any]]]:
    csv.field_size_limit(1 << 24)
    quoting: Any = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    lines = csv.reader(file, delimiter=delimiter, quoting=quoting)
    names = columns if columns is not None else next(lines, [])
    batch: list[dict[str, Any]] = []
    for line in lines:
        batch.append(dict(zip(names, line, strict=False)))
        if len(batch) == ROWS_AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


def _arrow(path: Path) -> Iterator[list[dict[str, Any]]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ScoringError(
            f"{path}: parquet and Arrow files need pyarrow ({error}); install it, or give CSV"
        ) from error
    try:
        if path.suffix == ".parquet":
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
