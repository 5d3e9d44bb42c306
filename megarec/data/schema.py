"""What prepared data looks like: `schema.json` beside the parquet shards of each split."""

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from megarec.errors import UserError

SCHEMA_FILE = "schema.json"
SPLITS = ("train", "valid", "test")
Split = Literal["train", "valid", "test"]


class CategoricalFeature(BaseModel):
    """A feature looked up in an embedding table; ids are integers in [0, rows)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    rows: int = Field(gt=0, description="rows of the table; every id lies in [0, rows)")
    multi_valued: bool = Field(False, description="a list of ids per example (may be empty), else exactly one id")
    pooling: Literal["sum", "mean"] = Field("sum", description="how a list's rows become one embedding")
    table: str | None = Field(None, description="the feature whose table this one shares; null: a table of its own")


class Schema(BaseModel):
    """The columns of a prepared data set, in canonical feature order.

    Every parquet shard has: one column a categorical feature (int64, or list<int64> when multi-valued), one
    float32 column a numeric feature, and the label column (0 or 1).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    name: str
    label: str = "label"
    label_rule: str = Field("", description="how the label was made, for people")
    categorical: tuple[CategoricalFeature, ...]
    numeric: tuple[str, ...] = ()
    rows: dict[str, int] = Field(description="examples per split")
    source: str = Field("", description="where the data came from, for people")

    @model_validator(mode="after")
    def _consistent(self) -> "Schema":
        names = [f.name for f in self.categorical] + list(self.numeric) + [self.label]
        repeated = sorted({n for n in names if names.count(n) > 1})
        if repeated:
            raise ValueError(f"columns named twice: {', '.join(repeated)}")
        by_name = {f.name: f for f in self.categorical}
        for feature in self.categorical:
            owner = by_name.get(feature.table or feature.name)
            if owner is None or owner.table is not None:
                raise ValueError(f"{feature.name}.table={feature.table!r} is not a feature with a table of its own")
            if owner.rows != feature.rows:
                raise ValueError(f"{feature.name}.rows={feature.rows} differs from its table's rows={owner.rows}")
        return self


def load_schema(directory: Path) -> Schema:
    """Read `schema.json` of a prepared data set.

    Raises:
        UserError: the file is missing or does not describe a data set; the message names it and the key.
    """
    path = directory / SCHEMA_FILE
    if not path.is_file():
        raise UserError(f"{path} does not exist: prepare the data first (python tools/prepare_data.py --help)")
    try:
        return Schema.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: {where + ': ' if where else ''}{first['msg']}") from error


def save_schema(schema: Schema, directory: Path) -> None:
    """Write `schema.json`, readable by people."""
    text = json.dumps(schema.model_dump(), indent=2) + "\n"
    (directory / SCHEMA_FILE).write_text(text, encoding="utf-8")
