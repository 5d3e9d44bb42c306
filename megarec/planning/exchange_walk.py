"""The tables of one group of ranks, as a step goes through them: which tensors come, how large they are, when they go.

A method follows the method of sparse/exchange that it is named after, line by line where a line makes a tensor. Results
of operators count until nothing refers to them; what an operator needs inside itself does not, nor does what the tables
need to sort, sum and update their rows (exchange_meter.py counts the same in a real step). Where a plain copy is made
on a CPU and a fused kernel runs on an accelerator, `fused` says which (regroup.py, fused_regroup.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass

FLOAT = 4  # bytes of a float32 number


class Held:
    """What is held, in bytes by name.

    Attributes:
        peak: the most at any time so far.
    """

    def __init__(self) -> None:
        self._sizes: dict[str, float] = {}
        self.peak = 0.0

    def hold(self, name: str, size: float) -> None:
        """More under a name."""
        self._sizes[name] = self._sizes.get(name, 0.0) + size
        self.peak = max(self.peak, sum(self._sizes.values()))

    def drop(self, *names: str) -> None:
        """All that is held under these names, if anything is."""
        for name in names:
            self._sizes.pop(name, None)

    def rename(self, old: str, new: str) -> None:
        """The same tensor under another name."""
        self._sizes[new] = self._sizes.get(new, 0.0) + self._sizes.pop(old, 0.0)


@dataclass(frozen=True)
class Shuffle:
    """exchange/regroup.py.

    Attributes:
        fused: whether one kernel does it (fused_regroup.py).
        in_place: whether what arrives lies as it shall.
        mean: whether sums of features become means.
        parts: in which it all comes and goes.
    """

    held: Held
    fused: bool
    in_place: bool
    mean: bool
    parts: int

    def assemble(self, name: str, numbers: float, width: int, dtype: int) -> None:
        """So many numbers of `width` bytes, put in order, as others of `dtype` bytes."""
        held, part = self.held, numbers / self.parts
        if self.in_place and (not self.fused or width == dtype):
            held.hold(name, numbers * dtype if width != dtype else 0)
            return
        if not self.fused:
            held.hold("assembled", part * width)
            if self.mean and width != FLOAT:
                held.hold("assembled in fp32", part * FLOAT)
                held.drop("assembled")
                width = FLOAT
            if width == dtype:
                held.drop("assembled", "assembled in fp32")  # it is the result
        held.hold(name, numbers * dtype)
        held.drop("assembled", "assembled in fp32")

    def scatter(self, name: str, numbers: float, width: int, wire: int, dense: bool, divide: int) -> None:
        """A gradient of `width` bytes a number, as blocks of `wire` bytes.

        Args:
            dense: whether it has its memory to itself.
            divide: by what it is divided.
        """
        held, part = self.held, numbers / self.parts
        if self.fused:
            held.hold(name, numbers * wire)
        elif self.in_place and divide == 1:
            held.hold(name, numbers * wire if width != wire or not dense else 0)
        else:
            held.hold("gradient in fp32", part * FLOAT if width != FLOAT else 0)
            if self.in_place and wire != FLOAT:
                held.hold("divided", part * FLOAT)
                held.drop("gradient in fp32")
            held.hold(name, numbers * wire)
            held.drop("gradient in fp32", "divided")


@dataclass(frozen=True)
class GroupTables:
    """What one rank of a group holds and looks up.

    Attributes:
        ranks: of the group.
        examples: of this rank in the group: under the tower exchange those of its peers as well.
        blocks: of which they consist, one for each peer.
        pooled: by backend, columns that this rank's spread tables make of an example: those of tables split by rows as
            well.
        columns: of them, those of whole rows; `all_columns`: of all ranks.
        split: of them, those of tables split by rows.
        copied: columns of replicated tables; `copied_numbers`: of their rows, with one more for each row.
        in_place: whether what arrives lies as the layout wants it.
        means: features whose sums become means.
        rows: numbers of the rows of sequences that this rank has for the whole group, of `row_slots` slots.
        whole_update: bytes of an update of all rows, where it is counted.
    """

    ranks: int
    examples: int
    blocks: int
    pooled: Mapping[str, int]
    columns: int
    all_columns: int
    split: int
    copied: int
    copied_numbers: int
    in_place: bool
    means: int
    rows: float
    row_slots: int
    whole_update: int

    @property
    def width(self) -> int:
        """Columns of an example, over all ranks."""
        return self.all_columns + self.split + self.copied

    @property
    def looked_up(self) -> int:
        """Examples that this rank looks up: the group's."""
        return self.ranks * self.examples


