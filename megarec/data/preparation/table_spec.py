"""The JSON by which people say what the columns of their own files are."""

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
        given = [key for key in ("min_count", "hash", "table") if key in self.model_fields_set]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other; keep one")
        return self


class Categorical(_Ids):
    """One id a row; a missing value has row 0."""

    type: Literal["categorical"]


class MultiValued(_Ids):
    """A list of ids a row: text cut at the separator, or a parquet list. Empty elements are dropped."""

    type: Literal["multi_valued"]
    separator: Annotated[str, Field(min_length=1)] = "|"
    pooling: Literal["sum", "mean"] = "sum"


class Weights(_Strict):
    """A list of numbers a row, one for each element of a multi-valued column, cut at the same separator."""

    type: Literal["weights"]
    of: str = Field(description="the multi-valued column")


class Numeric(_Strict):
    """A number a row."""

    type: Literal["numeric"]
    log: bool = Field(False, description="sign(x) log(1 + |x|) in place of x")
    missing: float | None = Field(None, description="stands where a number is missing; null: that is an error")


class Label(_Strict):
    """The column to predict: 0 or 1."""

    type: Literal["label"]


class Ignored(_Strict):
    """A column of the files that is not used."""

    type: Literal["ignored"]


Column = Annotated[Categorical | MultiValued | Weights | Numeric | Label | Ignored, Field(discriminator="type")]
_KINDS: dict[str, type[BaseModel]] = {
    "categorical": Categorical,
    "multi_valued": MultiValued,
    "weights": Weights,
    "numeric": Numeric,
    "label": Label,
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
    null_words: list[str] = Field([], description="values that are missing ones, beside the empty text")
    delimiter: Annotated[str, Field(pattern="^[\t -~]$")] | None = Field(
        None, description="what separates values of text, in files of any name; a tab: no quoting; null: by the suffix"
    )
    columns: dict[str, Column]

    @property
    def label(self) -> str:
        return next(name for name, column in self.columns.items() if isinstance(column, Label))

    @property
    def ids(self) -> dict[str, Categorical | MultiValued]:
        return {name: c for name, c in self.columns.items() if isinstance(c, Categorical | MultiValued)}

    @property
    def weights(self) -> dict[str, str]:
        """By multi-valued column, the column of its weights."""
        return {column.of: name for name, column in self.columns.items() if isinstance(column, Weights)}

    def separator(self, name: str) -> str | None:
        """What separates the elements of a list in text; None: the column has one value a row."""
        column = self.columns[name]
        if isinstance(column, Weights):
            column = self.columns[column.of]
        return column.separator if isinstance(column, MultiValued) else None

    @model_validator(mode="after")
    def _consistent(self) -> "TableSpec":
        labels = [name for name, column in self.columns.items() if isinstance(column, Label)]
        if len(labels) != 1:
            raise ValueError(f"expected one column of type 'label', found {len(labels)}: {labels}")
        if not self.ids and not any(isinstance(column, Numeric) for column in self.columns.values()):
            raise ValueError("expected at least one column of type 'categorical', 'multi_valued' or 'numeric'")
        lists = [name for name, column in self.columns.items() if isinstance(column, MultiValued)]
        owners = [(name, column.of) for name, column in self.columns.items() if isinstance(column, Weights)]
        for name, of in owners:
            if of not in lists:
                raise ValueError(f"columns.{name}.of={of!r} is no multi_valued column; {did_you_mean(of, lists)}")
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
        raise UserError(f"{path}: {_describe(error)}") from error


def _describe(error: ValidationError) -> str:
    first = error.errors()[0]
    kind = first["loc"][2] if len(first["loc"]) > 2 and first["loc"][0] == "columns" else None
    loc = [str(part) for index, part in enumerate(first["loc"]) if not (kind and index == 2)]
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
