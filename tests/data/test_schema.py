from pathlib import Path

import pytest
from pydantic import ValidationError

from megarec.config.sections import DataConfig
from megarec.data.schema import Schema, load_schema, save_schema, schema_of, select_features
from megarec.errors import UserError
from tests.data.prepared import SCHEMA


def test_all_features() -> None:
    assert select_features(SCHEMA, None) == SCHEMA


def test_some_features_in_schema_order() -> None:
    chosen = select_features(SCHEMA, ["age", "item", "user"])
    assert [f.name for f in chosen.categorical] == ["user", "item"]
    assert chosen.numeric == ("age",)
    assert chosen.rows == SCHEMA.rows and chosen.label == SCHEMA.label


def test_a_shared_table_keeps_its_owner() -> None:
    chosen = select_features(SCHEMA, ["history", "item"])
    assert [(f.name, f.table) for f in chosen.categorical] == [("item", None), ("history", "item")]


def test_a_shared_table_without_its_owner_passes_to_the_next() -> None:
    more = SCHEMA.categorical[3].model_copy(update={"name": "saved"})
    schema = SCHEMA.model_copy(update={"categorical": (*SCHEMA.categorical, more)})
    chosen = select_features(schema, ["saved", "history"])
    assert [(f.name, f.table, f.rows) for f in chosen.categorical] == [("history", None, 30), ("saved", "history", 30)]
    type(chosen).model_validate(chosen.model_dump())  # consistent by the schema's own rules


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["usr"], "data.features names 'usr', which test does not have; did you mean 'user'?"),
        (["zzz"], "data.features names 'zzz', which test does not have; known: user, tags, item, history, price, age"),
        (["user", "age", "user"], "data.features names 'user' 2 times; name it once"),
        ([], "data.features is empty; name some of: user, tags, item, history, price, age; or leave it out to use all"),
    ],
)
def test_mistakes(names: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        select_features(SCHEMA, names)
    assert str(caught.value) == message


def test_round_trip(tmp_path: Path) -> None:
    save_schema(SCHEMA, tmp_path)
    assert load_schema(tmp_path) == SCHEMA


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"schema\.json does not exist: prepare the data first"),
        ("{", r"schema\.json:1:2: not JSON: "),
        (
            '{"name": "x", "categorical": [{"name": "a", "rows": 0}], "rows": {}}',
            r"schema\.json: categorical\.0\.rows: ",
        ),
        (b"\xff", r"schema\.json: "),
    ],
)
def test_a_schema_that_cannot_be_read(tmp_path: Path, text: str | bytes | None, message: str) -> None:
    if text is not None:
        (tmp_path / "schema.json").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(UserError, match=message):
        load_schema(tmp_path)


def test_the_schema_of_data_that_is_not_here(tmp_path: Path) -> None:
    save_schema(SCHEMA, tmp_path)
    there, other = str(tmp_path), str(tmp_path / "schema.json")
    assert schema_of(DataConfig(path=there)) == SCHEMA
    assert schema_of(DataConfig(path="absent", schema=other)) == SCHEMA
    assert schema_of(DataConfig(path=there, features=["user"])) == select_features(SCHEMA, ["user"])


def test_a_missing_schema_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"data\.path='absent' holds no schema\.json: prepare the data .*, or set data\.schema"
    ):
        schema_of(DataConfig(path="absent"))
    save_schema(SCHEMA, tmp_path)
    with pytest.raises(
        UserError, match=r"data\.schema='absent\.json': no such file; the path is relative to the config"
    ):
        schema_of(DataConfig(path=str(tmp_path), schema="absent.json"))


def test_a_group_is_a_column_of_its_own_or_a_single_valued_feature() -> None:
    values = SCHEMA.model_dump()
    assert Schema.model_validate(values | {"group": "session"}).group == "session"
    assert Schema.model_validate(values | {"group": "user"}).group == "user"
    for name in ("tags", "price", "label"):
        with pytest.raises(ValidationError, match=f"columns named twice: {name}"):
            Schema.model_validate(values | {"group": name})
