"""Malformed files of every format and odd specs, seeded: counted rows, or one line with exit 2 and nothing left.

`python -m tests.data.test_fuzz_formats 1000` runs that many cases, each with its number in case of a fault.
"""

import contextlib
import gzip
import io
import json
import random
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pytest

from megarec.commands.prepare_data import main
from megarec.data.schema import load_schema
from tests.data.preparation.test_formats import FORMATS, Table, write, zstd
from tests.data.test_fuzz_tables import broken

COLUMNS: dict[str, Any] = {
    "a": {"type": "categorical"},
    "b": {"type": "categorical", "dtype": "integer"},
    "h": {"type": "categorical", "dtype": "hexadecimal"},
    "l": {"type": "multi_valued"},
    "x": {"type": "numeric", "missing": 0},
    "v": {"type": "vector", "length": 3, "separator": "|", "missing": 0},
    "m": {"type": "calendar"},
    "q": {"type": "bucketised", "buckets": 3},
    "y": {"type": "label"},
}
ODD = [
    None,
    "",
    "NA",
    "nan",
    "7.0",
    "1e999",
    "-0",
    "x" * 70_000,
    "\0",
    "\ud7ff",
    "'",
    '"',
    '"a"b',
    "a\nb",
    "1" * 400,
    "|",
]
ODD_JSON = [
    *ODD,
    1e999,
    float("nan"),
    True,
    10**400,
    1e-320,
    [],
    [1, None],
    [[1]],
    {"a": 1},
    {},
    [True, "NA"],
    -(2**63),
]
ENDINGS = [b"\n", b"\r\n", b"\r"]


def good(rows: int) -> Table:
    return {
        "a": [f"u{i}" for i in range(rows)],
        "b": list(range(rows)),
        "h": [f"{i:08x}" for i in range(rows)],
        "l": [["p", f"q{i}"] for i in range(rows)],
        "x": [i + 0.5 for i in range(rows)],
        "v": [[1.5, 2.5, float(i)] for i in range(rows)],
        "m": [f"2026-01-0{i + 1} 10:00:00" for i in range(rows)],
        "q": [float(i) for i in range(rows)],
        "y": [i % 2 for i in range(rows)],
    }


def typed(chance: random.Random) -> Table:
    """Columns of types that parquet and Arrow have and nobody expects there."""
    found = good(4)
    for name in chance.sample(sorted(found), chance.randint(1, 3)):
        value = chance.choice([*ODD_JSON[:11], b"\xff", 7, 2.5, True, [1, None], [[1]], {"a": 1}, 2**63, [1.5] * 3])
        found[name] = [value, None, value, value]
    return found


def one_file(path: Path, chance: random.Random) -> None:
    """A file that is wrong in some way, or right."""
    name, way = path.name, chance.choice(["bytes", "values", "cut", "ends", "encoding", "empty", "not it"])
    table = good(6)
    text = not any(part in name for part in ("parquet", "arrow", "feather"))
    if way == "values" and text:
        odd = ODD_JSON if "json" in name.lower() else ODD
        for column in chance.sample(sorted(table), chance.randint(1, 3)):
            table[column][chance.randrange(6)] = chance.choice(odd)
    elif way == "values":
        with contextlib.suppress(pa.ArrowException, TypeError, OverflowError, UnicodeError):
            write(path, typed(chance))
            return
    with mock.patch.dict("tests.data.preparation.test_formats.LISTS", {"v": "|"}):
        write(path, table)
    data = path.read_bytes()
    if way == "empty":
        data = b""
    elif way == "not it":
        data = chance.choice(
            [b"\0" * 100, b"PAR1", b"ARROW1\0\0", gzip.compress(b""), zstd(b""), b"\x28\xb5\x2f\xfd", b"[1]"]
        )
    elif way == "cut":
        data = data[: chance.randrange(len(data))]
    elif not text or (way == "bytes" and chance.random() < 0.3):
        data = flipped(data, chance)
    else:
        plain = gzip.decompress(data) if name.endswith(".gz") else unzstd(data) if name.endswith(".zst") else data
        if way == "ends":
            plain = b"".join(line + chance.choice(ENDINGS) for line in plain.split(b"\n"))
        elif way == "encoding":
            plain = plain.decode(errors="replace").encode(chance.choice(["utf-16", "utf-16-le", "utf-8-sig", "cp500"]))
        elif way == "bytes":
            plain = broken(plain, chance)
        data = gzip.compress(plain) if name.endswith(".gz") else zstd(plain) if name.endswith(".zst") else plain
    path.write_bytes(data)


