"""A CSV file is cut where rows start and nowhere else, whatever its quotes hold."""

import csv
import hashlib
import io
import json
import random
from pathlib import Path
from typing import NoReturn

import pytest

from megarec.data.preparation import csv_cuts, table_reader
from megarec.data.preparation.csv_cuts import row_starts
from megarec.data.preparation.prepare import MaxBad, prepare_table
from megarec.data.preparation.table_spec import load_table_spec
from megarec.data.preparation.text_files import TextFile
from megarec.errors import UserError

VALUES = ("", "7", "a b", "x,y", "two\nlines", "two\r\nlines", '"', '""', 'say "hi"', ",", "\n", '\n"\n', "é")


def _cuts(text: bytes, every: int) -> list[int]:
    return row_starts(io.BytesIO(text), len(text), ",", every)


@pytest.mark.parametrize("seed", range(20))
def test_cuts_are_starts_of_rows(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    dice = random.Random(seed)
    monkeypatch.setattr(csv_cuts, "_BLOCK_BYTES", dice.choice([1, 2, 3, 7, 64, 1 << 22]))
    starts, text = [], b""
    end = dice.choice(["\n", "\r\n"])
    for _ in range(60):
        row = io.StringIO(newline="")
        quoting = dice.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
        csv.writer(row, lineterminator=end, quoting=quoting).writerow(dice.choice(VALUES) for _ in range(4))
        starts.append(len(text))
        text += row.getvalue().encode()
    found = _cuts(text, 25)
    wanted, target = [], 25
    while after := next((start for start in starts if start >= target), 0):
        wanted.append(after)
        target = max(target + 25, after + 1)
    assert found == wanted and found
    assert _cuts(text, len(text)) == []


def test_blocks_end_where_a_scan_value_by_value_says(monkeypatch: pytest.MonkeyPatch) -> None:
    file = TextFile(Path("x.csv"), ",", ["a"])
    monkeypatch.setattr(TextFile, "_fail", _fail_without_path)

    def ended(text: bytes, last: bool) -> int | str:
        try:
            return file._end(text, b"\n", 1, last)
        except UserError as error:
            return str(error)

    dice = random.Random(1)
    pieces = ('"', '""', ",", "a", "\n", "\r\n", '",', ',"')
    texts = ["".join(dice.choice(pieces) for _ in range(dice.randrange(1, 30))).encode() for _ in range(3000)]
    fast = [(ended(text, False), ended(text, True)) for text in texts]
    monkeypatch.setattr(csv_cuts, "end_of_rows", lambda *given: None)
    assert fast == [(ended(text, False), ended(text, True)) for text in texts]


def _fail_without_path(file: TextFile, line: int, what: str) -> NoReturn:
    raise UserError(f"line {line}: {what}")


@pytest.mark.parametrize("odd", [b'5" disk', b'a"b"', b'"a"b'])
def test_nothing_is_cut_behind_a_quote_that_stands_elsewhere(odd: bytes) -> None:
    plain = b"1,2\n" * 10
    assert _cuts(plain + b"3,4\n", 8) == [*range(8, 44, 8)]
    assert _cuts(odd + b',"x\ny"\n' + plain, 8) == []


def test_blocks_before_a_quote_that_stands_elsewhere_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_cuts, "_BLOCK_BYTES", 16)
    assert _cuts(b"1,2\n" * 4 + b'5" disk,2\n' + b"1,2\n" * 4, 8) == [8, 16]


def test_lines_that_end_in_a_carriage_return_are_not_cut() -> None:
    assert _cuts(b"1,2\r" * 20, 8) == []


def test_a_row_in_quotes_that_never_close_is_not_cut() -> None:
    assert _cuts(b'1,"2\n' + b"1,2\n" * 20, 8) == []


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A spec and a file whose quotes hold delimiters, quotes and line ends."""
    columns = {"text": {"type": "categorical"}, "n": {"type": "numeric"}, "y": {"type": "label"}}
    (tmp_path / "spec.json").write_text(json.dumps({"name": "t", "columns": columns}))
    dice = random.Random(1)
    with (tmp_path / "rows.csv").open("w", newline="", encoding="utf-8-sig") as file:
        rows = csv.writer(file)
        rows.writerow(columns)
        rows.writerows([dice.choice(VALUES), dice.randrange(100), dice.randrange(2)] for _ in range(1500))
    return tmp_path


def _prepared(table: Path, output: str, workers: int, max_bad: int = 0) -> dict[str, str]:
    files = {split: [table / "rows.csv"] for split in ("train", "valid", "test")}
    prepare_table(table / "spec.json", files, table / output, workers=workers, max_bad=MaxBad(max_bad))
    return {
        str(path.relative_to(table / output)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (table / output).rglob("*")
        if path.is_file()
    }


def test_a_file_that_is_cut_gives_the_same_bytes(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (table / "rows.csv").open("a") as file:
        file.write("a,b,0\n")
    whole = _prepared(table, "whole", 1, max_bad=3)
    monkeypatch.setattr(table_reader, "UNIT_BYTES", 2000)
    assert len(table_reader.units_of(table / "rows.csv", "train", load_table_spec(table / "spec.json"))) > 5
    assert _prepared(table, "cut", 2, max_bad=3) == whole


def test_an_error_in_a_part_names_the_line_of_the_file(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = (table / "rows.csv").read_bytes()
    (table / "rows.csv").write_bytes(good + b'"a"b,1,0\r\n')
    messages = []
    for bytes_of_a_unit in (1 << 26, 2000):
        monkeypatch.setattr(table_reader, "UNIT_BYTES", bytes_of_a_unit)
        monkeypatch.setattr(csv_cuts, "_BLOCK_BYTES", 1000)
        with pytest.raises(UserError) as error:
            _prepared(table, "out", 1)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    lines = good.count(b"\n") + 1
    assert f"line {lines}: 'b,1,0\\r\\n' follows the closing quote" in messages[0]
