"""A data set has an identity: what was prepared with other vocabularies, hashes or transforms does not mix."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

from megarec.checkpoint.compatibility import check_schema
from megarec.data.preparation.prepare import prepare_as, prepare_table
from megarec.data.schema import Schema, load_schema, select_features
from megarec.data.sources import planted
from megarec.data.sources.planted import prepare_planted
from megarec.data.sources.synthetic import Shape, _schema, prepare_like, prepare_synthetic
from megarec.errors import UserError
from megarec.evaluation.opened import fitting_schema
from tests.data.preparation.test_prepare import write_spec

COLUMNS: dict[str, Any] = {
    "user": {"type": "categorical"},
    "site": {"type": "categorical", "hash": 9},
    "seen": {"type": "multi_valued", "table": "user"},
    "price": {"type": "numeric", "log": True, "missing": 0},
    "y": {"type": "label"},
}
HEADER = "user,site,seen,price,y\n"
ONE = HEADER + "ann,a,bob|ann,1,1\nann,a,,,0\nbob,b,,2,1\n"
OTHER = HEADER + "bob,a,,1,1\nbob,a,,,0\nann,b,bob,2,1\n"  # the same sizes, another order of the vocabulary


def prepare(path: Path, name: str, text: str, columns: dict[str, Any] | None = None, like: Path | None = None) -> Path:
    rows = path / f"{name}.csv"
    rows.write_text(text)
    spec = write_spec(path, {"name": "n", "columns": COLUMNS | (columns or {})})
    if like is not None:
        prepare_as(like, {"test": [rows]}, path / name)
    else:
        prepare_table(spec, {split: [rows] for split in ("train", "valid", "test")}, path / name)
    return path / name


def resume(trained: Path, here: Path) -> None:
    index: Any = SimpleNamespace(data_schema=load_schema(trained).model_dump(mode="json"))
    check_schema(Path("run"), index, load_schema(here).model_dump(mode="json"))


@pytest.mark.parametrize(
    ("text", "columns", "feature"),
    [
        (OTHER, {}, "user means vocabulary"),
        (ONE.replace("bob", "eve"), {}, "user means vocabulary"),
        (
            ONE,
            {"price": {"type": "numeric", "missing": 0}},
            r"price means sign\(x\) log.* there, x, 0 where missing here",
        ),
        (ONE, {"price": {"type": "numeric", "log": True, "missing": -1}}, "price means"),
        (ONE, {"user": {"type": "categorical", "hash": 3}}, "user means vocabulary .* there, BLAKE2b-64"),
    ],
)
def test_data_prepared_in_another_way_are_refused(
    tmp_path: Path, text: str, columns: dict[str, Any], feature: str
) -> None:
    one, other = prepare(tmp_path, "one", ONE), prepare(tmp_path, "other", text, columns)
    with pytest.raises(UserError, match=rf"run was trained on other data: {feature}.*--like"):
        resume(one, other)
    with pytest.raises(UserError, match=rf"schema.json: the model was trained on other data: {feature}"):
        fitting_schema(load_schema(one), load_schema(other), other / "schema.json")


def test_the_same_and_older_data_fit(tmp_path: Path) -> None:
    one, again = prepare(tmp_path, "one", ONE), prepare(tmp_path, "again", ONE)
    resume(one, again)
    assert load_schema(one).identity == load_schema(again).identity
    other = prepare(tmp_path, "other", OTHER)
    content = json.loads((other / "schema.json").read_text())
    del content["identity"], content["unknown"]
    (other / "schema.json").write_text(json.dumps(content))
    resume(one, other)  # an earlier version wrote it: nothing is known, nothing refused
    resume(other, one)


def test_only_features_in_use_are_compared(tmp_path: Path) -> None:
    one = select_features(load_schema(prepare(tmp_path, "one", ONE)), ["site", "price"])
    other = select_features(load_schema(prepare(tmp_path, "other", OTHER)), ["site", "price"])
    assert set(one.identity) == {"site", "price"}
    fitting_schema(one, other, Path("schema.json"))


def test_tomorrows_files_by_the_rules_of_today(tmp_path: Path) -> None:
    one = prepare(tmp_path, "one", ONE)
    tomorrow = prepare(tmp_path, "tomorrow", OTHER.replace("ann,b", "eve,b"), like=one)
    schema = load_schema(tomorrow)
    resume(one, tomorrow)
    assert pq.read_table(tomorrow / "test")["user"].to_pylist() == [2, 2, 0]
    assert schema.identity == load_schema(one).identity and schema.rows == {"test": 3}
    assert schema.unknown["test"] == {"user": 0.333333, "seen": 0.0}
    after = prepare(tmp_path, "after", ONE, like=tomorrow)  # the rules go with the data
    assert pq.read_table(after / "test").equals(pq.read_table(one / "test"))


def test_a_damaged_vocabulary(tmp_path: Path) -> None:
    one = prepare(tmp_path, "one", ONE)
    file = one / "vocabulary" / "user.parquet"
    table = pq.read_table(file)
    pq.write_table(table.set_column(0, "value", [["bob", "ann"]]), file)
    with pytest.raises(UserError, match=r"one is not what was prepared: user means vocabulary .*; prepare it again"):
        prepare(tmp_path, "tomorrow", OTHER, like=one)
    file.write_bytes(b"x")
    with pytest.raises(UserError, match=r"user\.parquet cannot be read"):
        prepare(tmp_path, "tomorrow", OTHER, like=one)


OTHERS = {  # of the same columns and sizes
    "seed": lambda path: prepare_synthetic(Shape(examples=50, seed=2), path),
    "numeric features": lambda path: prepare_synthetic(Shape(examples=50, numeric=4), path),
    "rows": lambda path: prepare_synthetic(Shape(examples=50, rows=99), path),
    "features like these": lambda path: prepare_like(LIKE, path, examples=50, seed=3),
}
LIKE = _schema(Shape(examples=50))


@pytest.mark.parametrize("other", OTHERS)
def test_synthetic_data_have_an_identity_too(other: str, tmp_path: Path) -> None:
    here = prepare_synthetic(Shape(examples=50), tmp_path / "here")
    more = prepare_synthetic(Shape(examples=80), tmp_path / "more")
    like = prepare_like(LIKE, tmp_path / "like", examples=60, seed=1)
    assert set(here.identity) == {*(f.name for f in here.categorical), *here.numeric}
    assert here.identity == more.identity == like.identity  # the same planted model, whatever the number of rows
    fitting_schema(here, more, Path("schema.json"))
    resume(tmp_path / "here", tmp_path / "more")
    OTHERS[other](tmp_path / "other")
    with pytest.raises(
        UserError, match=r"trained on other data: .*(single_0 means made up with seed 1 .* there|there,)"
    ):
        resume(tmp_path / "here", tmp_path / "other")
    with pytest.raises(UserError, match=r"single_0 means made up with seed 1 .* there, made up with .*; take the seed"):
        fitting_schema(here, load_schema(tmp_path / "other"), Path("schema.json"))


def test_planted_data_have_an_identity_too(tmp_path: Path) -> None:
    schemas = [
        prepare_planted(
            planted.Shape(examples=40, features=4, order=order, groups=groups, seed=seed), tmp_path / str(i)
        )
        for i, (order, groups, seed) in enumerate([(3, 2, 1), (3, 2, 2), (2, 2, 1), (3, 1, 1)])
    ]
    for number, other in enumerate(schemas[1:], 1):
        with pytest.raises(UserError, match=r"f00 means made up with seed 1 \(2 interactions of orders 1 to 3"):
            fitting_schema(schemas[0], other, Path("schema.json"))
        with pytest.raises(UserError, match="f00 means made up"):
            resume(tmp_path / "0", tmp_path / str(number))


def test_made_up_and_real_values_do_not_mix(tmp_path: Path) -> None:
    one = load_schema(prepare(tmp_path, "one", ONE))
    prepare_like(one, tmp_path / "made up", examples=50, seed=1)
    for there, here in (("one", "made up"), ("made up", "one")):
        with pytest.raises(UserError, match=r"trained on other data: user means .*--like"):
            resume(tmp_path / there, tmp_path / here)


def test_schemas_of_earlier_versions_are_valid() -> None:
    schema = Schema.model_validate({"name": "n", "categorical": [{"name": "a", "rows": 2}], "rows": {}})
    assert (schema.identity, schema.unknown) == ({}, {})
