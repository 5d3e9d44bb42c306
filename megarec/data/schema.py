"""What prepared data looks like: `schema.json` beside the parquet shards of each split."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from megarec.config.sections import DataConfig
from megarec.errors import UserError, did_you_mean
from megarec.files import read_object

SCHEMA_FILE = "schema.json"
SPLITS = ("train", "valid", "test")
Split = Literal["train", "valid", "test"]


class CategoricalFeature(BaseModel):
    """A feature looked up in an embedding table; ids are integers in [0, rows)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    rows: int = Field(gt=0, le=2**40, description="rows of the table; every id lies in [0, rows)")
    multi_valued: bool = Field(False, description="a list of ids per example (may be empty), else exactly one id")
    pooling: Literal["sum", "mean"] = Field("sum", description="how a list's rows become one embedding")
    table: str | None = Field(None, description="the feature whose table this one shares; null: a table of its own")
    weighted: bool = Field(False, description="every id of a list has a weight that its row is multiplied by")
    newest: Literal["first", "last"] | None = Field(
        None, description="of a sequence, whose lists are in order: the end that is newest; null: of no order"
    )
    mean_length: float = Field(
        1.0, ge=0, le=1e9, description="ids of an example on average: what the placer counts with"
    )

    @model_validator(mode="after")
    def _lists_have_weights(self) -> "CategoricalFeature":
        if self.weighted and not self.multi_valued:
            raise ValueError(f"{self.name}.weighted=true needs multi_valued=true")
        return self

    @property
    def weights_column(self) -> str:
        """The parquet column of a weighted feature's weights."""
        return f"{self.name}:weights"


class Optimum(BaseModel):
    """The Bayes LogLoss of a split whose labels were drawn with known probabilities, in nats.

    `drawn` differs from `entropy` by the luck of the draw; a model's LogLoss, on the same labels, compares with it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    entropy: float = Field(ge=0, description="mean entropy of the labels: what the true probabilities lose on average")
    drawn: float = Field(ge=0, description="what they lose on the labels that were drawn")


class Schema(BaseModel):
    """The columns of a prepared data set, in canonical feature order.

    Every parquet shard has: one column a categorical feature (int64, or list<int64> when multi-valued), a column
    "<feature>:weights" (list<float>, as long as the ids) where it is weighted, one float32 column a numeric feature,
    and the label column (0 or 1).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    name: str
    label: str = "label"
    labels: tuple[str, ...] = Field((), description="all label columns; `label` is in use; empty: only that one")
    tasks: tuple[str, ...] = Field(
        (), description="the labels that a run predicts, where they are several, `label` first; of data empty"
    )
    optional: tuple[str, ...] = Field((), description="labels that a row may lack: null")
    weight: str | None = Field(None, description="the column of how much a row counts: where `weighted`, in the loss")
    weighted: bool = Field(False, description="whether a run takes `weight`; of data false")
    group: str | None = Field(
        None,
        description="the column of what a row belongs to (int64; a single-valued feature or not), for AUC by group",
    )
    time: str | None = Field(None, description="the column of when a row was (float64)")
    label_rule: str = Field("", description="how the label was made, for people")
    labelled: bool = Field(True, description="false: the files had no label; such data are scored, not trained on")
    categorical: tuple[CategoricalFeature, ...]
    numeric: tuple[str, ...] = ()
    rows: dict[str, int] = Field(description="examples per split")
    optimum: dict[str, Optimum] = Field({}, description="by split, where the labels' probabilities are known")
    source: str = Field("", description="where the data came from, for people")
    identity: dict[str, str] = Field(
        {}, description="by feature, how raw values became numbers; data whose identities differ do not mix"
    )
    unknown: dict[str, dict[str, float]] = Field(
        {}, description="by split and feature, the share of the values there that the vocabulary does not know"
    )
    missing: dict[str, dict[str, float]] = Field(
        {}, description="by split and feature that is not a list, the share of the rows there without a value"
    )
    sharing: dict[str, float] = Field(
        {}, description="by hashed table, the share of its distinct values whose row is another value's as well"
    )
    bad_rows: dict[str, int] = Field({}, description="by reason, rows of the files that were left out")

    @model_validator(mode="after")
    def _consistent(self) -> "Schema":
        if self.labels and self.label not in self.labels:
            raise ValueError(f"label={self.label!r} is not one of labels={list(self.labels)}")
        labels = list(self.labels or [self.label])
        for key, some in (("tasks", self.tasks), ("optional", self.optional)):
            if not set(some) <= set(labels):
                raise ValueError(f"{key}={list(some)} names other columns than labels={labels}")
        if (self.tasks and self.label != self.tasks[0]) or (self.weighted and self.weight is None):
            raise ValueError("tasks begins with label, and weighted needs weight")
        names = [f.name for f in self.categorical] + list(self.numeric) + labels
        group = None if self.group in [f.name for f in self.categorical if not f.multi_valued] else self.group
        names += [name for name in (self.weight, group, self.time) if name is not None]
        names += [f.weights_column for f in self.categorical if f.weighted]
        repeated = sorted(name for name, times in Counter(names).items() if times > 1)
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

    @property
    def predicted(self) -> tuple[str, ...]:
        """The labels in use."""
        return self.tasks or (self.label,)

    @property
    def complete(self) -> bool:
        """Whether every row has the labels in use."""
        return set(self.optional).isdisjoint(self.predicted)

    @property
    def row_weights(self) -> tuple[str, ...]:
        """The weight column, where it is in use."""
        return (self.weight,) if self.weighted and self.weight is not None else ()

    @property
    def numbers(self) -> tuple[str, ...]:
        """The float32 columns of a record: numeric features, labels in use, the weight in use."""
        return (*self.numeric, *self.predicted, *self.row_weights)


