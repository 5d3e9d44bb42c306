"""Files that score.py reads: names and rows are those that preparation finds in the same file."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megarec.data.preparation.table_reader import columns_of
from megarec.data.preparation.table_spec import TableSpec

pytest.importorskip("onnxruntime", reason="the extra 'serve' is not installed")

COLUMNS = {"label": {"type": "label"}, "user": {"type": "categorical"}, "n": {"type": "numeric"}}


def read(path: Path, spec: TableSpec) -> list[Any]:
    from megarec.serving.export.bundle import _text_files
    from megarec.serving.scorer.files import rows_of

    return [row for some in rows_of(path, _text_files(spec)) for row in some]


@pytest.mark.parametrize(
    ("header", "text", "expected"),
    [
        (True, "user,n\na,1\n\nb,2\n", [{"user": "a", "n": "1"}, {"user": "b", "n": "2"}]),
        (False, "1,a,1\n0,b,2\n", [{"label": "1", "user": "a", "n": "1"}, {"label": "0", "user": "b", "n": "2"}]),
        (False, "a,1\nb,2\n", [{"user": "a", "n": "1"}, {"user": "b", "n": "2"}]),  # rows to score have no label
        ("auto", "n,user\n1,a\n", [{"n": "1", "user": "a"}]),
        ("auto", "1,a,1\n", [{"label": "1", "user": "a", "n": "1"}]),
        ("auto", "user,1\na,2\n", [{"user": "a", "1": "2"}]),  # half of its values are names
        ("auto", "users,1\n", [{"user": "users", "n": "1"}]),
        ("auto", "\ufeffuser,n\r\n\"a,\nb\",1\r\n", [{"user": "a,\nb", "n": "1"}]),
        ("auto", "", []),
    ],
)  # fmt: skip
def test_names_and_rows(header: bool | str, text: str, expected: list[dict[str, str]], tmp_path: Path) -> None:
    spec = TableSpec.model_validate({"name": "own", "columns": COLUMNS, "header": header})
    file = tmp_path / "rows.CSV"
    file.write_text(text, newline="")
    found = read(file, spec)
    assert found == expected
    assert not text or columns_of(file, spec) == list(expected[0])


def test_a_ragged_row_has_its_own_error(tmp_path: Path) -> None:
    spec = TableSpec.model_validate({"name": "own", "columns": COLUMNS})
    (tmp_path / "rows.csv").write_text("user,n\na\nb,2\nc,3,4\n")
    first, second, third = read(tmp_path / "rows.csv", spec)
    assert (str(first), second) == ("the row has 1 values, expected 2", {"user": "b", "n": "2"})
    assert str(third) == "the row has 3 values, expected 2"


def test_exports_of_before_say_less_of_their_files(tmp_path: Path) -> None:
    from megarec.serving.scorer.files import rows_of

    (tmp_path / "rows.csv").write_text("a,b\n1,2\n")
    about: dict[str, Any] = {"encoding": "utf-8-sig", "delimiter": None, "columns": None}
    assert list(rows_of(tmp_path / "rows.csv", about)) == [[{"a": "1", "b": "2"}]]
    assert len(next(iter(rows_of(tmp_path / "rows.csv", about | {"columns": ["x", "y"]})))) == 2


def test_parquet_and_arrow(tmp_path: Path) -> None:
    spec = TableSpec.model_validate({"name": "own", "columns": COLUMNS})
    table = pa.table({"user": ["a", None], "n": [1.5, 2.0]})
    pq.write_table(table, tmp_path / "rows.parquet")
    with pa.OSFile(str(tmp_path / "rows.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    for name in ("rows.parquet", "rows.arrow"):
        assert read(tmp_path / name, spec) == table.to_pylist()
