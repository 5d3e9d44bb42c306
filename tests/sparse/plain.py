"""A layout with everything in it, and the plain reference: one process, dense tables, autograd, written-out updates."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from megarec.config.sections import EmbeddingConfig
from megarec.data.batch import Batch, Ids
from megarec.sparse.layout import EmbeddingLayout, Feature, Sequence, Table
from megarec.sparse.tables.initial import initial_rows

SEED = 11
STEPS = 4
# Uneven tables; `item` is shared by a single-valued feature, a summed list and an averaged list; `clicks` is a list of
# a table of its own; `wide` is two embeddings of width 8; `small` belongs to the grouped small embeddings.
# Column slices make ranks order their tables differently: one with a wider slice of `wide` has it after the others.
ITEM, WIDE, USER, CLICKS, SMALL = (
    Table("item", 40, 8),
    Table("wide", 90, 16),
    Table("user", 300, 8),
    Table("clicks", 17, 8),
    Table("small", 9, 4),
)
TABLES = (ITEM, WIDE, USER, CLICKS, SMALL)
FEATURES = (
    Feature("item", "item", "sum", False, 0, 8),
    Feature("user", "user", "sum", False, 8, 8),
    Feature("history", "item", "mean", True, 16, 8),
    Feature("clicks", "clicks", "mean", True, 24, 8),
    Feature("wide", "wide", "sum", False, 32, 16),
    Feature("cart", "item", "sum", True, 48, 8),
    Feature("small", "small", "sum", False, 56, 4),
)
LAYOUT = EmbeddingLayout(8, TABLES, FEATURES, full_embeddings=7, small_columns=4)
WEIGHTED_LAYOUT = dataclasses.replace(
    LAYOUT, features=tuple(dataclasses.replace(f, weighted=f.name in ("history", "cart")) for f in FEATURES)
)
SINGLE_LAYOUT = EmbeddingLayout(
    8,
    (ITEM, WIDE, USER, SMALL),
    (
        Feature("user", "user", "sum", False, 0, 8),
        Feature("item", "item", "sum", False, 8, 8),
        Feature("wide", "wide", "sum", False, 16, 16),
        Feature("other", "item", "sum", False, 32, 8),
        Feature("small", "small", "sum", False, 40, 4),
    ),
    full_embeddings=5,
    small_columns=4,
)
# `views` and `kinds` share positions; the newest three of up to four count; `views` shares the table of pooled
# features, `likes` has one that nothing pools, its newest first; `item` is looked up row by row as well.
SEQUENCE_LAYOUT = EmbeddingLayout(
    8,
    (*TABLES, Table("likes", 23, 8)),
    FEATURES,
    full_embeddings=7,
    small_columns=4,
    unpooled=(
        Feature("views", "item", "sum", True, 0, 8, positions=3),
        Feature("kinds", "clicks", "sum", True, 0, 8, positions=3),
        Feature("likes", "likes", "sum", True, 0, 8, positions=5, newest_first=True),
        Feature("item", "item", "sum", False, 0, 8, positions=1),
    ),
    sequences=(
        Sequence(("views", "kinds"), 8, 3, start=0),
        Sequence(("likes",), 8, 5, start=3 * 16 + 3),
        Sequence(("item",), 8, 1, start=3 * 16 + 3 + 5 * 8 + 5, masked=False),
    ),
)
SIX_COLUMNS_LAYOUT = EmbeddingLayout(
    8,
    (Table("six", 50, 6), ITEM, WIDE, USER, CLICKS),
    (
        Feature("item", "item", "sum", False, 0, 8),
        Feature("six", "six", "sum", False, 8, 6),
        Feature("user", "user", "sum", False, 14, 8),
        Feature("clicks", "clicks", "mean", True, 22, 8),
        Feature("wide", "wide", "sum", False, 30, 16),
        Feature("sixes", "six", "sum", True, 46, 6),
    ),
    full_embeddings=0,
    small_columns=52,
)


def global_batch(layout: EmbeddingLayout, examples: int, step: int) -> Batch:
    """Random ids, many of them twice; lists of 0 to 4 ids, the first examples' lists all empty."""
    generator = torch.Generator().manual_seed(1000 + step)

    def integers(high: int, count: int) -> Tensor:
        return torch.randint(high, (count,), generator=generator)

    ids = {}
    for feature in layout.features:
        rows = layout.table(feature.table).rows
        if feature.multi_valued:
            lengths = integers(5, examples)
            lengths[: examples // 4] = 0
            values = integers(rows, int(lengths.sum()))
            weights = torch.randn(values.numel(), generator=generator) if feature.weighted else None
            ids[feature.name] = Ids(values, lengths, weights)
        else:
            ids[feature.name] = Ids(integers(rows, examples))
    rows_of = {feature.name: layout.table(feature.table).rows for feature in layout.unpooled}
    for sequence in layout.sequences:
        lengths = integers(5, examples)
        for name in sequence.features:
            if name not in ids:
                ids[name] = Ids(integers(rows_of[name], int(lengths.sum())), lengths)
    return Batch(torch.zeros(examples, 0), ids, torch.zeros(examples), torch.arange(examples), examples)


def slice_of(batch: Batch, rank: int, ranks: int) -> Batch:
    """The rank-th contiguous slice of a global batch."""
    size = batch.size // ranks
    rows = slice(rank * size, (rank + 1) * size)
    ids = {}
    for name, f in batch.ids.items():
        if f.lengths is None:
            ids[name] = Ids(f.values[rows])
        else:
            first = int(f.lengths[: rows.start].sum())
            own = slice(first, first + int(f.lengths[rows].sum()))
            ids[name] = Ids(f.values[own], f.lengths[rows], None if f.weights is None else f.weights[own])
    return Batch(batch.numeric[rows], ids, batch.labels[rows], batch.keys[rows], size)


def loss(embedded: Tensor, examples: Tensor) -> Tensor:
    """Mean over the examples; the gradient depends on the embedding, its column and its example."""
    columns = torch.arange(embedded.shape[1])
    phase = examples.unsqueeze(1) * 0.7 + columns * 1.3
    return (torch.sin(3 * embedded + phase)).sum(dim=1).mean()


def newest_rows(ids: Ids, example: int, feature: Feature) -> Tensor:
    """The ids of an example, newest first, as many as count."""
    if ids.lengths is None:
        return ids.values[example : example + 1]
    first = int(ids.lengths[:example].sum())
    own = ids.values[first : first + int(ids.lengths[example])]
    return (own if feature.newest_first else own.flip(0))[: feature.positions]


@dataclass
class PlainTables:
    """Dense tables of one process."""

    layout: EmbeddingLayout
    config: EmbeddingConfig

    def __post_init__(self) -> None:
        self.steps = 0
        self.weights = {t.name: initial_rows(t, SEED, None, 0, t.rows) for t in self.layout.tables}
        self._round()
        self.square_sums = {
            t.name: torch.zeros(t.rows, 1 if self.config.optimizer == "rowwise_adagrad" else t.columns)
            for t in self.layout.tables
        }
        for weight in self.weights.values():
            weight.requires_grad_()
        if self.config.optimizer == "adam":
            self.adam = torch.optim.SparseAdam(
                list(self.weights.values()),
                lr=self.config.learning_rate,
                eps=self.config.eps,
            )

    def look_up(self, batch: Batch) -> Tensor:
        parts = []
        for feature in self.layout.features:
            ids = batch.ids[feature.name]
            lengths = torch.ones(batch.size, dtype=torch.int64) if ids.lengths is None else ids.lengths
            offsets = lengths.cumsum(0) - lengths
            weight = self.weights[feature.table]
            if ids.weights is None:
                parts.append(embedding_bag(ids.values, weight, offsets, mode=feature.pooling))
            else:  # a mean divides by the length, as TorchRec's
                summed = embedding_bag(ids.values, weight, offsets, mode="sum", per_sample_weights=ids.weights)
                parts.append(summed / lengths.clamp(min=1)[:, None] if feature.pooling == "mean" else summed)
        return torch.cat([*parts, *(self._padded(sequence, batch) for sequence in self.layout.sequences)], dim=1)

    def _padded(self, sequence: Sequence, batch: Batch) -> Tensor:
        """[B, positions x features x columns, and the mask], example by example."""
        unpooled = {feature.name: feature for feature in self.layout.unpooled}
        examples = []
        for example in range(batch.size):
            lists = [newest_rows(batch.ids[name], example, unpooled[name]) for name in sequence.features]
            embedded = [self.weights[unpooled[n].table][rows] for n, rows in zip(sequence.features, lists, strict=True)]
            there = torch.stack(embedded, dim=1).flatten(1)  # [positions, features x columns]
            missing = sequence.positions - there.shape[0]
            parts = [there.flatten(), torch.zeros(missing * there.shape[1])]
            if sequence.masked:
                parts += [torch.ones(there.shape[0]), torch.zeros(missing)]
            examples.append(torch.cat(parts))
        return torch.stack(examples)

    @torch.no_grad()
    def update(self, batch: Batch) -> None:
        for name, weight in self.weights.items():
            assert weight.grad is not None
            features = [f.name for f in self.layout.features if f.table == name]
            seen = [batch.ids[f].values for f in features]
            for feature in (f for f in self.layout.unpooled if f.table == name):
                seen += [newest_rows(batch.ids[feature.name], example, feature) for example in range(batch.size)]
            rows = torch.cat(seen).unique()
            g, rate, eps, sums = weight.grad[rows], self.config.learning_rate, self.config.eps, self.square_sums[name]
            if self.config.optimizer == "adam":
                weight.grad = torch.sparse_coo_tensor(rows[None], g, weight.shape, check_invariants=True)
                continue
            if self.config.optimizer == "sgd":
                weight[rows] -= rate * g
            elif self.config.optimizer == "adagrad":
                sums[rows] += g * g
                weight[rows] -= rate * g / (sums[rows].sqrt() + eps)
            else:
                sums[rows] += (g * g).mean(dim=1, keepdim=True)
                weight[rows] -= rate * g / (sums[rows].sqrt() + eps)
            weight.grad = None
        if self.config.optimizer == "adam":
            self.adam.step()
            self.adam.zero_grad()
        self._round()

    def _round(self) -> None:
        """To the type that the tables are stored in."""
        if self.config.weights == "fp16":
            for weight in self.weights.values():
                weight.data = weight.data.half().float()

    def state(self) -> dict[str, Tensor]:
        """Global tensors by the names that SparseSide.state uses."""
        named = {f"{name}/weight": weight.detach() for name, weight in self.weights.items()}
        which = {"adagrad": "square_sum", "rowwise_adagrad": "rowwise_square_sum"}.get(self.config.optimizer)
        if which:
            named |= {f"{name}/{which}": sums for name, sums in self.square_sums.items()}
        if self.config.optimizer == "adam":
            for name, weight in self.weights.items():
                moments = self.adam.state[weight]
                named[f"{name}/first_moment"], named[f"{name}/second_moment"] = (
                    moments["exp_avg"],
                    moments["exp_avg_sq"],
                )
        return named


@dataclass
class Trained:
    """Embeddings [examples, width] of every step before its update, and the state at the end, global."""

    embedded: list[Tensor]
    state: dict[str, Tensor]


def train_plain(layout: EmbeddingLayout, config: EmbeddingConfig, examples: int, steps: int = STEPS) -> Trained:
    tables = PlainTables(layout, config)
    seen = []
    for step in range(steps):
        batch = global_batch(layout, examples, step)
        embedded = tables.look_up(batch)
        loss(embedded, batch.keys).backward()
        seen.append(embedded.detach())
        tables.update(batch)
    return Trained(seen, tables.state())
