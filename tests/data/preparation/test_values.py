"""What a file says is what is read: the same value is the same row of a table in every format and split."""

import datetime
import gzip
import os
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megarec.data.preparation import text_files
from megarec.data.preparation.prepare import prepare_table
from megarec.data.schema import load_schema
from megarec.data.store import open_split
from megarec.errors import UserError
from tests.data.preparation.test_prepare import all_splits, write_spec

STRING: dict[str, Any] = {"type": "categorical"}
INTEGER: dict[str, Any] = {"type": "categorical", "dtype": "integer"}
LIST: dict[str, Any] = {"type": "multi_valued"}
Prepare = Callable[..., list[Any]]


@pytest.fixture
def prepared(tmp_path: Path) -> Prepare:
    """The column x of the test split, prepared from two files of the columns x and y (the label)."""

    def prepare(column: dict[str, Any], train: Any, test: Any, suffix: str = ".csv", **more: Any) -> list[Any]:
        files = {}
        for split, content in (("train", train), ("test", test)):
            if isinstance(content, pa.Array):
                files[split] = tmp_path / f"{split}.parquet"
                pq.write_table(pa.table({"x": content, "y": pa.array([1] * len(content))}), files[split])
            else:
                files[split] = tmp_path / (split + suffix)
                data = content if isinstance(content, bytes) else content.encode()
                files[split].write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
        columns = {"x": column, **more, "y": {"type": "label"}}
        spec = write_spec(tmp_path, {"name": "n", "columns": columns})
        paths = {"train": [files["train"]], "valid": [files["train"]], "test": [files["test"]]}
        prepare_table(spec, paths, tmp_path / "out")
        return pq.read_table(tmp_path / "out" / "test")["x"].to_pylist()

    return prepare


def csv(*values: str) -> str:
    return "x,y\n" + "".join(f"{value},1\n" for value in values)


SEVEN = [csv("7"), csv("7.0"), pa.array([7]), pa.array([7.0]), pa.array([7.0], pa.float32()), pa.array(["7"])]
SEVEN += [pa.array(["7.0"]), pa.array([7], pa.uint8()), pa.array([b"7"]), pa.array(["7"]).dictionary_encode()]
TRUE = [csv("True"), csv("true"), csv("TRUE"), pa.array([True]), pa.array(["True"])]


@pytest.mark.parametrize("column", [STRING, INTEGER])
@pytest.mark.parametrize("test", SEVEN)
@pytest.mark.parametrize("train", [SEVEN[0], SEVEN[1], SEVEN[3]])
def test_a_whole_number_is_one_value(prepared: Prepare, train: Any, test: Any, column: dict[str, Any]) -> None:
    assert prepared(column, train, test) == [1]


@pytest.mark.parametrize("column", [STRING, INTEGER])
@pytest.mark.parametrize("test", TRUE)
def test_true_is_one_value(prepared: Prepare, test: Any, column: dict[str, Any]) -> None:
    assert prepared(column, TRUE[0], test) == [1] and prepared(column, TRUE[3], test) == [1]


def test_a_gap_makes_floats_of_a_column(prepared: Prepare) -> None:
    """What pandas writes: 7 in one file, and 7.0 in another that has a gap."""
    assert prepared(STRING, csv("7", "7", "8"), csv("8.0", "", "7.0")) == [2, 0, 1]
    assert prepared(STRING, csv("007", "7.5", "1.2.0"), csv("7", "7.5", "1.2.0")) != [0, 0, 0]


@pytest.mark.parametrize("column", [STRING, INTEGER])
@pytest.mark.parametrize(
    ("values", "limit"),
    [
        (pa.array([1.0, 2.0**53]), 2**53),
        (pa.array([1.0, -(2.0**60)]), 2**53),
        (pa.array([1.0, 2.0**24], pa.float32()), 2**24),
        (pa.array([1.0, float("inf")]), 2**53),
    ],
)
def test_floats_that_stand_for_several_ids(
    prepared: Prepare, values: pa.Array, limit: int, column: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=rf"row 1 .*expected an id below {limit}: .* store integers"):
        prepared(column, values, values)