def flipped(data: bytes, chance: random.Random) -> bytes:
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(data))
        data = (
            data[:at]
            + bytes([chance.randrange(256)]) * chance.choice([1, 1, 4])
            + data[at + chance.choice([0, 1, 4]) :]
        )
    return data


def unzstd(data: bytes) -> bytes:
    return pa.CompressedInputStream(pa.BufferReader(data), "zstd").read()


def one_spec(chance: random.Random) -> dict[str, Any]:
    spec: dict[str, Any] = {"name": "n", "columns": json.loads(json.dumps(COLUMNS))}
    if chance.random() < 0.3:
        spec["null_words"] = chance.choice([["NA"], ["7", "u1"], [""], ["0", "0.0", "true"], "NA", [1]])
    if chance.random() < 0.2:
        spec["encoding"] = chance.choice(["latin-1", "utf-16", "utf-8-sig", "cp500", "ascii", "utf-7", "rot13", "", 7])
    if chance.random() < 0.2:
        spec["header"] = chance.choice([False, "auto", "auto", None, "no"])
    if chance.random() < 0.1:
        spec["delimiter"] = chance.choice([";", ",", "\t", "|", "ab", "\n", ""])
    if chance.random() < 0.2:
        key = chance.choice(["length", "separator", "format", "type", "log", "standardise", "missing"])
        spec["columns"][chance.choice("vmxab")][key] = chance.choice(
            [0, 3, "%", "", "%y", "|", True, None, 10**9, "vector"]
        )
    return spec


def run_case(work: Path, number: int) -> str:
    """What became of a case: "ok", "rows" (some were left out) or "refused".

    Raises:
        AssertionError: anything else.
    """
    chance = random.Random(number)
    rows = work / FORMATS[number % len(FORMATS)]
    one_file(rows, chance)
    (work / "spec.json").write_text(json.dumps(one_spec(chance)))
    before = sorted(path.name for path in work.iterdir())
    words = ["prepare", "table", f"--schema={work / 'spec.json'}", f"--output={work / 'out'}", "--workers=1"]
    words += [f"--{split}={rows}" for split in ("train", "valid", "test")]
    words += chance.choice([[], ["--max-bad=100"], ["--max-bad=0.5"]])
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), mock.patch.object(sys, "argv", words):
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    printed = err.getvalue()
    after = sorted(path.name for path in work.iterdir())
    if code == 2:
        assert printed.startswith("error: ") and printed.count("\n") == 1 and len(printed) < 3000, printed[:3000]
        assert after == before, after
        return "refused"
    assert code == 0 and "Traceback" not in printed, (code, printed)
    assert after == sorted([*before, "out"]), after
    return "rows" if load_schema(work / "out").bad_rows else "ok"


def run_cases(numbers: range) -> Counter[str]:
    """How many cases ended how."""
    found = Counter[str]()
    for number in numbers:
        with tempfile.TemporaryDirectory() as work:
            try:
                found[run_case(Path(work), number)] += 1
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                raise AssertionError(f"case {number} ({FORMATS[number % len(FORMATS)]})") from error
    return found


def test_some_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("signal.signal", lambda *_: None)
    found = run_cases(range(60))
    assert set(found) == {"ok", "rows", "refused"}, found


if __name__ == "__main__":
    ends, faults = Counter[str](), 0
    for case in range(int(sys.argv[1])):
        print(case, end="\r", file=sys.stderr)
        try:
            ends.update(run_cases(range(case, case + 1)))
        except AssertionError as fault:
            faults += 1
            print(f"\n{fault}: {''.join(traceback.format_exception(fault.__cause__)[-4:])}"[:1500], flush=True)
    print(dict(ends), "faults:", faults)
