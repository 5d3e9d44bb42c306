"""Preparation in shards: the same bytes however many workers, pieces and kills; bad rows; Criteo's files."""

import csv
import gzip
import hashlib
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from megarec.commands.prepare_data import listed, main
from megarec.data.preparation import encode, merge, scan, table_reader, text_files
from megarec.data.preparation.prepare import MaxBad, prepare_spec, prepare_table
from megarec.data.preparation.splits import Shares
from megarec.data.preparation.vocabulary import Hashing
from megarec.data.schema import load_schema
from megarec.data.sources.criteo import CATEGORICAL, NUMERIC, criteo_spec, write_made_up
from megarec.errors import UserError

ROWS = {"day_0": 1500, "day_1": 700, "day_2": 300, "day_3": 250}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds so low that a few thousand rows are many units, pieces, ranges and shards."""
    monkeypatch.setattr(table_reader, "UNIT_BYTES", 60_000)
    monkeypatch.setattr(text_files, "_BLOCK_BYTES", 20_000)
    monkeypatch.setattr(scan, "PIECE_ROWS", 100)
    monkeypatch.setattr(merge, "MERGE_VALUES", 150)
    monkeypatch.setattr(merge, "_LOOK_UP", 40)
    monkeypatch.setattr(encode, "ROWS_PER_SHARD", 600)
    monkeypatch.setattr(encode, "ROWS_PER_GROUP", 64)


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up files of Criteo's format, without a suffix as Terabyte's are."""
    directory = tmp_path_factory.mktemp("days")
    for seed, (name, rows) in enumerate(ROWS.items()):
        write_made_up(directory / name, rows, seed, most_values=120)
    return directory


def files(days: Path, suffix: str = "") -> dict[str, list[Path]]:
    names = [days / f"{name}{suffix}" for name in ROWS]
    return {"train": names[:2], "valid": names[2:3], "test": names[3:]}


def prepare(days: Path, output: Path, workers: int = 1, suffix: str = "", **spec: Any) -> Path:
    prepare_spec(criteo_spec("c", **spec), "criteo", files(days, suffix), output, None, workers, MaxBad())
    return output


