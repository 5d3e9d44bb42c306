"""What a prepared data set keeps of its rules, so that it alone suffices to encode other rows.

spec.json beside schema.json has the whole spec (types, transforms, hashing, missing rules); vocabularies lie in
vocabulary/. `prepare_data.py table --like DATA` (prepare.py) and `RowEncoder` (encode_rows.py) need nothing else.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from megarec.data.preparation.merge import Table
from megarec.data.preparation.table_spec import Bucketised, Label, Lists, Numeric, Sequence, TableSpec, describe
from megarec.data.preparation.vocabulary import Hashing, identity_of, read_values
from megarec.data.schema import CategoricalFeature, Schema, identity_difference, load_schema
from megarec.errors import UserError
from megarec.files import read_object

SPEC_FILE = "spec.json"
_FEW = 8  # boundaries that an identity lists one by one


class Fitted(BaseModel):
    """What the training split decided beside vocabularies.

    Attributes:
        boundaries: by bucketised column, where one bucket ends and the next begins; given ones as well.
        moments: by standardised column, mean and deviation of its numbers, after log.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    boundaries: dict[str, list[float]] = {}
    moments: dict[str, tuple[float, float]] = {}


class KeptSpec(BaseModel):
    """spec.json of a prepared data set."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    spec: TableSpec
    fitted: Fitted = Fitted()

    @model_validator(mode="after")
    def _whole(self) -> "KeptSpec":
        bucketised = [name for name, column in self.spec.features.columns.items() if isinstance(column, Bucketised)]
        for key, found, wanted in (
            ("boundaries", self.fitted.boundaries, bucketised),
            ("moments", self.fitted.moments, self.spec.features.standardised),
        ):
            if sorted(found) != sorted(wanted):
                raise ValueError(f"fitted.{key} has {sorted(found)}, the spec {sorted(wanted)}")
        return self

    def save(self, directory: Path) -> None:
        (directory / SPEC_FILE).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")

    def identity(self, of_tables: dict[str, str]) -> dict[str, str]:
        """By feature, how raw values become numbers.

        Args:
            of_tables: by column that has a table, its vocabulary or hash.
        """
        found = {name: of_tables[column.table or name] for name, column in self.spec.features.ids.items()}
        for name, column in self.spec.features.columns.items():
            if isinstance(column, Numeric):
                transform = "sign(x) log(1 + |x|)" if column.log else "x"
                found[name] = transform if column.missing is None else f"{transform}, {column.missing:g} where missing"
                if column.standardise:
                    mean, deviation = self.fitted.moments[name]
                    found[name] = f"({transform} - {mean!r}) / {deviation!r}{found[name].removeprefix(transform)}"
            elif isinstance(column, Bucketised):
                found[name] = f"buckets cut at {_in_words(self.fitted.boundaries[name])}"
        return found

    def data_schema(
        self, files: TableSpec, tables: dict[str, Table], rows: dict[str, int], mean_lengths: dict[str, float]
    ) -> Schema:
        """schema.json of a data set.

        Args:
            files: the spec of the columns that its files have.
            tables: by column that has a table of its own.
            rows: by split.
            mean_lengths: by list.
        """
        spec, features = self.spec.features, []
        for name, column in spec.looked_up.items():
            if isinstance(column, Bucketised):
                buckets = len(self.fitted.boundaries[name]) + 1
                features.append(CategoricalFeature(name=name, rows=buckets + 1))
                continue
            many: dict[str, Any] = {}
            if isinstance(column, Lists):
                many = {
                    "multi_valued": True,
                    "pooling": column.pooling,
                    "weighted": name in spec.weights,
                    "newest": column.newest if isinstance(column, Sequence) else None,
                    "mean_length": round(mean_lengths.get(name, 1.0), 3),
                }
            owner = tables[column.table or name]
            features.append(CategoricalFeature(name=name, rows=owner.rows, table=column.table, **many))
        return Schema(
            name=spec.name,
            label=spec.labels[0],
            labels=tuple(spec.labels),
            labelled=bool(files.labels),
            optional=tuple(
                name for name, column in spec.columns.items() if isinstance(column, Label) and column.optional
            ),
            weight=files.role("weight"),
            group=files.role("group"),
            time=files.role("time"),
            label_rule=spec.label_rule,
            categorical=tuple(features),
            numeric=tuple(name for name, column in spec.columns.items() if isinstance(column, Numeric)),
            rows=rows,
            identity=self.identity({name: table.identity for name, table in tables.items()}),
            source=f"table: prepared from the user's files of {spec.name}",
        )


def _in_words(boundaries: list[float]) -> str:
    """All of few, the digest of many."""
    if len(boundaries) <= _FEW:
        return str(boundaries)
    digest = hashlib.sha256(np.array(boundaries, "<f8").tobytes()).hexdigest()[:16]
    return f"{len(boundaries)} boundaries {digest}"


@dataclass(frozen=True)
class Prepared:
    """A data set whose rules are known."""

    directory: Path
    kept: KeptSpec
    schema: Schema


def load_prepared(directory: Path) -> Prepared:
    """A prepared data set with what it keeps; its vocabularies are those that it was made with.

    Raises:
        UserError: it is not a data set, keeps no spec, or one of its files is damaged.
    """
    schema = load_schema(directory)
    path = directory / SPEC_FILE
    if not path.is_file():
        raise UserError(
            f"{directory} has no {SPEC_FILE}, so its rules are unknown: an earlier version made it, or another "
            "command than table and criteo; prepare its files again"
        )
    kept = read_kept(path)
    of_tables = {}
    for name, column in kept.spec.features.ids.items():
        if column.hash is not None:
            of_tables[name] = Hashing(column.hash).identity
        elif column.table is None:
            values = read_values(directory, name)
            of_tables[name] = identity_of(values.type, [values])
    if other := identity_difference(schema.identity, kept.identity(of_tables)):
        raise UserError(f"{directory} is not what was prepared: {other.partition(', so')[0]}; prepare it again")
    return Prepared(directory, kept, schema)


def read_kept(path: Path) -> KeptSpec:
    """Read a spec.json.

    Raises:
        UserError: it cannot be read, or is not a spec.
    """
    try:
        return KeptSpec.model_validate(read_object(path, "the spec that a data set keeps"))
    except ValidationError as error:
        raise UserError(f"{path}: {describe(error, 'spec')}; prepare the data again") from error
