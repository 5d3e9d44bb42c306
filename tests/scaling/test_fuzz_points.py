"""Malformed tables of runs, seeded: read and fitted, or refused in one line; no traceback, no wait."""

import os
import random
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from megarec.commands import scaling_law
from megarec.errors import UserError
from megarec.scaling.points import read_points

SEED = 13
HEADER = ["model", "train_gflop_per_example", "parameters", "seed", "logloss", "ne", "chosen"]
ROWS = [
    [f"{family}-{size}gflop", size, 10 * size, 1, base - 0.01 * step, 0.9 - 0.01 * step, True]
    for family, base in (("wukong", 0.6), ("dlrm", 0.62))
    for step, size in enumerate((1, 2, 4, 8))
]
VALUES = [
    *("", " ", "nan", "inf", "-inf", "1e999", "1e308", "5e-324", "-1", "0", "x", "9" * 5_000, "0x1", "1,5", "٣"),
    *("True", "false", "null", "[1]", "'", '"', "\0", "\u202e", "é", "../x", "%s{0}", "[red]x[/]", "a" * 200_000),
]
TYPED = [None, True, 0, -1, 10**18, 1e308, 5e-324, float("nan"), "x", "", b"\xff", [1], {"a": 1}, "9" * 5_000]


def text_of(dice: random.Random) -> bytes:
    header, rows = list(HEADER), [[str(value) for value in row] for row in ROWS]
    for _ in range(dice.randint(1, 3)):
        change, row = dice.randrange(6), dice.choice(rows)
        if change <= 2:
            row[dice.randrange(len(row))] = dice.choice(VALUES)
        elif change == 3:
            header[dice.randrange(len(header))] = dice.choice([*HEADER, "", "zz", "\0"])
        elif change == 4:
            row.append("1") if dice.random() < 0.5 else row.pop()
        else:
            rows = rows[: dice.randrange(len(rows))] or rows
    data = "\n".join(",".join(row) for row in [header, *rows]).encode()
    if dice.random() < 0.2:
        at = dice.randrange(len(data))
        data = data[:at] + dice.choice([b"\xff", b"\0", b'"', b"\r", b"", b"\xef\xbb\xbf"]) + data[at + 1 :]
    return data


def parquet_of(path: Path, dice: random.Random) -> None:
    columns: dict[str, list[object]] = {name: [row[i] for row in ROWS] for i, name in enumerate(HEADER)}
    for _ in range(dice.randint(1, 2)):
        columns[dice.choice(HEADER)] = [dice.choice(TYPED)] * len(ROWS)
    parquet.write_table(pa.table(columns), path)
    if dice.random() < 0.3:
        data = bytearray(path.read_bytes())
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        path.write_bytes(data)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_malformed_points_are_one_line(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dice, path, read, refused = random.Random(f"{SEED}{suffix}"), tmp_path / f"points{suffix}", 0, 0
    for number in range(150):
        path.write_bytes(text_of(dice)) if suffix == ".csv" else parquet_of(path, dice)
        try:
            read_points(path)
        except UserError as error:
            refused += 1
            assert str(path) in str(error) and str(error).isprintable() and len(str(error)) < 12_000, number
            continue
        read += 1
        if read % 10 == 0:
            assert fitted(path, monkeypatch, capsys) in (0, 2), number
    assert read > 20 and refused > 40


def fitted(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> int:
    monkeypatch.setattr(sys, "argv", ["scaling_law", "fit", "--points", str(path), "--json"])
    code = 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            scaling_law.main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    printed = capsys.readouterr()
    assert code == 0 or (printed.err.startswith("error: ") and printed.err.count("\n") == 1), printed.err
    return code


def fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


@pytest.mark.parametrize(
    "make",
    [fifo, lambda path: path.parent, lambda path: path, lambda path: Path("/dev/zero"), lambda path: Path("a\0b")],
)
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_what_is_no_file(suffix: str, make: Callable[[Path], Path], tmp_path: Path) -> None:
    with pytest.raises(UserError):
        read_points(make(tmp_path / f"x{suffix}"))
