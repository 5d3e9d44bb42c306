"""Rows that travel one by one, those of sequences: jagged, in the order of the examples.

    ids --(with those of pooled features)--> owner: a row an id --all-to-all, uneven--> the rank whose examples they are

Every id of a list travels once and its row comes back once, whole or in slices of columns; of a table that is split by
rows it comes from the one owner that has it, and no sum is needed. The way back mirrors it, and the update of a table
sums the gradients of these rows with those of its pooled ones.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from megarec.data.batch import Ids, end_to_end
from megarec.distributed.collectives import Channel, Message, WireDtypes, start_all_to_all
from megarec.sparse.lookups import Lookup
from megarec.sparse.tables.base import LocalIds, Unpooled
from megarec.sparse.tables.local import LocalTables

Rows = dict[str, Tensor]
"""By unpooled feature, [ids, columns] of some examples, in their order."""


class RowPiece(NamedTuple):
    """What one slot has of the rows of a feature.

    Attributes:
        source: whose ids the slot receives: the feature's, or those whose rows it has.
        start: its first column in a row.
    """

    feature: str
    source: str
    start: int
    columns: int


def row_pieces(slots: Sequence[Lookup]) -> list[RowPiece]:
    """Of unpooled slots."""
    return [RowPiece(slot.feature.name, slot.source.name, slot.start, slot.columns) for slot in slots]


class LocalRows:
    """Tells what is looked up row by row from what is pooled.

    Args:
        pooled: how many slots of this rank are pooled; the others come behind them.
        sources: by rank, whose ids its others receive.
        blocks: of which the examples of a rank consist.
    """

    def __init__(self, pooled: int, sources: Sequence[Sequence[str]], blocks: int = 1) -> None:
        self._pooled, self._sources, self._blocks = pooled, sources, blocks

    def apart(self, local: LocalIds, ids: Mapping[str, Ids], orders: dict[str, Tensor]) -> LocalIds:
        """What is pooled, and as its `unpooled` the rest.

        Args:
            local: what this rank looks up in all its slots.
            ids: of this rank's own examples, by source.
            orders: see `Unpooled`.
        """
        if not any(self._sources):
            return local
        rows = local.part(self._pooled, len(local.counts))
        ranks = len(self._sources)
        one_each = [[local.examples // self._blocks // ranks] * ranks] * self._blocks
        by_block = rows.by_block or [one_each for _ in rows.counts]
        sent = [[ids[source].values.shape[0] for source in own] for own in self._sources]
        pooled = local.part(0, self._pooled)
        return LocalIds(
            pooled.values, pooled.offsets, pooled.counts, pooled.examples, pooled.weights, pooled.by_block,
            Unpooled(rows, by_block, orders, sent),
        )  # fmt: skip


class RowExchange:
    """Sends the rows of slots to the ranks whose ids they are of, and their gradients back.

    Args:
        pieces: pieces[r] are those of rank r's slots.
        purpose: for the ledger.
    """

    def __init__(
        self, pieces: Sequence[Sequence[RowPiece]], channel: Channel, purpose: str, messages: WireDtypes
    ) -> None:
        self._pieces, self._channel, self._purpose, self._messages = pieces, channel, purpose, messages
        self._mine = pieces[channel.rank]

    def start(self, rows: Sequence[Tensor], found: Unpooled) -> Message:
        """Start the rows of this rank's slots on their way; collective."""
        blocks, ranks = len(found.by_block[0]) if found.by_block else 0, range(self._channel.size)
        segments = [own.split(self._flat(of_slot)) for own, of_slot in zip(rows, found.by_block, strict=True)]
        parts = [of[b * len(ranks) + r].reshape(-1) for r in ranks for of in segments for b in range(blocks)]
        message = (end_to_end(parts) if parts else found.ids.values.new_empty(0)).to(self._messages.forward)
        sent, received = self._sizes(found)
        return start_all_to_all(message, received, sent, self._channel, self._purpose)

    def arrived(self, message: Message, found: Unpooled) -> Rows:
        """What the slots of all ranks had for this rank's own ids; waits for it."""
        whole: Rows = {}
        for piece, count, numbers in self._received(message.wait(), found):
            own, order = numbers.view(count, piece.columns), found.orders.get(piece.source)
            if piece.feature not in whole:
                ids, columns = self._shape(piece.feature, found)
                if order is None and columns == piece.columns:
                    whole[piece.feature] = own
                    continue
                whole[piece.feature] = own.new_empty(ids, columns)
            into = whole[piece.feature][:, piece.start : piece.start + piece.columns]
            if order is None:
                into.copy_(own)
            else:
                into.index_copy_(0, order, own)
        return whole

    def start_back(self, gradients: Rows, found: Unpooled) -> Message:
        """Start the gradients of `arrived` on their way; collective."""
        parts = []
        for own in self._pieces:
            for piece in own:
                part = gradients[piece.feature][:, piece.start : piece.start + piece.columns]
                order = found.orders.get(piece.source)
                parts.append((part if order is None else part.index_select(0, order)).reshape(-1))
        message = (end_to_end(parts) if parts else found.ids.values.new_empty(0)).to(self._messages.backward)
        sent, received = self._sizes(found)
        return start_all_to_all(message, sent, received, self._channel, self._purpose, "backward")

    def returned(self, message: Message, found: Unpooled) -> list[Tensor]:
        """Those of the rows of this rank's slots, [ids, columns] each; waits for them."""
        ranks, columns = range(self._channel.size), [piece.columns for piece in self._mine]
        segments = [
            (slot, n * columns[slot])
            for r in ranks
            for slot, blocks in enumerate(found.by_block)
            for n in (block[r] for block in blocks)
        ]
        parts = message.wait().split([numbers for _, numbers in segments])
        by_slot: list[list[Tensor]] = [[] for _ in self._mine]
        for (slot, _), part in zip(segments, parts, strict=True):
            by_slot[slot].append(part)
        whole = []
        for slot, own in enumerate(by_slot):  # by rank, then block -> by block, then rank
            blocks = len(found.by_block[slot])
            in_order = [own[r * blocks + b] for b in range(blocks) for r in ranks]
            whole.append(end_to_end(in_order).view(-1, columns[slot]))
        return whole

    def _flat(self, by_block: list[list[int]]) -> list[int]:
        return [count for block in by_block for count in block]

    def _sizes(self, found: Unpooled) -> tuple[list[int], list[int]]:
        """Numbers that this rank has for every rank, and that each has for it."""
        own = list(zip(self._mine, found.by_block, strict=True))
        sent = [sum(p.columns * sum(block[r] for block in blocks) for p, blocks in own) for r in self._ranks()]
        pieces = zip(self._pieces, found.sent, strict=True)
        return sent, [sum(p.columns * n for p, n in zip(of_rank, ids, strict=True)) for of_rank, ids in pieces]

    def _ranks(self) -> range:
        return range(self._channel.size)

    def _received(self, numbers: Tensor, found: Unpooled) -> list[tuple[RowPiece, int, Tensor]]:
        """(piece, ids, their numbers) of all ranks."""
        pieces = [piece for own in self._pieces for piece in own]
        counts = [count for own in found.sent for count in own]
        sizes = [piece.columns * count for piece, count in zip(pieces, counts, strict=True)]
        return list(zip(pieces, counts, numbers.split(sizes), strict=True))

    def _shape(self, feature: str, found: Unpooled) -> tuple[int, int]:
        """Of the rows of a feature."""
        by_rank = zip(self._pieces, found.sent, strict=True)
        pieces = [pair for own, ids in by_rank for pair in zip(own, ids, strict=True)]
        own = [(piece, count) for piece, count in pieces if piece.feature == feature]
        return sum(n for p, n in own if p.start == 0), max(p.start + p.columns for p, _ in own)