def load_schema(directory: Path) -> Schema:
    """Read `schema.json` of a prepared data set.

    Raises:
        UserError: the file is missing or does not describe a data set; the message names it and the key.
    """
    path = directory / SCHEMA_FILE
    if not path.is_file():
        raise UserError(f"{path} does not exist: prepare the data first (python tools/prepare_data.py --help)")
    return read_schema(path)


def read_schema(path: Path) -> Schema:
    """Read a schema file, whether or not its data are on this machine.

    Raises:
        UserError: the file cannot be read or does not describe a data set; the message names it and the key.
    """
    value = read_object(path, "the schema.json of a data set")
    try:
        return Schema.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: {where + ': ' if where else ''}{first['msg']}") from error


def schema_of(data: DataConfig) -> Schema:
    """The features of a run for tools that read no data: `data.schema`, else schema.json in `data.path`.

    Raises:
        UserError: neither file is there, it does not describe a data set, or `data.features` does not fit it.
    """
    path = Path(data.schema_path or Path(data.path) / SCHEMA_FILE)
    if not path.is_file():
        raise UserError(
            f"data.schema={data.schema_path!r}: no such file; the path is relative to the config"
            if data.schema_path
            else f"data.path={data.path!r} holds no {SCHEMA_FILE}: prepare the data (python tools/prepare_data.py "
            "--help), or set data.schema to a schema.json that describes them"
        )
    return selected(read_schema(path), data)


def save_schema(schema: Schema, directory: Path) -> None:
    """Write `schema.json`, readable by people."""
    text = json.dumps(schema.model_dump(), indent=2) + "\n"
    (directory / SCHEMA_FILE).write_text(text, encoding="utf-8")