def content(directory: Path) -> dict[str, str]:
    """By file, the digest of its bytes."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def lines(path: Path) -> Iterator[list[str]]:
    return (line.split("\t") for line in path.read_text().splitlines())


@pytest.mark.usefixtures("small")
def test_criteo_like_counting_by_hand(days: Path, tmp_path: Path) -> None:
    out = prepare(days, tmp_path / "out", min_count=2)
    paths = files(days)
    train = [row for path in paths["train"] for row in lines(path)]
    schema = load_schema(out)
    assert schema.rows == {"train": 2200, "valid": 300, "test": 250} and schema.numeric == NUMERIC
    for split, named in paths.items():
        raw = [row for path in named for row in lines(path)]
        found = pq.read_table(out / split).to_pydict()
        assert found["label"] == [int(row[0]) for row in raw]
        for place, name in enumerate(NUMERIC, start=1):
            numbers = np.array([float(row[place] or 0) for row in raw])
            assert found[name] == (np.sign(numbers) * np.log1p(np.abs(numbers))).astype(np.float32).tolist()
        for place, name in enumerate(CATEGORICAL, start=14):
            counts = Counter(int(row[place], 16) for row in train if row[place])
            kept = sorted((-count, value) for value, count in counts.items() if count >= 2)
            row_of = {value: row for row, (_, value) in enumerate(kept, start=1)}
            assert found[name] == [row_of.get(int(row[place] or "0", 16), 0) if row[place] else 0 for row in raw], name
            present = sum(bool(row[place]) for row in raw)
            unknown = sum(bool(row[place]) and int(row[place], 16) not in row_of for row in raw)
            assert schema.unknown[split][name] == round(unknown / present, 6)
            assert next(f.rows for f in schema.categorical if f.name == name) == len(kept) + 1
    assert [len(pq.read_table(p)) for p in sorted((out / "train").iterdir())] == [600, 600, 600, 400]


@pytest.mark.usefixtures("small")
def test_the_same_bytes_for_any_number_of_workers(days: Path, tmp_path: Path) -> None:
    one = content(prepare(days, tmp_path / "one"))
    assert len(one) == 26 + 4 + 1 + 1 + 2
    for workers in (2, 4):
        assert content(prepare(days, tmp_path / str(workers), workers)) == one
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "4", "one"]


def test_pieces_ranges_and_gzip_change_nothing(
    days: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    for name in ROWS:
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((days / name).read_bytes()))
    whole = {name: pq.read_table(prepare(days, tmp_path / "whole") / name) for name in ("train", "test")}
    request.getfixturevalue("small")
    small = prepare(tmp_path, tmp_path / "small", suffix=".gz")
    assert all(pq.read_table(small / name).equals(rows) for name, rows in whole.items())
    vocabularies = [content(path / "vocabulary").keys() for path in (small, tmp_path / "whole")]
    assert vocabularies[0] == vocabularies[1]
    assert load_schema(small) == load_schema(tmp_path / "whole")


@pytest.mark.usefixtures("small")
def test_hashing_reports_what_shares_a_row(days: Path, tmp_path: Path) -> None:
    schema = load_schema(prepare(days, tmp_path / "out", rows=50))
    raw = [row for paths in files(days).values() for path in paths for row in lines(path)]
    test = [row for path in files(days)["test"] for row in lines(path)]
    found = pq.read_table(tmp_path / "out" / "test").to_pydict()
    hashing = Hashing(50)
    for place, name in ((14, "C1"), (16, "C3"), (22, "C9")):
        values = {int(row[place], 16) for row in raw if row[place]}
        row_of = {value: hashing._row_of(value) for value in values}
        assert found[name] == [row_of[int(row[place], 16)] if row[place] else 0 for row in test]
        times = Counter(row_of.values())
        shared = sum(times[row_of[value]] > 1 for value in values)
        assert schema.sharing[name] == round(shared / len(values), 6)


def killed_at(renames: int, work: Callable[..., Any], *arguments: Any) -> bool:
    """Do the work in a fork that kills itself at its so-manieth rename; whether it came so far."""
    child = os.fork()
    if child == 0:
        left, replace = [renames], Path.replace

        def dies(self: Path, target: Path) -> Path:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return replace(self, target)

        Path.replace = dies  # type: ignore[method-assign, assignment]
        try:
            work(*arguments)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.usefixtures("small")
def test_killed_anywhere_it_goes_on(days: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At twenty places between the first file and the last one, one after the other of the same preparation."""
    whole = content(prepare(days, tmp_path / "whole"))
    kills = 0
    while killed_at(7, prepare, days, tmp_path / "out"):
        assert not (tmp_path / "out").exists()
        kills += 1
    assert kills >= 20 and content(tmp_path / "out") == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.usefixtures("small")
