"""The scorer's rules for raw values are those of preparation, to the bit: both take or refuse the same rows."""

import csv
import json
import math
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarec.data.preparation.encode_rows import RowEncoder as Reference
from megarec.data.preparation.kept_spec import load_prepared
from megarec.data.preparation.prepare import MaxBad, prepare_table
from megarec.errors import UserError
from megarec.serving.export.bundle import _write_manifest
from megarec.serving.export.raw_values import write_raw_values
from megarec.serving.scorer.bundle import FORMAT, VERSION, Bundle
from megarec.serving.scorer.rows import RowEncoder

COLUMNS: dict[str, Any] = {
    "text": {"type": "categorical", "min_count": 2},
    "whole": {"type": "categorical", "dtype": "integer"},
    "hex": {"type": "categorical", "dtype": "hexadecimal"},
    "hashed": {"type": "categorical", "hash": 50},
    "many": {"type": "multi_valued", "dtype": "integer", "table": "whole", "separator": " "},
    "seen": {"type": "sequence", "max_length": 3, "newest": "last", "pooling": "mean"},
    "how": {"type": "weights", "of": "seen"},
    "first": {"type": "sequence", "max_length": 2, "newest": "first", "table": "text"},
    "age": {"type": "bucketised", "boundaries": [18, 30.5, 60]},
    "height": {"type": "numeric", "standardise": True},
    "spent": {"type": "numeric", "log": True, "standardise": True, "missing": 0},
    "plain": {"type": "numeric", "missing": -1},
    "vector": {"type": "vector", "length": 2, "separator": ";", "missing": 0, "log": True},
    "when": {"type": "calendar"},
    "y": {"type": "label"},
}
NULL_WORDS = ["NA", "zz"]
ROWS = [
    [
        "a",
        "1",
        "0a",
        "x",
        "1 2",
        "a|b||c",
        "1|2|3|4",
        "a|zz|b",
        "17",
        "1.5",
        "2",
        "3",
        "0.5;-2",
        "2020-02-29 23:59:59",
        "1",
    ],
    ["a", "2", "ff", "y", "", "", "", "", "", "2.5", "", "", "", "", "0"],
    ["b", "2", "FF", "7.0", "3", "b", "0.5", "b", "60", "4", "-9", "1e3", "1;2", "2021-01-01 00:00:00", "0"],
    ["b", "-5", "123456789abcdef", "True", "2 2", "c|a", "1|1", "", "30.5", "-1", "0.1", "-0", "NA", "NA", "1"],
    ["é€", "0", "", "", "7", "é€", "-1", "é€", "1e6", "0", "7", "5", "3;NA", "2022-06-06 06:06:06", "1"],
    [
        "é€",
        "9223372036854775807",
        "1",
        "z",
        "",
        "true|7",
        "2|2",
        "a",
        "-0",
        "9",
        "1",
        "NA",
        "0;0",
        "2023-12-31 12:00:00",
        "0",
    ],
]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Reference, RowEncoder]:
    directory = tmp_path_factory.mktemp("raw")
    (directory / "spec.json").write_text(json.dumps({"name": "all", "null_words": NULL_WORDS, "columns": COLUMNS}))
    with (directory / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([list(COLUMNS), *ROWS])
    data = directory / "data"
    splits = {split: [directory / "rows.csv"] for split in ("train", "valid", "test")}
    schema = prepare_table(directory / "spec.json", splits, data, workers=1, max_bad=MaxBad())
    out = directory / "out"
    out.mkdir()
    ids, numbers = write_raw_values(schema, data, load_prepared(data).kept, out)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "null_words": NULL_WORDS,
        "tables": {f.name: {"rows": f.rows} for f in schema.categorical},
        "features": [
            {"name": f.name, "table": f.table or f.name, "multi_valued": f.multi_valued, "raw": ids[f.name]}
            for f in schema.categorical
        ],
        "numeric": [{"name": name, "raw": numbers[name]} for name in schema.numeric],
    }
    _write_manifest(out, manifest)
    return Reference(data), RowEncoder(Bundle(out))


def scored(encoder: RowEncoder, row: dict[str, Any]) -> dict[str, Any] | None:
    found = encoder.encode([row])
    if found.errors:
        return None
    values: dict[str, Any] = {}
    for name, ids in found.ids.items():
        values[name] = ids.values.tolist() if ids.lengths is not None else int(ids.values[0])
        assert ids.lengths is None or ids.lengths.tolist() == [len(ids.values)]
        if ids.weights is not None:
            values[f"{name}:weights"] = ids.weights.tolist()
    return values | dict(
        zip(("height", "spent", "plain", "vector_0", "vector_1"), found.numeric[0].tolist(), strict=True)
    )


def prepared(encoder: Reference, row: dict[str, Any]) -> dict[str, Any] | None:
    try:
        return encoder.encode([row]).to_pylist()[0]
    except UserError:
        return None


def test_the_rows_of_the_files(encoders: tuple[Reference, RowEncoder]) -> None:
    reference, encoder = encoders
    for row in ROWS:
        raw = dict(zip(COLUMNS, row, strict=True))
        found = scored(encoder, raw)
        assert found is not None and found == prepared(reference, raw)
    together = encoder.encode([dict(zip(COLUMNS, row, strict=True)) for row in ROWS])
    assert together.kept == list(range(len(ROWS))) and together.numeric.dtype == np.float32
    assert together.ids["seen"].lengths is not None and together.ids["seen"].lengths.tolist() == [3, 0, 1, 2, 1, 2]