@pytest.mark.parametrize("column", [STRING, INTEGER])
def test_decimals_are_the_same_values(prepared: Prepare, column: dict[str, Any]) -> None:
    """Arrow writes a decimal 0 of ten places as 0E-10."""
    decimals = pa.array([Decimal(0), Decimal(7), None], pa.decimal128(20, 10))
    assert prepared(column, csv("0", "0", "7"), decimals) == [1, 2, 0]
    assert prepared(column, decimals, csv("0", "7", "")) == [1, 2, 0]


def test_small_decimals_are_text_as_files_have_it(prepared: Prepare) -> None:
    small = pa.array([Decimal("0.0000000012"), Decimal("-0.5")], pa.decimal128(20, 10))
    assert prepared(STRING, csv("0.0000000012", "-0.5000000000"), small) == [2, 1]


@pytest.mark.parametrize("column", [STRING, INTEGER])
@pytest.mark.parametrize("kind", [pa.timestamp("ns"), pa.timestamp("s", "UTC"), pa.duration("s"), pa.time64("us")])
def test_moments_are_no_categories(prepared: Prepare, column: dict[str, Any], kind: pa.DataType) -> None:
    """One file in ns and another in us: every value of the second would be unknown."""
    moments = pa.array([1, 2], pa.int64()).cast(kind)
    with pytest.raises(UserError, match=r"column 'x' is .*depend on the unit; store integers or text"):
        prepared(column, moments, moments)


def test_dates_are_their_text(prepared: Prepare) -> None:
    assert prepared(STRING, csv("2020-01-01"), pa.array([datetime.date(2020, 1, 1)])) == [1]


def test_text_and_integers_above_two_to_53_are_exact(prepared: Prepare) -> None:
    ids = ("9007199254740993", "9007199254740992", "9223372036854775807")
    for column in (STRING, INTEGER):
        assert sorted(prepared(column, csv(*ids), csv(*ids))) == [1, 2, 3]
        assert sorted(prepared(column, csv(*ids), pa.array([int(i) for i in ids]))) == [1, 2, 3]
    with pytest.raises(UserError, match="expected an integer of 64 bits"):
        prepared(INTEGER, csv("9223372036854775808"), csv("1"))
    with pytest.raises(UserError, match="x='0x10', expected an integer"):
        prepared(INTEGER, csv("0x10"), csv("1"))


def test_missing_is_missing_in_every_format(prepared: Prepare) -> None:
    nan = float("nan")
    for test in (csv("", '""'), pa.array(["", None]), pa.array([nan, None]), pa.nulls(2)):
        assert prepared(STRING, csv("7"), test) == [0, 0]
    for test in (csv("7||7", ""), pa.array([["7", "", None, "7"], None]), pa.array([[7.0, nan, None, 7.0], []])):
        assert prepared(LIST, csv("7"), test) == [[1, 1], []]
        assert prepared(LIST | {"dtype": "integer"}, csv("7"), test) == [[1, 1], []]


@pytest.mark.parametrize(
    "empty", [csv("", ""), pa.nulls(2), pa.array([[], None]), pa.array([[None], []]), pa.array(["", None])]
)
def test_lists_without_any_value(prepared: Prepare, empty: Any) -> None:
    assert prepared(LIST, empty, empty) == [[], []]
    assert prepared(LIST, csv("a|b"), empty) == [[], []]


def test_lists_of_a_fixed_size(prepared: Prepare) -> None:
    assert prepared(LIST, csv("1|2"), pa.array([[2, 1], None, [2, 3]], pa.list_(pa.int64(), 2))) == [[2, 1], [], [2, 0]]


