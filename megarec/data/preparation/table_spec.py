"""The JSON that describes the columns of users' own files."""

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from megarec.data.preparation.formats import check_encoding
from megarec.errors import UserError, did_you_mean
from megarec.files import read_object


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Ids(_Strict):
    dtype: Literal["string", "integer", "hexadecimal"] = Field(
        "string",
        description="what the values are; integers, and hexadecimal ones of at most 15 digits, equal by number",
    )
    min_count: Annotated[int, Field(ge=1)] = Field(1, description="rarer values in the training split share row 0")
    hash: Annotated[int, Field(ge=2)] | None = Field(None, description="rows to hash to; null: count a vocabulary")
    table: str | None = Field(None, description="another column whose values and table this one shares")

    @model_validator(mode="after")
    def _one_way(self) -> "_Ids":
        given = [key for key in ("min_count", "hash", "table") if getattr(self, key) not in (None, 1)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other; keep one")
        return self


class Categorical(_Ids):
    """One id a row; a missing value has row 0."""

    type: Literal["categorical"]


class Lists(_Ids):
    """A list of ids a row: text cut at the separator, or a parquet list. Empty elements are dropped."""

    separator: Annotated[str, Field(min_length=1)] = "|"
    pooling: Literal["sum", "mean"] = "sum"


class MultiValued(Lists):
    """A list of ids a row, of any length."""

    type: Literal["multi_valued"]


class Sequence(Lists):
    """A list of ids a row, in order of time: the newest are kept, in their order."""

    type: Literal["sequence"]
    max_length: Annotated[int, Field(ge=1)] = Field(description="how many of the newest elements are kept")
    newest: Literal["first", "last"] = Field(description="which end of the files' lists is the newest")


class Bucketised(_Strict):
    """A number a row as a category: the bucket that it lies in, from a boundary up to the next; missing: row 0."""

    type: Literal["bucketised"]
    boundaries: Annotated[list[float], Field(min_length=1)] | None = Field(
        None, description="where one bucket ends and the next begins, ascending"
    )
    buckets: Annotated[int, Field(ge=2, le=1 << 20)] | None = Field(
        None, description="this many buckets, cut at quantiles of the training split"
    )

    @model_validator(mode="after")
    def _one_way(self) -> "Bucketised":
        if (self.boundaries is None) == (self.buckets is None):
            raise ValueError("expected either boundaries or buckets")
        if self.boundaries is not None and (
            not all(map(math.isfinite, self.boundaries)) or sorted({*self.boundaries}) != self.boundaries
        ):
            raise ValueError(f"boundaries={self.boundaries}: expected ascending numbers, none twice")
        return self


class Weights(_Strict):
    """A list of numbers a row, one for each element of a multi-valued column, cut at the same separator."""

    type: Literal["weights"]
    of: str = Field(description="the multi-valued column")


class Numeric(_Strict):
    """A number a row."""

    type: Literal["numeric"]
    log: bool = Field(False, description="sign(x) log(1 + |x|) in place of x")
    missing: float | None = Field(None, description="takes the place of a missing number; null: that is an error")
    standardise: bool = Field(
        False, description="(x - mean) / deviation, after log, of the numbers that the training split has"
    )


class Vector(_Strict):
    """A fixed number of numbers a row, text cut at the separator or a list: the features NAME_0, NAME_1, ..."""

    type: Literal["vector"]
    length: Annotated[int, Field(ge=1, le=1 << 14)]
    separator: Annotated[str, Field(min_length=1)] = " "
    log: bool = Field(False, description="as for a number")
    missing: float | None = Field(None, description="as for a number; a row without any has it everywhere")
    standardise: bool = Field(False, description="as for a number, each by itself")

    def features(self, name: str) -> list[str]:
        return [f"{name}_{place}" for place in range(self.length)]


class Calendar(_Strict):
    """A moment a row, in UTC: the categories NAME_hour (0 to 23) and NAME_weekday (0 is Monday); missing: row 0."""

    type: Literal["calendar"]
    format: str = Field("%Y-%m-%d %H:%M:%S", description="of text and integers, by strptime; timestamps need none")

    def features(self, name: str) -> list[str]:
        return [f"{name}_hour", f"{name}_weekday"]


class Label(_Strict):
    """A column to predict: 0 or 1. Of several, a run takes the first, or those that its data.label names."""

    type: Literal["label"]
    optional: bool = Field(False, description="a row may lack it: it stays missing, and training leaves it out")


class Weight(_Strict):
    """How much a row counts: a number of at least 0."""

    type: Literal["weight"]


class Group(_Strict):
    """The id of what a row belongs to, such as a user or a request: for AUC by group."""

    type: Literal["group"]
    dtype: Literal["string", "integer"] = Field("string", description="what the ids are; a text is kept as its hash")


class Time(_Strict):
    """When a row was: a number, a date or a time."""

    type: Literal["time"]


class SplitColumn(_Strict):
    """Which split a row is of, for `--split column`."""

    type: Literal["split"]
    values: Annotated[dict[str, Literal["train", "valid", "test"]], Field(min_length=1)] = Field(
        {"train": "train", "valid": "valid", "test": "test"}, description="by value of the files, the split it means"
    )


class Ignored(_Strict):
    """A column of the files that is not used."""

    type: Literal["ignored"]


Column = Annotated[
    Categorical
    | MultiValued
    | Sequence
    | Weights
    | Numeric
    | Bucketised
    | Vector
    | Calendar
    | Label
    | Weight
    | Group
    | Time
    | SplitColumn
    | Ignored,
    Field(discriminator="type"),
]
_ONE_OF = ("weight", "group", "time", "split")
_KINDS: dict[str, type[BaseModel]] = {
    "categorical": Categorical,
    "multi_valued": MultiValued,
    "sequence": Sequence,
    "weights": Weights,
    "numeric": Numeric,
    "bucketised": Bucketised,
    "vector": Vector,
    "calendar": Calendar,
    "label": Label,
    "weight": Weight,
    "group": Group,
    "time": Time,
    "split": SplitColumn,
    "ignored": Ignored,
}


class TableSpec(_Strict):
    """What the columns of all files are, by name; features keep this order."""

    name: str
    label_rule: str = Field("", description="how the label was made, for people")
    header: bool | Literal["auto"] = Field(
        True,
        description="text starts with a line of names; false: columns come in this order; auto: by file, as its first "
        "row says, which is one of names if at least half of its values are",
    )
    encoding: Annotated[str, AfterValidator(check_encoding)] = Field("utf-8", description="of text")
    null_words: list[str] = Field([], description="values that mean a missing one, besides the empty text")
    delimiter: Annotated[str, Field(pattern="^[\t -~]$")] | None = Field(
        None, description="what separates values of text, in files of any name; a tab: no quoting; null: by the suffix"
    )
    columns: dict[str, Column]

    @property
    def labels(self) -> list[str]:
        return self.of_type("label")

    @property
    def roles(self) -> list[str]:
        """The columns that are not features; rows that are only scored have no value for them."""
        return [name for kind in ("label", *_ONE_OF) for name in self.of_type(kind)]

    def of_type(self, kind: str) -> list[str]:
        return [name for name, column in self.columns.items() if column.type == kind]

    def role(self, kind: str) -> str | None:
        """The one column of a type."""
        return next(iter(self.of_type(kind)), None)

    def ignoring(self, names: set[str]) -> "TableSpec":
        """The same with these columns left unread."""
        unread = {name: Ignored(type="ignored") if name in names else c for name, c in self.columns.items()}
        return self.model_copy(update={"columns": unread})

    def without(self, names: set[str]) -> "TableSpec":
        """The same for files that lack these columns."""
        return self.model_copy(update={"columns": {n: c for n, c in self.columns.items() if n not in names}})

    @property
    def ids(self) -> dict[str, Categorical | Lists]:
        """The columns whose values have a vocabulary or a hash."""
        return {name: c for name, c in self.columns.items() if isinstance(c, Categorical | Lists)}

    @property
    def looked_up(self) -> dict[str, Categorical | Lists | Bucketised]:
        """The columns that become rows of embedding tables."""
        return {name: c for name, c in self.columns.items() if isinstance(c, Categorical | Lists | Bucketised)}

    @property
    def standardised(self) -> list[str]:
        return [name for name, column in self.columns.items() if isinstance(column, Numeric) and column.standardise]

    @property
    def weights(self) -> dict[str, str]:
        """By multi-valued column, the column of its weights."""
        return {column.of: name for name, column in self.columns.items() if isinstance(column, Weights)}

    def separator(self, name: str) -> str | None:
        """What separates the elements of a list in text; None: the column has one value a row."""
        column = self.columns[name]
        if isinstance(column, Weights):
            column = self.columns[column.of]
        return column.separator if isinstance(column, Lists | Vector) else None

    @property
    def features(self) -> "TableSpec":
        """The same, with the features that a column of several becomes in its place."""
        found: dict[str, Column] = {}
        for name, column in self.columns.items():
            if isinstance(column, Vector):
                rule = Numeric(type="numeric", log=column.log, missing=column.missing, standardise=column.standardise)
                found |= dict.fromkeys(column.features(name), rule)
            elif isinstance(column, Calendar):
                found |= dict.fromkeys(column.features(name), Categorical(type="categorical", dtype="integer"))
            else:
                found[name] = column
        return self.model_copy(update={"columns": found})

    @model_validator(mode="after")
    def _consistent(self) -> "TableSpec":
        if not self.labels:
            raise ValueError("expected at least one column of type 'label', found none")
        for kind in _ONE_OF:
            if len(some := self.of_type(kind)) > 1:
                raise ValueError(f"expected at most one column of type {kind!r}, found {len(some)}: {some}")
        kinds = Categorical | Lists | Bucketised | Numeric | Vector | Calendar
        if not any(isinstance(column, kinds) for column in self.columns.values()):
            raise ValueError(
                "expected at least one column of type 'categorical', 'multi_valued', 'sequence', 'numeric', "
                "'bucketised', 'vector' or 'calendar'"
            )
        for name, several in self.columns.items():
            for feature in several.features(name) if isinstance(several, Vector | Calendar) else ():
                if feature in self.columns:
                    raise ValueError(f"columns.{feature} is a feature of columns.{name} too; rename one of them")
        lists = [name for name, column in self.columns.items() if isinstance(column, Lists)]
        owners = [(name, column.of) for name, column in self.columns.items() if isinstance(column, Weights)]
        for name, of in owners:
            if of not in lists:
                raise ValueError(
                    f"columns.{name}.of={of!r} is not a multi_valued or sequence column; {did_you_mean(of, lists)}"
                )
            if [other for _, other in owners].count(of) > 1:
                raise ValueError(f"columns.{name}.of={of!r}: that column has weights already; keep one")
        for name, column in self.ids.items():
            if column.table is None:
                continue
            owner = self.ids.get(column.table)
            if owner is None:
                raise ValueError(f"columns.{name}.table={column.table!r}; {did_you_mean(column.table, self.ids)}")
            if owner.table is not None or owner.dtype != column.dtype:
                raise ValueError(
                    f"columns.{name}.table={column.table!r}: that column needs a table of its own and the same dtype"
                )
        return self


def load_table_spec(path: Path) -> TableSpec:
    """Read and check a table's spec.

    Raises:
        UserError: names the file, the key, the value seen and what was expected, or the nearest known key.
    """
    value = read_object(path, "what the columns of the files are (docs/data.md)")
    try:
        return TableSpec.model_validate(value)
    except ValidationError as error:
        raise UserError(f"{path}: {describe(error)}") from error


def describe(error: ValidationError, under: str | None = None) -> str:
    """The first error in a spec, as text.

    Args:
        under: the key of what was checked that has the spec; None: it was the spec.
    """
    first = error.errors()[0]
    found = first["loc"][1:] if under is not None and first["loc"][:1] == (under,) else first["loc"]
    kind = found[2] if len(found) > 2 and found[0] == "columns" else None
    loc = [str(part) for index, part in enumerate(found) if not (kind and index == 2)]
    key = ".".join(loc)
    if first["type"] == "extra_forbidden":
        section = _KINDS[str(kind)] if kind else TableSpec
        return f"unknown key {key!r}; {did_you_mean(loc[-1], section.model_fields)}"
    if first["type"] == "union_tag_invalid":
        tag = str(first["ctx"]["tag"])
        return f"{key}.type={tag!r}; {did_you_mean(tag, _KINDS)}"
    if first["type"] == "union_tag_not_found":
        return f"{key}.type is missing; one of: {', '.join(_KINDS)}"
    if first["type"] == "missing":
        return f"{key} is missing"
    message = first["msg"].removeprefix("Value error, ")
    return f"{key}: {message}" if key else message