class GroupWalk:
    """exchange/group.py and exchange/sharded.py.

    Args:
        forward, backward: bytes of an element of the messages between ranks.
        parts: in which the embeddings travel.
        fused: whether one kernel does the local shuffle.
        posted: whether messages are posted piece by piece, as on gloo (distributed/pieces.py).
    """

    def __init__(
        self, held: Held, tables: GroupTables, forward: int, backward: int, parts: int, *, fused: bool, posted: bool
    ) -> None:
        self.held, self.tables, self.parts = held, tables, parts
        self.shuffle = Shuffle(held, fused, tables.in_place, tables.means > 0, parts)
        self._packs = not posted and tables.blocks > 1
        self.forward, self.backward = (forward, backward) if tables.ranks > 1 else (FLOAT, FLOAT)
        travels = (tables.all_columns or tables.split) and not tables.copied
        self.wire = self.backward if travels else FLOAT
        widths = [self.forward if backend == "triton" else FLOAT for backend in tables.pooled]
        self._emitted = max(widths, default=FLOAT)
        self._kinds = sum(size > 0 for size in (tables.all_columns, tables.split, tables.copied))

    def pool(self) -> None:
        """Lookups; several backends' results are put side by side, and stay."""
        tables = self.tables
        for backend, columns in tables.pooled.items():
            width = self.forward if backend == "triton" else FLOAT
            self.held.hold("looked up", tables.looked_up * columns * width)
        if len(tables.pooled) > 1:
            together = tables.looked_up * (tables.columns + tables.split) * self._emitted
            self.held.hold("looked up side by side", together)
        self.held.hold("copies looked up", tables.examples * tables.copied * FLOAT)

    def arrive(self, name: str, dtype: int) -> None:
        """Embeddings of this rank's examples, under `name`, with elements of so many bytes."""
        held, tables = self.held, self.tables
        if tables.all_columns:
            own, copies = tables.looked_up * tables.columns, tables.blocks > 1 and tables.ranks > 1
            held.hold("blocks", own * self._emitted if copies or tables.split else 0)
            held.hold("message", own * self.forward / self.parts if self._is_cast(self.parts) else 0)
            if tables.ranks > 1:
                held.hold("received", tables.examples * tables.all_columns * self.forward / self.parts)
        self._sum_over_owners()
        if self._kinds > 1:
            held.hold("received together", tables.examples * tables.width * FLOAT / self.parts)
        held.drop("blocks", "message")
        width = FLOAT if self._kinds > 1 or tables.split or tables.copied else self.forward
        self.shuffle.assemble(name, tables.examples * tables.width, width, dtype)
        held.drop("received", "received together", "looked up side by side")

    def _is_cast(self, parts: int = 1) -> bool:
        """Whether the message is a copy of what was looked up: in another type, or a part of it."""
        return parts > 1 or self.forward != self._emitted

    def _sum_over_owners(self) -> None:
        """regroup.py: of tables that are split by rows."""
        held, tables = self.held, self.tables
        if not tables.split:
            return
        if self.forward == FLOAT:
            partial = FLOAT if tables.all_columns or self._emitted != FLOAT or tables.blocks > 1 else 0
        else:
            partial = 2 * self.forward  # as sent and as received
        held.hold("partial sums", tables.looked_up * tables.split * partial)
        if tables.ranks > 1:
            held.hold("sums", tables.examples * tables.split * FLOAT)
        held.drop("partial sums")

    def by_peer(self) -> int:
        """`TableGroup.by_peer`: what this host's ranks have for the examples of the peers, as "inside the host".

        Returns:
            Bytes of an element.
        """
        held, tables = self.held, self.tables
        own, received = tables.looked_up * tables.columns, tables.examples * tables.all_columns
        if tables.all_columns:
            held.hold("blocks", own * self._emitted if tables.split else 0)
            held.hold("message", own * self.forward if self._is_cast() else 0)
            if tables.ranks > 1:
                held.hold("inside the host", received * self.forward)
                if self._packs:
                    held.hold("message", own * self.forward)  # by rank
                    held.hold("message", received * self.forward)  # before it lies by peer
            held.drop("message", "blocks")
        self._sum_over_owners()
        if self._kinds > 1:
            held.hold("together", tables.examples * tables.width * FLOAT)
            held.drop("inside the host", "sums")
            held.rename("together", "inside the host")
        return FLOAT if tables.split or tables.copied else self.forward

    def leave(self, gradient: int, dense: bool, divide: int) -> None:
        """The gradient of `arrive` on its way back.

        Args:
            gradient: bytes of its elements.
            dense: whether it has its memory to itself.
            divide: by what it is divided.
        """
        held, tables = self.held, self.tables
        self.shuffle.scatter("sent back", tables.examples * tables.width, gradient, self.wire, dense, divide)
        if tables.all_columns and tables.ranks > 1:
            if self.backward != self.wire:
                held.hold("sent back in its type", tables.examples * tables.all_columns * self.backward)
            held.hold("came back", tables.looked_up * tables.columns * self.backward)

    def update(self) -> None:
        """The way of the gradients to the tables, once they are back."""
        held, tables = self.held, self.tables
        held.drop("sent back in its type")
        if tables.ranks > 1 and not tables.split and not tables.copied:
            held.drop("sent back")
        whole = tables.looked_up * tables.columns * self.backward
        if self.parts > 1:
            held.hold("gradients of all parts", whole)
        if tables.blocks > 1 and tables.ranks > 1:
            held.hold("gradients in order", whole)
        self._split_update()
        self._tables_update()
        held.drop("gradients of all parts", "gradients in order")
        self._copies_update()

    def by_peer_update(self, width: int) -> None:
        """The same of `by_peer`: what came from the peers, in `width` bytes a number, goes on to the owners."""
        held, tables = self.held, self.tables
        apart = tables.blocks > 1 and self._kinds > 1  # a part of a wider matrix is copied
        held.hold("gradients of sums", tables.examples * tables.split * width if apart else 0)
        if tables.all_columns and tables.ranks > 1:
            sent, back = tables.examples * tables.all_columns, tables.looked_up * tables.columns
            held.hold("came back", back * self.backward)
            if self._packs:
                held.hold("message", (sent + back) * self.backward)  # by rank, and before it lies by peer
                held.drop("message")
        self._split_update()
        self._tables_update()
        held.drop("came back")
        in_fp32 = FLOAT if width != FLOAT else 0
        held.hold("gradients of copies", tables.examples * tables.copied * (width * apart + in_fp32))
        self._copies_update()

    def _split_update(self) -> None:
        """The gradients of tables split by rows, gathered, and behind them those of whole rows."""
        held, tables = self.held, self.tables
        if not tables.split:
            return
        own, gathered = (n * tables.split * self.backward for n in (tables.examples, tables.looked_up))
        if self.parts > 1:
            held.hold("gradients of sums", tables.examples * tables.split * self.wire)
        held.hold("gradients of sums", own if self.wire != self.backward else 0)
        if tables.ranks > 1:
            held.hold("gathered", gathered)
            held.hold("gradients of sums", gathered if tables.blocks > 1 else 0)  # in order
            if tables.blocks > 1:
                held.drop("gathered")
        if tables.all_columns:
            columns = tables.columns + tables.split
            held.hold("gradients side by side", tables.looked_up * columns * self.backward)

    def _tables_update(self) -> None:
        """What the backends take: FBGEMM and torch float32, Triton any type, one piece of memory."""
        held, tables = self.held, self.tables
        for backend, columns in tables.pooled.items():
            if backend == "triton":
                held.hold("for the tables", tables.looked_up * columns * self.backward * (len(tables.pooled) > 1))
            elif self.backward != FLOAT:
                held.hold("for the tables", tables.looked_up * columns * FLOAT)
            held.drop("for the tables")
        held.hold("whole update", tables.whole_update)
        held.drop("whole update", "gathered", "gradients of sums", "gradients side by side")

    def _copies_update(self) -> None:
        """Replicated tables: the gradient of all their rows, and its sum over the ranks."""
        held, tables = self.held, self.tables
        if self.parts > 1:
            held.hold("gradients of copies", tables.examples * tables.copied * FLOAT)
        held.hold("gradients of copies", 2 * FLOAT * tables.copied_numbers)
        held.drop("gradients of copies")