def test_numbers_and_labels(prepared: Prepare) -> None:
    number = {"type": "numeric", "missing": -1}
    for test, expected in (
        (csv("1e3", "", "nan", "True", "-0.5"), [1000, -1, -1, 1, -0.5]),
        (pa.array(["1e3", "", None, "true", "-0.5"]), [1000, -1, -1, 1, -0.5]),
        (pa.array([True, None]), [1, -1]),
        (pa.array([2**53 + 1, 2**62]), [2.0**53, 2.0**62]),
        (pa.nulls(1), [-1]),
    ):
        text = "x,c,y\n1,a,1\n"
        if isinstance(test, str):
            test = test.replace(",", ",a,").replace("x,a,y", "x,c,y")
            assert prepared(number, text, test, c=STRING) == expected
        else:
            assert prepared(number, text, text, c=STRING) == [1]
    labels = "x,y\na,True\na,0.0\na,1\n"
    assert prepared(STRING, labels, labels) == [1, 1, 1]


def test_tabs_have_no_quoting(prepared: Prepare, tmp_path: Path) -> None:
    text = 'x\ty\nann "apple\t1\n"apple 1\t1\n5"\t0\n"pear"\t0\n'
    prepared(STRING, text, text, ".tsv")
    table = pq.read_table(tmp_path / "out" / "train").to_pydict()
    assert table["y"] == [1, 1, 0, 0] and sorted(table["x"]) == [1, 2, 3, 4]
    words = pq.read_table(tmp_path / "out" / "vocabulary" / "x.parquet")["value"].to_pylist()
    assert sorted(words) == sorted(['ann "apple', '"apple 1', '5"', '"pear"'])


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 22])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_line_breaks_within_quotes(
    prepared: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, end: str
) -> None:
    monkeypatch.setattr(text_files, "_BLOCK_BYTES", block)
    values = ["two\nlines", 'a "word"', "one, two", '""', 'in"side', "plain"]
    quoted = [f'"{v.replace(chr(34), chr(34) * 2)}"' if v not in ('in"side', "plain") else v for v in values]
    text = "x,y" + end + "".join(f"{v},{i % 2}{end}" for i, v in enumerate(quoted)) + end
    prepared(STRING, text, text)
    words = pq.read_table(tmp_path / "out" / "vocabulary" / "x.parquet")["value"].to_pylist()
    table = pq.read_table(tmp_path / "out" / "test").to_pydict()
    assert [words[row - 1] for row in table["x"]] == values and table["y"] == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('x,y\na,1\n"b,1\nc,0\n', r"line 3: the quote of '\"b,1\\nc,0\\n' is never closed"),
        ('x,y\n"apple 1,1\nbob,"pear 2,0\n', r"line 2: 'pear 2,0\\n' follows the closing quote of .*doubled"),
        ('x,y\n"a"b,1\n', r"line 2: 'b,1\\n' follows the closing quote of '\"a\"'"),
        ("x,y\na,1\nb\n", r"row 1 \(from 0, header not counted\): 1 values \('b'\), expected 2"),
    ],
)
def test_malformed_csv_names_the_line(
    prepared: Prepare, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    with pytest.raises(UserError, match=r"train\.csv: " + message):
        prepared(STRING, text, text)
    monkeypatch.setattr(text_files, "_BLOCK_BYTES", 3)
    with pytest.raises(UserError, match=message.partition(":")[0].partition(" (")[0]):
        prepared(STRING, text, text)


@pytest.mark.parametrize("name", ['x"', '5" pipe', 'a"b"c"', '"x""y"'])
def test_a_quote_in_a_name_takes_no_rows(prepared: Prepare, tmp_path: Path, name: str) -> None:
    text = f'x,{name},y\na,,1\nb,c"d,0\nc,e,1\n'
    column = name.strip('"').replace('""', '"') if name.startswith('"') else name
    assert prepared(STRING, text, text, **{column: {"type": "ignored"}}) == [1, 2, 3]


def test_other_ways_to_write_text(prepared: Prepare) -> None:
    for text in (b"\xef\xbb\xbfx,y\nb,1\n", b"x,y\rb,1\r", b"\nx,y\r\n\r\nb,1", b'"x","y"\n"b","1"\n'):
        assert prepared(STRING, text, text) == [1]
        assert prepared(STRING, text, text, ".csv.gz") == [1]
        tabs = text.replace(b",", b"\t").replace(b'"', b"")
        assert prepared(STRING, tabs, tabs, ".tsv") == [1]


def test_encodings(prepared: Prepare) -> None:
    latin = "x,n,y\nä,ö,1\n".encode("latin-1")
    with pytest.raises(UserError, match=r"row 0 .*: x=b'\\xe4', expected UTF-8; state the \"encoding\" in the spec"):
        prepared(STRING, latin, latin, n={"type": "ignored"})
    ignored = latin.replace(b"\xe4", b"a")
    assert prepared(STRING, ignored, ignored, n={"type": "ignored"}) == [1]
    with pytest.raises(
        UserError, match=r"line 1: is UTF-16, expected utf-8; state \"encoding\": \"utf-16\" in the spec"
    ):
        prepared(STRING, csv("a").encode("utf-16"), csv("a"))
    with pytest.raises(UserError, match=r"line 1: the names .* are not UTF-8"):
        prepared(STRING, "ä,y\na,1\n".encode("latin-1"), csv("a"))


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("row", [b"caf\xe9,1,2\n", b"caf\xe9\n", b"a,1,\xff\xfe\n"])
def test_a_ragged_row_that_is_not_utf8(prepared: Prepare, row: bytes) -> None:
    found = row.count(b",") + 1
    with pytest.raises(UserError, match=rf"row 1 \(from 0, header not counted\): {found} values \(.*expected 2"):
        prepared(STRING, b"x,y\na,1\n" + row, csv("a"))


@pytest.mark.parametrize(
    ("suffix", "message"),
    [
        (".txt", r"column 'x,y' is not declared; .*values of a \.txt are separated by tabs, unless the spec has"),
        (".zip", r"suffix '\.zip', .*decompress it"),
        (".parquet.gz", r"suffix '\.gz', .*decompress it \(these"),
        (".arrow.zst", r"suffix '\.zst', .*decompress it \(these"),
        ("", r"suffix '', expected"),
    ],
)
def test_files_of_other_kinds(prepared: Prepare, suffix: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepared(STRING, csv("a"), csv("a"), suffix)


def test_damaged_gzip_and_pipes(prepared: Prepare, tmp_path: Path) -> None:
    for data in (b"no gzip", gzip.compress(csv("a").encode())[:-9]):
        (tmp_path / "train.csv.gz").write_bytes(data)
        spec = write_spec(tmp_path, {"name": "n", "columns": {"x": STRING, "y": {"type": "label"}}})
        with pytest.raises(UserError, match=r"train\.csv\.gz: cannot be read: damaged gzip"):
            prepare_table(spec, all_splits(tmp_path / "train.csv.gz"), tmp_path / "o")
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(UserError, match=r"pipe\.csv: is not a regular file"):
        prepare_table(spec, all_splits(tmp_path / "pipe.csv"), tmp_path / "o")


def test_an_ignored_column_may_be_in_some_files_only(prepared: Prepare) -> None:
    assert prepared(STRING, "x,n,y\na,?,1\n", csv("a"), n={"type": "ignored"}) == [1]
    assert prepared(STRING, pa.array(["a"]), "n,x,y\n?,a,1\n", n={"type": "ignored"}) == [1]


def test_numbers_alone(prepared: Prepare, tmp_path: Path) -> None:
    assert prepared({"type": "numeric"}, "x,y\n1,1\n2,0\n", "x,y\n3,1\n") == [3.0]
    schema = load_schema(tmp_path / "out")
    assert (
        not schema.categorical
        and schema.numeric == ("x",)
        and len(open_split(tmp_path / "out", "train", schema, "error")) == 2
    )