WORDS = [
    "a",
    "b",
    "zz",
    "é€",
    "7",
    "7.0",
    "7.50",
    "-0",
    "-00.0",
    "0",
    "True",
    "FALSE",
    "true",
    " a",
    "1e3",
    "ff",
    "0x1",
]
ODD = [None, "", *WORDS, 0, -5, 2, 2**63 - 1, 2**63, 7.0, 7.5, -0.0, 2.0**53, math.nan, math.inf, True, Decimal("2.0")]
NUMBERS = [None, "", "17", "18", "-0", "30.5", "1e3", "nan", "inf", "x", 1e300, "1e39", 3.4e38, True, "true", 5, 2**70]
LISTS = [None, "", "a", "a|b", "a||b|c|zz", "1 2", "2  -5", [], ["a", None, "b"], [2, -5], [7.0, 2.0], "x y"]
VALUES: dict[str, list[Any]] = {
    **dict.fromkeys(("text", "whole", "hex", "hashed"), ODD),
    **dict.fromkeys(("many", "seen", "first"), LISTS),
    "how": [None, "", "1", "1|2", "1|2|3|4|5", "0.1|x", [1.5, 2.5], [1, None], [1, 2, 3]],
    **dict.fromkeys(("age", "height", "spent", "plain"), NUMBERS),
    "vector": [None, "", "1;2", "1;2;3", "1", "x;2", "NA;1", [1, 2], [1, None], [], [1.5], "zz", "1e39;1"],
    "when": [
        None,
        "",
        "NA",
        "2020-02-29 23:59:59",
        "2020-2-9 1:2:03",
        "2020-01-01 24:00:00",
        "2020-01-01 00:00:60",
        "2021-02-29 00:00:00",
        "2020-02-29",
        5,
        "x",
        "1969-12-31 23:00:00",
    ],
}


@settings(max_examples=300, deadline=None)
@given(changed=st.fixed_dictionaries({}, optional={name: st.sampled_from(values) for name, values in VALUES.items()}))
def test_the_same_rows_and_the_same_numbers(encoders: tuple[Reference, RowEncoder], changed: dict[str, Any]) -> None:
    row = dict(zip(COLUMNS, ROWS[0], strict=True)) | changed
    reference, encoder = encoders
    assert scored(encoder, row) == prepared(reference, row)


@pytest.mark.parametrize("name", VALUES)
def test_each_odd_value_of_each_column(name: str, encoders: tuple[Reference, RowEncoder]) -> None:
    reference, encoder = encoders
    for value in VALUES[name]:
        row = dict(zip(COLUMNS, ROWS[2], strict=True)) | {name: value}
        assert scored(encoder, row) == prepared(reference, row), value


@pytest.mark.timeout(60)
def test_hostile_values_are_refused_at_once(encoders: tuple[Reference, RowEncoder]) -> None:
    """Text that a careless pattern reads in two ways, half of a pair of UTF-16, what repr itself refuses."""
    good, digits, deep = dict(zip(COLUMNS, ROWS[0], strict=True)), "9" * 100_000, []
    for _ in range(20_000):
        deep = [deep]
    rows: list[Any] = []
    read = [name for name in COLUMNS if name != "y"]
    for name in read:
        hostile = [f"{digits}x", f"{digits}.{digits}x", f"-{digits}e", "\ud800", deep, 10**5000, {"a": 1}, 1 << 70]
        rows += [good | {name: value} for value in hostile]
    found = encoders[1].encode(rows)
    scored = {read[place // 8] for place in found.kept}
    assert scored <= {"text", "hashed", "seen", "first"}, "any text names a category"
    assert all("\n" not in why and len(why) < 300 for why in found.errors.values())
    assert all(8 * place + 3 in found.errors for place in range(len(read))), "the half of a pair"


def test_values_of_python_that_no_file_has(encoders: tuple[Reference, RowEncoder]) -> None:
    good = dict(zip(COLUMNS, ROWS[0], strict=True))
    early = datetime.min.replace(tzinfo=timezone(timedelta(hours=5)))
    found = encoders[1].encode([good | {"when": early}, good | {"height": Decimal("sNaN")}, good])
    assert found.kept == [2] and found.errors[0].startswith("when=datetime.datetime(1, 1, 1")
    assert found.errors[1] == "height=Decimal('sNaN'), expected a number"


def test_arrays_are_lists_and_no_other_value(encoders: tuple[Reference, RowEncoder]) -> None:
    """Rows of pandas have them."""
    good = dict(zip(COLUMNS, ROWS[0], strict=True))
    read = [name for name in COLUMNS if name not in ("y", "how")]
    found = encoders[1].encode([good | {name: np.arange(2)} for name in read])
    assert [read[place] for place in found.kept] == ["many", "first", "vector"]
    assert "seen" in found.errors[read.index("seen")], "4 weights"
    assert all(why.startswith(read[place]) or place == read.index("seen") for place, why in found.errors.items())
    lists, arrays = (
        scored(encoders[1], good | {"many": made([2, -5]), "first": made([])}) for made in (list, np.array)
    )
    assert lists == arrays and lists is not None
    found = encoders[1].encode([good | {name: np.eye(2)} for name in read])
    assert not found.kept and all("\n" not in why for why in found.errors.values())


def test_a_bad_row_has_its_own_error(encoders: tuple[Reference, RowEncoder]) -> None:
    good = dict(zip(COLUMNS, ROWS[0], strict=True))
    without = {name: value for name, value in good.items() if name != "whole"}
    found = encoders[1].encode([good | {"hex": "xyz"}, good, without, "no row", good | {"height": "tall"}])  # type: ignore
    assert found.kept == [1] and len(found.numeric) == 1
    assert found.errors == {
        0: "hex='xyz', expected text of 1 to 15 hexadecimal digits",
        2: "whole is not in the row; give every column, null where its value is missing",
        3: "'no row', expected an object with the columns as keys",
        4: "height='tall', expected a number",
    }
