"""A CSV file is cut where rows start and nowhere else, whatever its quotes hold."""

import csv
import io
import random
from pathlib import Path

import pytest

from megarec.data.preparation import csv_cuts
from megarec.data.preparation.csv_cuts import row_starts

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


def test_a_row_in_quotes_that_never_close_is_not_cut(tmp_path: Path) -> None:
    assert _cuts(b'1,"2\n' + b"1,2\n" * 20, 8) == []
