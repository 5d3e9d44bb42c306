"""Which tables there are and how their pooled rows lie side by side in front of the dense model.

The sparse side hands on one matrix [B, width]: per feature its pooled embedding, features in canonical order
(schema order), those of full width d first, those of smaller width (spec: grouped small embeddings) after them.
"""

import difflib
from dataclasses import dataclass
from typing import Literal

from megarec.config.sections import EmbeddingConfig, FeatureEmbedding
from megarec.data.schema import Schema
from megarec.errors import UserError


@dataclass(frozen=True)
class Table:
    """A global embedding table: rows x columns."""

    name: str
    rows: int
    columns: int


@dataclass(frozen=True)
class Feature:
    """A feature and its place in the matrix [B, width]: columns start .. start + columns.

    Attributes:
        mean_length: ids of an example, for the placer.
        weighted: whether every id of a list has a weight that its row is multiplied by.
    """

    name: str
    table: str
    pooling: Literal["sum", "mean"]
    multi_valued: bool
    start: int
    columns: int
    mean_length: float = 1.0
    weighted: bool = False


@dataclass(frozen=True)
class EmbeddingLayout:
    """All tables and features of a model; identical on every rank and topology.

    Attributes:
        dim: d, the width of one embedding of the dense model.
        full_embeddings: how many embeddings of width d lead the matrix (a feature may have several).
        small_columns: columns of the grouped small embeddings that follow them.
    """

    dim: int
    tables: tuple[Table, ...]
    features: tuple[Feature, ...]
    full_embeddings: int
    small_columns: int

    @property
    def width(self) -> int:
        return self.full_embeddings * self.dim + self.small_columns

    def table(self, name: str) -> Table:
        return next(table for table in self.tables if table.name == name)


def build_layout(schema: Schema, config: EmbeddingConfig, dim: int) -> EmbeddingLayout:
    """Tables and features of a run.

    Raises:
        UserError: `embedding.features` names a feature that the schema does not have, or its width is not
            smaller than `dim`, or features that share a table ask for different columns.
    """
    known = [feature.name for feature in schema.categorical]
    for name in config.features:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"features: {', '.join(known)}"
            raise UserError(f"embedding.features.{name}: the data has no such categorical feature; {hint}")

    default = FeatureEmbedding()
    full, small = [], []
    for feature in schema.categorical:
        requested = config.features.get(feature.name, default)
        if requested.width is None or requested.width == dim:
            full.append((feature, requested.embeddings * dim))
        elif requested.width > dim:
            raise UserError(f"embedding.features.{feature.name}.width={requested.width} exceeds model.dim={dim}")
        elif requested.embeddings > 1:
            raise UserError(f"embedding.features.{feature.name}: several embeddings need width model.dim={dim}")
        else:
            small.append((feature, requested.width))

    tables: dict[str, Table] = {}
    features = []
    start = 0
    for feature, columns in full + small:
        table = feature.table or feature.name
        known_table = tables.setdefault(table, Table(table, feature.rows, columns))
        if known_table.columns != columns:
            raise UserError(
                f"embedding.features.{feature.name} has {columns} columns, but its table {table!r} has "
                f"{known_table.columns}: features that share a table need the same columns"
            )
        features.append(
            Feature(
                feature.name,
                table,
                feature.pooling,
                feature.multi_valued,
                start,
                columns,
                mean_length=feature.mean_length,
                weighted=feature.weighted,
            )
        )
        start += columns
    full_columns = sum(columns for _, columns in full)
    return EmbeddingLayout(dim, tuple(tables.values()), tuple(features), full_columns // dim, start - full_columns)
