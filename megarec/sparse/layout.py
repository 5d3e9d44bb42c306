"""The tables, and how their pooled rows lie side by side in front of the dense model.

The sparse side hands on one matrix [B, width]: per feature its pooled embedding, features in canonical order
(schema order), those of full width d first, those of smaller width (spec: grouped small embeddings) after them.
"""

import dataclasses
import difflib
import itertools
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

from megarec.config.base import SequenceConfig
from megarec.config.sections import EmbeddingConfig, FeatureEmbedding
from megarec.data.schema import CategoricalFeature, Schema
from megarec.errors import UserError, did_you_mean
from megarec.models.sequences import SequenceInput


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
        positions: of an unpooled feature, whose rows travel one by one: how many of the newest ids of a list are looked
            up; `start` means nothing then. 0: pooled.
        newest_first: which end of its lists is the newest.
    """

    name: str
    table: str
    pooling: Literal["sum", "mean"]
    multi_valued: bool
    start: int
    columns: int
    mean_length: float = 1.0
    weighted: bool = False
    positions: int = 0
    newest_first: bool = False


@dataclass(frozen=True)
class Sequence:
    """Lists that share positions, whose rows travel one by one.

    They are laid out padded, [B, positions, features, columns]; position 0 is the newest. Behind them lies, where
    `masked`, a column a position, [B, positions]: 1 where an example has one, else 0, as is the position.

    Attributes:
        features: in their order at a position.
        columns: of each.
        start: first column among those of all sequences.
    """

    features: tuple[str, ...]
    columns: int
    positions: int
    start: int
    masked: bool = True

    @property
    def mask(self) -> int:
        """The first column of the mask."""
        return self.start + self.positions * len(self.features) * self.columns

    @property
    def stop(self) -> int:
        return self.mask + self.positions * self.masked


@dataclass(frozen=True)
class EmbeddingLayout:
    """All tables and features of a model; identical on every rank and topology.

    Attributes:
        dim: d, the width of one embedding of the dense model.
        full_embeddings: how many embeddings of width d lead the matrix (a feature may have several).
        small_columns: columns of the grouped small embeddings that follow them.
        unpooled: features whose rows travel one by one; one may be among `features` as well.
        sequences: the layout of those, behind the matrix.
    """

    dim: int
    tables: tuple[Table, ...]
    features: tuple[Feature, ...]
    full_embeddings: int
    small_columns: int
    unpooled: tuple[Feature, ...] = ()
    sequences: tuple[Sequence, ...] = ()

    @property
    def looked_up(self) -> tuple[Feature, ...]:
        """Pooled features and unpooled ones."""
        return self.features + self.unpooled

    @property
    def sequence_columns(self) -> int:
        return self.sequences[-1].stop if self.sequences else 0

    @property
    def width(self) -> int:
        return self.full_embeddings * self.dim + self.small_columns

    def table(self, name: str) -> Table:
        return next(table for table in self.tables if table.name == name)


def build_layout(
    schema: Schema,
    config: EmbeddingConfig,
    dim: int,
    sequences: Iterable[SequenceConfig] = (),
    *,
    targets_apart: bool = False,
) -> EmbeddingLayout:
    """Tables and features of a run.

    Args:
        sequences: whose lists are not pooled.
        targets_apart: targets are looked up row by row as well, because tower modules take in their pooled columns.

    Raises:
        UserError: `embedding.features` names a feature that the schema does not have, or its width is not
            smaller than `dim`, or features that share a table ask for different columns; or a sequence names features
            that cannot be one.
    """
    known = [feature.name for feature in schema.categorical]
    for name in config.features:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"features: {', '.join(known)}"
            raise UserError(f"embedding.features.{name}: the data has no such categorical feature; {hint}")

    sequences = list(sequences)
    owners = sequence_tables(schema, sequences)
    full, small = _by_width(schema, config, dim, owners)
    lists = {name: sequence.max_length for sequence in sequences for name in sequence.features}
    tables: dict[str, Table] = {}
    features, unpooled = [], []
    start = 0
    for feature, columns in full + small:
        table = owners.get(feature.name) or feature.table or feature.name
        known_table = tables.setdefault(table, Table(table, feature.rows, columns))
        if known_table.columns != columns:
            raise UserError(
                f"embedding.features.{feature.name} has {columns} columns, but its table {table!r} has "
                f"{known_table.columns}: features that share a table need the same columns"
            )
        made = Feature(
            feature.name,
            table,
            feature.pooling,
            feature.multi_valued,
            start,
            columns,
            mean_length=feature.mean_length,
            weighted=feature.weighted,
        )
        if positions := lists.get(feature.name):
            newest_first = feature.newest == "first"
            unpooled.append(dataclasses.replace(made, start=0, positions=positions, newest_first=newest_first))
            continue
        features.append(made)
        start += columns
    if targets_apart:
        unpooled += [dataclasses.replace(f, start=0, positions=1) for f in features if f.name in owners]
    full_columns = sum(columns for feature, columns in full if feature.name not in lists)
    laid_out = _places(sequences, [f.name for f in features if f.name in owners] if targets_apart else [], dim)
    return EmbeddingLayout(
        dim,
        tuple(tables.values()),
        tuple(features),
        full_columns // dim,
        start - full_columns,
        tuple(unpooled),
        laid_out,
    )


def _by_width(
    schema: Schema, config: EmbeddingConfig, dim: int, in_sequences: Collection[str]
) -> tuple[list[tuple[CategoricalFeature, int]], list[tuple[CategoricalFeature, int]]]:
    """(feature, columns) of those of full width and of those of a smaller one."""
    default = FeatureEmbedding()
    full, small = list[tuple[CategoricalFeature, int]](), list[tuple[CategoricalFeature, int]]()
    for feature in schema.categorical:
        requested = config.features.get(feature.name, default)
        if feature.name in in_sequences and (requested.width not in (None, dim) or requested.embeddings > 1):
            raise UserError(
                f"embedding.features.{feature.name}: a feature of model.sequences has one embedding of width "
                f"model.dim={dim}; leave it out"
            )
        if requested.width is None or requested.width == dim:
            full.append((feature, requested.embeddings * dim))
        elif requested.width > dim:
            raise UserError(f"embedding.features.{feature.name}.width={requested.width} exceeds model.dim={dim}")
        elif requested.embeddings > 1:
            raise UserError(f"embedding.features.{feature.name}: several embeddings need width model.dim={dim}")
        else:
            small.append((feature, requested.width))
    return full, small


def _places(sequences: Iterable[SequenceConfig], targets: list[str], dim: int) -> tuple[Sequence, ...]:
    """Sequence after sequence, then all targets that are looked up row by row."""
    found, start = list[Sequence](), 0
    for sequence in sequences:
        found.append(Sequence(tuple(sequence.features), dim, sequence.max_length, start))
        start = found[-1].stop
    if targets:
        found.append(Sequence(tuple(targets), dim, 1, start, masked=False))
    return tuple(found)


def sequence_inputs(
    layout: EmbeddingLayout, sequences: Iterable[SequenceConfig], arriving: int, *, targets_apart: bool
) -> tuple[SequenceInput, ...]:
    """Where the dense model's sequences and their targets are.

    Args:
        layout: made of the same sequences.
        arriving: columns of what is pooled (or of what tower modules emit), which come first.

    Raises:
        UserError: heads do not divide the columns of a position.
    """
    starts = {feature.name: feature.start for feature in layout.features}
    if targets_apart and layout.sequences:
        apart = layout.sequences[-1]
        starts = {name: arriving + apart.start + i * layout.dim for i, name in enumerate(apart.features)}
    found = []
    for index, (config, place) in enumerate(zip(sequences, layout.sequences, strict=False)):
        columns, heads = len(config.features) * layout.dim, config.heads or 1
        if columns % heads:
            raise UserError(
                f"model.sequences.{index}.heads={heads} does not divide the {columns} columns of a position: "
                f"{len(config.features)} features x model.dim={layout.dim}"
            )
        targets = tuple(starts[name] for name in config.target)
        found.append(SequenceInput(config, layout.dim, arriving + place.start, arriving + place.mask, targets))
    return tuple(found)


def sequence_tables(schema: Schema, sequences: Iterable[SequenceConfig]) -> dict[str, str | None]:
    """The lists and targets of sequences, each with the table that it does not have by the schema, or None.

    Raises:
        UserError: a name is unknown, or its feature cannot be such a list or target.
    """
    by_name = {feature.name: feature for feature in schema.categorical}
    sequences = list(sequences)
    lists: dict[str, int] = {}
    owners: dict[str, str | None] = {}

    def look(index: int, key: str, name: str) -> CategoricalFeature:
        if name not in by_name:
            raise UserError(
                f"model.sequences.{index}.{key} names {name!r}, which is not a categorical feature of the run; "
                f"{did_you_mean(name, list(by_name))}"
            )
        return by_name[name]

    for index, sequence in enumerate(sequences):
        for name, target in itertools.zip_longest(sequence.features, sequence.target):
            own, where = look(index, "features", name), f"model.sequences.{index}"
            if name in lists:
                raise UserError(f"{where}.features names {name!r}, as entry {lists[name]} does: keep it in one")
            lists[name] = index
            if not own.multi_valued or own.newest is None or own.weighted:
                what = "single-valued" if not own.multi_valued else "weighted" if own.weighted else "in no known order"
                raise UserError(
                    f"{where}.features: {name!r} is {what}; expected a list in order: prepare it as "
                    '"type": "sequence", without weights'
                )
            if own.newest != (first := by_name[sequence.features[0]]).newest:
                raise UserError(
                    f"{where}.features: {name!r} has its newest value {own.newest} and {first.name!r} {first.newest}, "
                    "but they share positions; prepare both in one order, or give each an entry of its own"
                )
            owners[name] = None
            if target is None:  # of the past alone
                continue
            its = look(index, "target", target)
            owners.setdefault(target, None)
            if its.multi_valued:
                raise UserError(f"{where}.target: {target!r} is a list; expected a feature with one value an example")
            if sequence.tables == "target":
                identity = schema.identity
                if own.rows != its.rows or identity.get(name, "") != identity.get(target, identity.get(name, "")):
                    raise UserError(
                        f'{where}.tables="target": {name!r} ({own.rows:,} rows) does not have the ids of {target!r} '
                        f'({its.rows:,} rows): prepare it with "table": {target!r}, or leave tables out'
                    )
                owners[name] = its.table or target
    for index, sequence in enumerate(sequences):
        for target in sequence.target:
            if target in lists:
                raise UserError(f"model.sequences.{index}.target: {target!r} is a list of entry {lists[target]}")
    return owners
