from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megarec.data.batch import Ids
from megarec.sparse.layout import Feature
from megarec.sparse.lookups import Lookup
from megarec.sparse.placement import Shard


@dataclass(frozen=True)
class LocalIds:
    """This rank's lookups: its slots, each over the same E examples, in the order of the global batch.

    Attributes:
        values: int [sum(counts)], slot after slot, example after example.
        offsets: int [slots x E + 1]: bag (slot s, example e) is values[offsets[s E + e] : offsets[s E + e + 1]].
        counts: values per slot.
        examples: E.
        weights: float32, one a value, 1 where a feature is not weighted; None: no slot is.
        by_block: by_block[slot][block][rank], how many values each has; None: one an example.
        unpooled: lookups row by row beside them; None: none.
    """

    values: Tensor
    offsets: Tensor
    counts: tuple[int, ...]
    examples: int
    weights: Tensor | None = None
    by_block: list[list[list[int]]] | None = None
    unpooled: "Unpooled | None" = None

    def counts_on_device(self) -> Tensor:
        """`counts` as int64 [slots], made there: a copy from the host would make it wait for an accelerator."""
        return self.offsets[:: max(1, self.examples)].diff().long()

    def part(self, start: int, stop: int) -> "LocalIds":
        """The ids of the slots start .. stop."""
        if (start, stop) == (0, len(self.counts)):
            return self
        first = sum(self.counts[:start])
        counts = self.counts[start:stop]
        offsets = self.offsets[start * self.examples : stop * self.examples + 1]
        own = slice(first, first + sum(counts))
        weights = None if self.weights is None else self.weights[own]
        by_block = None if self.by_block is None else self.by_block[start:stop]
        return LocalIds(self.values[own], offsets - first, counts, self.examples, weights, by_block)

    def of_slot(self, slot: int, feature: Feature) -> Ids:
        """The ids of one slot, which has this feature, as those of a batch of E examples."""
        first, bags = sum(self.counts[:slot]), slot * self.examples
        own = slice(first, first + self.counts[slot])
        lengths = self.offsets[bags : bags + self.examples + 1].diff() if feature.multi_valued else None
        return Ids(
            self.values[own], lengths, self.weights[own] if feature.weighted and self.weights is not None else None
        )


@dataclass
class Unpooled:
    """This rank's lookups row by row, in a step.

    Attributes:
        ids: of its unpooled slots.
        by_block: by_block[slot][block][rank], how many ids each has.
        orders: by slot that this rank's own ids go to, where they are sorted by owner: where each came from.
        sent: by rank and by slot of it, how many of this rank's own ids it has.
        gradients: by slot, [ids, columns]: set before the update.
    """

    ids: LocalIds
    by_block: list[list[list[int]]]
    orders: dict[str, Tensor]
    sent: list[list[int]]
    gradients: list[Tensor] | None = None

    def values(self) -> tuple[Tensor, ...]:
        """The ids of every slot."""
        return self.ids.values.split(list(self.ids.counts))


State = dict[str, tuple[Shard, Tensor]]
"""By "<table>/<what>": the slice of the global tensor, and the tensor on this rank itself (not a copy)."""


@dataclass(frozen=True)
class Pooled:
    """Summed rows and their update.

    Autograd does not go through the exchange: a gradient would need the type of its tensor, and
    embeddings may travel as fp16, their gradients as bf16.

    Attributes:
        values: [examples, columns of all slots], in the type that the backend emits.
        update: takes the gradient of `values`, of any floating type: one optimizer step. Once at most, and only for
            what was looked up with gradients enabled.
    """

    values: Tensor
    update: Callable[[Tensor], None]


class Tables(Protocol):
    """Shards of one rank in one backend."""

    def pool(self, ids: LocalIds) -> Pooled:
        """The summed rows of every bag."""

    def set_learning_rate(self, rate: float) -> None: ...

    def state(self) -> State:
        """Weights and optimizer state, live; one number a row is a [rows, 1] tensor, one a table [1, 1]."""


@dataclass(frozen=True)
class LocalShard:
    """A shard of this rank and the slots that look it up; they are neighbours, and so are their columns."""

    shard: Shard
    slots: tuple[Lookup, ...]

    @property
    def jagged(self) -> bool:
        """Whether a bag may hold any number of ids; else exactly one."""
        return any(slot.source.multi_valued for slot in self.slots)


def group_lookups(slots: Sequence[Lookup], shards: Sequence[Shard]) -> tuple[LocalShard, ...]:
    """Shards in slot order, each with its slots."""
    return tuple(LocalShard(shard, tuple(slot for slot in slots if slot.shard == shard)) for shard in shards)