def select_features(schema: Schema, names: list[str] | None) -> Schema:
    """The schema of these features only, categorical and numeric, in the schema's order; None: all.

    Where the owner of a shared table is left out, the first feature left that shared it owns the table (which
    then has that feature's name); others that shared it follow.

    Raises:
        UserError: an unknown name, one named twice, or none.
    """
    if names is None:
        return schema
    known = [feature.name for feature in schema.categorical] + list(schema.numeric)
    for name in names:
        if name not in known:
            raise UserError(
                f"data.features names {name!r}, which {schema.name} does not have; {did_you_mean(name, known)}"
            )
        if names.count(name) > 1:
            raise UserError(f"data.features names {name!r} {names.count(name)} times; name it once")
    if not names:
        raise UserError(f"data.features is empty; name some of: {', '.join(known)}; or leave it out to use all")
    owners: dict[str, str] = {}
    categorical = []
    for feature in sorted(schema.categorical, key=lambda f: f.table is not None):  # owners first
        if feature.name in names:
            table = feature.table or feature.name
            owner = owners.setdefault(table, feature.name)
            categorical.append(feature.model_copy(update={"table": None if owner == feature.name else owner}))
    order = {feature.name: index for index, feature in enumerate(schema.categorical)}
    return schema.model_copy(
        update={
            "categorical": tuple(sorted(categorical, key=lambda f: order[f.name])),
            "numeric": tuple(name for name in schema.numeric if name in names),
            "identity": {name: text for name, text in schema.identity.items() if name in names},
        }
    )


def check_labelled(path: Path, schema: Schema) -> None:
    """Refuse a data set without labels where they are needed.

    Raises:
        UserError: says so.
    """
    if not schema.labelled:
        raise UserError(
            f"{path}: was prepared from files without the label column {schema.label!r}: it can be scored; for "
            "training and evaluation prepare files that have it"
        )


def select_label(schema: Schema, label: str | list[str] | None) -> Schema:
    """The schema with other labels in use; None: as it is.

    Raises:
        UserError: the data have no such label, or one is named twice.
    """
    known = schema.labels or (schema.label,)
    names = [schema.label] if label is None else [label] if isinstance(label, str) else label
    for name in names:
        if label is not None and name not in known:
            raise UserError(f"data.label={name!r}, which {schema.name} does not have; {did_you_mean(name, known)}")
        if names.count(name) > 1:
            raise UserError(f"data.label names {name!r} {names.count(name)} times; name it once")
    return schema.model_copy(update={"label": names[0], "tasks": tuple(names) if len(names) > 1 else ()})


def selected(schema: Schema, data: DataConfig) -> Schema:
    """The schema of what a run reads: its features, labels and weight.

    Raises:
        UserError: the data do not have them.
    """
    if data.weighted and schema.weight is None:
        raise UserError(
            f"data.weighted=true, and {schema.name} has no weight column: prepare it with a column of type 'weight', "
            "or leave data.weighted out"
        )
    chosen = select_label(select_features(schema, data.features), data.label)
    return chosen.model_copy(update={"weighted": data.weighted})


MADE_UP = "made up"
"""The prefix of the identity of synthetic features."""


def made_up(features: tuple[CategoricalFeature, ...], numeric: tuple[str, ...], seed: int, how: str) -> dict[str, str]:
    """`Schema.identity` of synthetic data: what a value says of the label follows from seed and features together.

    Not from the number of examples: more examples have the same identity.

    Args:
        how: what the label is drawn from.
    """
    shape = [[f.name, f.rows, f.multi_valued, f.weighted, f.table] for f in features]
    digest = hashlib.sha256(json.dumps([shape, numeric]).encode()).hexdigest()[:12]
    text = f"{MADE_UP} with seed {seed} ({how}, features {digest})"
    return dict.fromkeys([*(f.name for f in features), *numeric], text)


def identity_difference(there: Mapping[str, str], here: Mapping[str, str]) -> str | None:
    """The first feature whose values were encoded differently, as text; unknown identities match.

    Args:
        there: `Schema.identity` of what was trained or prepared before.
        here: that of the data at hand.
    """
    for name, text in there.items():
        if here.get(name, text) != text:
            remedy = (
                "take the seed and the features that it was trained on"
                if text.startswith(MADE_UP) and here[name].startswith(MADE_UP)
                else "prepare the raw files with --like DIR, the data set that it was trained on"
            )
            return f"{name} means {text} there, {here[name]} here, so that its numbers stand for other values; {remedy}"
    return None