def test_what_is_finished_is_not_repeated(days: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert killed_at(60, prepare, days, tmp_path / "out")
    finished = len(list((tmp_path / ".out.partial-work" / "pieces").glob("*.json")))
    read: list[Any] = []
    real = scan.read_unit
    monkeypatch.setattr(scan, "read_unit", lambda unit, *rest: read.append(unit) or real(unit, *rest))
    prepare(days, tmp_path / "out")
    total = sum(len(table_reader.units_of(p, s, criteo_spec("c"))) for s, ps in files(days).items() for p in ps)
    assert finished > 2 and len(read) == total - finished


@pytest.mark.usefixtures("small")
def test_killed_after_all_is_in_place(days: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stays behind beside a whole data set is no obstacle, and the next one is whole as well."""
    with monkeypatch.context() as patch:
        patch.setattr("megarec.data.preparation.work.shutil.rmtree", lambda *_, **__: None)
        first = content(prepare(days, tmp_path / "out"))
    assert (tmp_path / ".out.partial-work" / "tables").is_dir()
    assert content(prepare(days, tmp_path / "out")) == first and len(list(tmp_path.iterdir())) == 1


@pytest.mark.usefixtures("small")
def test_another_input_starts_again(days: Path, tmp_path: Path) -> None:
    assert killed_at(60, prepare, days, tmp_path / "out")
    prepare(days, tmp_path / "out", min_count=3)
    assert content(tmp_path / "out") == content(prepare(days, tmp_path / "whole", min_count=3))


@pytest.mark.usefixtures("small")
def test_workers_die_with_their_parent(days: Path, tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        try:
            prepare(days, tmp_path / "out", workers=2)
        finally:
            os._exit(0)
    pieces = tmp_path / ".out.partial-work" / "pieces"
    deadline = time.monotonic() + 60
    while not (pieces.is_dir() and any(pieces.glob("*.json"))) and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert content(prepare(days, tmp_path / "out", workers=2)) == content(prepare(days, tmp_path / "whole"))


SPEC = {
    "name": "n",
    "delimiter": ";",
    "columns": {
        "a": {"type": "categorical"},
        "b": {"type": "categorical", "dtype": "integer"},
        "x": {"type": "numeric"},
        "y": {"type": "label"},
    },
}
HEADER = b"a;b;x;y\n"
GOOD = b'"q;r";7;1.5;1\r\nann;12.0;2;0\r\n'
BAD = b"bob;x;1;1\r\nbob;1;;1\r\nbob;1\r\n\xff;1;1;1\r\nbob;1;1;7\r\n"


def mixed(tmp_path: Path, max_bad: MaxBad, rows: bytes = GOOD + BAD + GOOD * 300 + b"eve;1;1;2\n") -> Path:
    (tmp_path / "spec.json").write_text(json.dumps(SPEC))
    (tmp_path / "train.txt").write_bytes(b"\xef\xbb\xbf" + HEADER + rows)
    (tmp_path / "rest.txt").write_bytes(HEADER + GOOD)
    rest = [tmp_path / "rest.txt"]
    named = {"train": [tmp_path / "train.txt"], "valid": rest, "test": rest}
    prepare_table(tmp_path / "spec.json", named, tmp_path / "out", max_bad=max_bad)
    return tmp_path / "out"


@pytest.mark.parametrize("block", [100, 1 << 22])
def test_bad_rows_are_counted_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(text_files, "_BLOCK_BYTES", block)
    out = mixed(tmp_path, MaxBad(6))
    schema = load_schema(out)
    assert schema.rows == {"train": 602, "valid": 2, "test": 2}
    assert schema.bad_rows == {"b": 1, "x": 1, "number of values": 1, "not UTF-8": 1, "y": 2}
    with (out / "quarantine.csv").open(newline="") as file:
        kept = list(csv.DictReader(file))
    assert [(row["row"], row["reason"]) for row in kept] == [
        *(("2", "b"), ("3", "x"), ("4", "number of values"), ("5", "not UTF-8"), ("6", "y")),
        ("607", "y"),
    ]
    assert {row["file"] for row in kept} == {str(tmp_path / "train.txt")}
    assert kept[0]["found"] == "b='x', expected an integer" and kept[3]["found"].startswith(r"a=b'\xff', expected UTF")
    assert pq.read_table(out / "train").to_pydict()["x"] == [1.5, 2.0] * 301


@pytest.mark.parametrize(
    ("max_bad", "message"),
    [
        (MaxBad(), r"train\.txt: row 2 \(from 0, header not counted\): b='x', expected an integer$"),
        (MaxBad(5), r"6 of 608 rows read are bad \(.*2 for y.*\), more than --max-bad 5 allows; the first: .* row 2 "),
        (MaxBad(share=0.005), r"6 of 612 rows read are bad .*, more than --max-bad 0\.005 allows; the first"),
    ],
)
def test_too_many_bad_rows(tmp_path: Path, max_bad: MaxBad, message: str) -> None:
    with pytest.raises(UserError, match=message):
        mixed(tmp_path, max_bad)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rest.txt", "spec.json", "train.txt"]


def test_a_share_of_bad_rows(tmp_path: Path) -> None:
    assert load_schema(mixed(tmp_path, MaxBad(share=0.01))).rows["train"] == 602


def test_the_row_of_a_later_unit_is_counted_in_its_file(days: Path, tmp_path: Path, small: None) -> None:
    paths = files(days)
    broken = tmp_path / "day_9"
    text = (days / "day_0").read_text().splitlines()
    broken.write_text("\n".join([*text[:1200], "", "x" + text[1200], *text[1201:]]) + "\n")
    with pytest.raises(
        UserError, match=r"day_9: row 1200 \(from 0, header not counted\): label='x\d', expected 0 or 1"
    ):
        prepare_spec(criteo_spec("c"), "c", paths | {"train": [broken]}, tmp_path / "out", None, 2, MaxBad())
    assert [path.name for path in tmp_path.iterdir()] == ["day_9"]


@pytest.mark.usefixtures("small")
def test_one_input_is_split_by_chance(days: Path, tmp_path: Path) -> None:
    """Every row once; the same rows for any number of workers; vocabularies of the training rows alone."""
    paths = {"all": [days / name for name in ROWS]}
    outs = []
    for workers, seed in ((1, 1), (2, 1), (1, 2)):
        outs.append(tmp_path / f"{workers}-{seed}")
        shares = Shares((0.6, 0.3, 0.1), seed)
        prepare_spec(criteo_spec("c"), "c", paths, outs[-1], None, workers, MaxBad(), shares)
    assert content(outs[0]) == content(outs[1]) != content(outs[2])
    rows = load_schema(outs[0]).rows
    assert sum(rows.values()) == sum(ROWS.values())
    assert abs(rows["train"] / 2750 - 0.6) < 0.04 and abs(rows["test"] / 2750 - 0.1) < 0.03
    raw = Counter(
        tuple(np.float32(np.log1p(float(row[i] or 0))) if float(row[i] or 0) >= 0 else None for i in (1, 2, 3))
        for name in ROWS
        for row in lines(days / name)
    )
    found = Counter()
    for split in rows:
        table = pq.read_table(outs[0] / split).to_pydict()
        found.update(
            tuple(np.float32(x) if x >= 0 else None for x in row)
            for row in zip(table["I1"], table["I2"], table["I3"], strict=True)
        )
    assert found == raw
    for name in ("C1", "C4"):
        words = pq.read_table(outs[0] / "vocabulary" / f"{name}.parquet")
        ids = Counter(pq.read_table(outs[0] / "train")[name].to_pylist())
        assert [ids[row] for row in words["row"].to_pylist()] == sorted(
            (n for row, n in ids.items() if row), reverse=True
        )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "x", "--train", "y"], "--data is split, --train is one split already; keep one of them"),
        (["--train", "y", "--seed", "2"], "--seed says how to split --data; name its files"),
        (["--data", "x", "--fractions", "0.5", "0.4", "0.2"], "--fractions 0.5 0.4 0.2: expected three shares above 0"),
        (["--data", "x", "--max-bad", "1.5"], "'1.5' is neither a number of rows nor a share below 1"),
        (["--data", "x*"], "no file is there"),
        (["--data", "x", "--workers", "0"], "--workers 0: expected at least 1"),
        (["--data", "x", "--hash", "9", "--min-count", "2"], "--hash and --min-count exclude each other"),
    ],
)
def test_options_that_make_no_sense(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("sys.argv", ["prepare", "criteo", "--output", "out", *words])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2 and message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_days_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for name in ("day_10", "day_9", "day_0", ".hidden", "_SUCCESS"):
        (tmp_path / name).touch()
    in_order = [tmp_path / name for name in ("day_0", "day_9", "day_10")]
    assert listed([tmp_path]) == listed([tmp_path / "day_*"]) == listed(in_order) == in_order