class RowsLookup(Protocol):
    """Rows of a rank's examples, and the way back of their gradient; every method is collective."""

    def arrive(self) -> Rows:
        """Of every unpooled feature; waits for them."""

    def leave(self, gradients: Rows) -> None:
        """Start the gradients on their way."""

    def finish(self) -> None:
        """Wait for them; the tables have them then."""


class GroupRows:
    """The rows of a group's tables.

    Args:
        held: tables, how their rows travel, and what this rank looks up.
    """

    def __init__(self, held: Sequence[tuple[LocalTables, RowExchange, LocalIds]]) -> None:
        self._held = [
            (exchange, local.unpooled, exchange.start(tables.rows_of(local.unpooled), local.unpooled))
            for tables, exchange, local in held
            if local.unpooled is not None
        ]
        self._back: list[Message] = []

    def arrive(self) -> Rows:
        found: Rows = {}
        for exchange, unpooled, message in self._held:
            found |= exchange.arrived(message, unpooled)
        return found

    def leave(self, gradients: Rows) -> None:
        self._back = [exchange.start_back(gradients, unpooled) for exchange, unpooled, _ in self._held]

    def finish(self) -> None:
        for (exchange, unpooled, _), message in zip(self._held, self._back, strict=True):
            unpooled.gradients = exchange.returned(message, unpooled)


class TowerRows:
    """The rows of all hosts' tables: those of this host's go on to its peers, whose examples they are of.

    Args:
        inner: of this host's tables, for the examples of its peers.
        features: this host's, in the order of its slots.
        peers: how they travel on.
        found: what the peers asked this host for, and this rank every host.
    """

    def __init__(self, inner: GroupRows, features: Sequence[str], peers: RowExchange, found: Unpooled) -> None:
        self._inner, self._features, self._peers, self._found = inner, features, peers, found

    def arrive(self) -> Rows:
        rows = self._inner.arrive()
        return self._peers.arrived(self._peers.start([rows[f] for f in self._features], self._found), self._found)

    def leave(self, gradients: Rows) -> None:
        returned = self._peers.returned(self._peers.start_back(gradients, self._found), self._found)
        self._inner.leave(dict(zip(self._features, returned, strict=True)))

    def finish(self) -> None:
        self._inner.finish()
