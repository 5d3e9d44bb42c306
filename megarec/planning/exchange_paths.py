"""A step of the sparse side from the lookup to the update, by each of its paths: what is held, in order.

    flat        one group of all ranks (sparse/side.py, ChangedLookup in between where L2 or tower modules are)
    towers      a group in the host, then the peers, nothing in the middle (direct.py)
    modules     a group in the host, tower modules, then the peers (tower_exchange.py)

Behind all of them may be sequences (sequences.py, unpooled.py).
"""

from dataclasses import dataclass

from megarec.planning.exchange_walk import FLOAT, GroupWalk, Held, Shuffle
from megarec.planning.probes import DensePass, TowerPass


@dataclass(frozen=True)
class Sequences:
    """Rows that travel one by one.

    Attributes:
        columns: of an example, padded, masks included; `widest`: of the largest sequence alone.
        own: numbers of the rows of this rank's examples; `host`: under the tower exchange, of those that the peers ask
            this host for, else 0.
        places: of rows.
        pieces: of which this rank's message consists, features or parts of their rows; `host_pieces`: of one host's.
        cut: whether a row comes in several parts.
    """

    columns: int
    widest: int
    own: float
    host: float
    places: float
    pieces: int
    host_pieces: int
    cut: bool


@dataclass(frozen=True)
class Job:
    """What the paths of a step need.

    Attributes:
        examples: of this rank in a step; `micro`: in a micro-batch.
        ranks: of the whole job; `hosts`: 1 under the flat exchange.
        dtype: bytes of an element of the embeddings that the dense model sees.
        columns: of an example that it sees, without those of sequences.
        pooled: columns that the group looks up for an example; `made`: those that this host hands on.
        parts: in which embeddings travel.
        forward, backward: bytes of an element of messages.
        mean: whether features become means behind the peers.
        l2: whether there is L2 on what is looked up.
        modules: bytes of the weights of this rank's tower modules; None: there are none. `replicas`: ranks that have
            the same ones.
        next_ids: bytes of ids of the next batch that are here before the step ends.
    """

    examples: int
    micro: int
    ranks: int
    hosts: int
    dtype: int
    columns: int
    pooled: int
    made: int
    parts: int
    forward: int
    backward: int
    fused: bool
    mean: bool
    l2: bool
    modules: int | None
    replicas: int
    next_ids: float
    dense: DensePass
    towers: TowerPass
    sequences: Sequences | None


class StepWalk:
    """Walks through a step.

    Args:
        group: the tables of the world, or of the host.
    """

    def __init__(self, held: Held, group: GroupWalk, job: Job) -> None:
        self.held, self.group, self.job = held, group, job
        joined = job.micro < job.examples and job.parts == 1
        alone = joined or job.dense.gradient == job.columns * job.dtype
        self.dense_gradient = alone and job.sequences is None
        self.looked = job.hosts * job.examples  # examples of the group
        self.changed = job.modules is not None or job.l2

    def flat(self) -> None:
        """The flat exchange."""
        held, job, group = self.held, self.job, self.group
        group.pool()
        if self.changed:
            group.arrive("pooled", FLOAT)
            self._change()
            self._hand_over()
        else:
            group.arrive("embeddings", job.dtype)
        self._dense_model()
        if self.changed:
            self._divided(job.made)
            self._change_back(self.looked)
            held.drop("divided")
            group.leave(FLOAT, True, 1)
            held.drop("with L2")
        else:
            group.leave(job.dtype, self.dense_gradient, job.ranks)
        held.drop("gradient of all")
        self._rows_leave()
        self._rows_finish()
        group.update()
        self._modules_update()

    def towers(self) -> None:
        """The tower exchange without tower modules."""
        held, job, group = self.held, self.job, self.group
        group.pool()
        inner = group.by_peer()
        forward, backward = (job.forward, job.backward) if job.hosts > 1 else (inner, group.wire)
        shuffle = Shuffle(held, job.fused, in_place=False, mean=job.mean, parts=job.parts)
        self._over_peers(job.pooled, inner, forward)
        if job.l2:
            shuffle.assemble("pooled", job.examples * job.columns, forward, FLOAT)
            held.drop("received from peers")
            self._hand_over()
        else:
            shuffle.assemble("embeddings", job.examples * job.columns, forward, job.dtype)
            held.drop("received from peers")
        self._dense_model()
        width, divide, alone = job.dtype, job.ranks, self.dense_gradient
        if job.l2:
            self._divided(job.columns)
            held.hold("with L2", job.examples * job.columns * FLOAT / job.parts)
            held.drop("divided")
            width, divide, alone = FLOAT, 1, True
        shuffle.scatter("sent to peers", job.examples * job.columns, width, backward, alone, divide)
        if job.hosts > 1:
            held.hold("came from peers", self.looked * job.pooled * backward)
        held.drop("with L2", "gradient of all")
        self._rows_leave()
        self._rows_finish()
        if job.hosts > 1:
            held.drop("sent to peers")
        if job.parts > 1:
            held.hold("from peers together", self.looked * job.pooled * backward)
        group.by_peer_update(backward)

    def towers_with_modules(self) -> None:
        """The tower exchange with tower modules."""
        held, job, group = self.held, self.job, self.group
        forward, backward = (job.forward, job.backward) if job.hosts > 1 else (FLOAT, FLOAT)
        shuffle = Shuffle(held, job.fused, in_place=job.hosts == 1, mean=False, parts=job.parts)
        group.pool()
        group.arrive("pooled", FLOAT)
        self._change()
        self._over_peers(job.made, FLOAT, forward)
        shuffle.assemble("embeddings", job.examples * job.columns, forward, job.dtype)
        held.drop("received from peers")
        self._dense_model()
        numbers = job.examples * job.columns
        shuffle.scatter("sent to peers", numbers, job.dtype, backward, self.dense_gradient, job.ranks)
        if job.hosts > 1:
            held.hold("came from peers", self.looked * job.made * backward)
        held.drop("gradient of all")
        if job.parts > 1:
            held.hold("from peers together", self.looked * job.made * backward)
        held.hold("divided", self.looked * job.made * FLOAT if backward != FLOAT else 0)
        self._change_back(self.looked)
        held.drop("divided")
        group.leave(FLOAT, True, 1)
        held.drop("with L2", "from peers together", "sent to peers")
        self._rows_leave()
        self._rows_finish()
        group.update()
        self._modules_update()

    def _change(self) -> None:
        """Tower modules: what they take in and make."""
        held, job = self.held, self.job
        if job.modules is None:
            return
        if job.towers.saved:
            held.drop("pooled")
        held.hold("made", 0 if job.towers.made_saved else self.looked * job.made * FLOAT)

    def _hand_over(self) -> None:
        """What was changed, in the type of the dense model."""
        held, job = self.held, self.job
        if job.dtype == FLOAT:
            held.rename("pooled" if job.modules is None else "made", "embeddings")
        else:
            held.hold("embeddings", job.examples * job.columns * job.dtype)

    def _change_back(self, examples: int) -> None:
        """The gradient of what tower modules took in, and L2 with it."""
        held, job = self.held, self.job
        if job.modules is not None:
            held.hold("gradient for the group", examples * job.pooled * FLOAT)
        if job.l2:
            parts = job.parts if job.modules is None else 1
            held.hold("with L2", examples * job.pooled * FLOAT / parts)

    def _divided(self, columns: int) -> None:
        """A gradient in float32, divided by the ranks."""
        held, part = self.held, self.job.examples * columns / self.job.parts
        held.hold("gradient in fp32", part * FLOAT if self.job.dtype != FLOAT else 0)
        held.hold("divided", part * FLOAT)
        held.drop("gradient in fp32")

    def _over_peers(self, columns: int, width: int, forward: int) -> None:
        """parts.py: so many columns of this host for the peers' examples, and theirs for this rank's."""
        held, job = self.held, self.job
        if job.parts > 1 or width != forward:
            held.hold("message to peers", self.looked * columns * forward / job.parts)
        if job.hosts > 1:
            held.hold("received from peers", job.examples * job.columns * forward / job.parts)
        held.drop("message to peers")

    def _dense_model(self) -> None:
        """Sequences arrive, the dense model computes, and gradients of what it saw are there."""
        held, job = self.held, self.job
        self._rows_arrive()
        if job.dense.saved:  # `activations` have a micro-batch of them
            arriving = job.columns + (0 if job.sequences is None else job.sequences.columns)
            held.drop("embeddings")
            held.hold("embeddings", (job.examples - job.micro) * arriving * job.dtype)
        held.hold("next ids", job.next_ids)
        held.hold("gradient", job.examples * job.dense.gradient)
        if job.micro < job.examples and job.parts == 1:
            columns = job.columns + (0 if job.sequences is None else job.sequences.columns)
            held.hold("gradient of all", job.examples * columns * job.dtype)

    def _modules_update(self) -> None:
        """replicas.py: gradients side by side, and their sum over the replicas."""
        job = self.job
        if job.modules is not None and job.replicas > 1:
            self.held.hold("gradients of modules", 2 * job.modules)
            self.held.drop("gradients of modules")

    def _rows_arrive(self) -> None:
        held, job, rows = self.held, self.job, self.job.sequences
        if rows is None:
            return
        forward = self.group.forward
        if job.hosts > 1:
            held.hold("rows inside the host", rows.host * forward)
            held.hold("message of rows", rows.host * job.forward)
            forward = job.forward
        held.hold("rows", rows.own * forward * (1 + rows.cut))
        held.drop("message of rows")
        held.hold("places", rows.places * 8)
        held.hold("padded rows", job.examples * rows.columns * job.dtype)
        held.rename("embeddings", "without rows")
        held.hold("embeddings", job.examples * (job.columns + rows.columns) * job.dtype)
        held.drop("without rows")

    def _rows_leave(self) -> None:
        held, job, rows = self.held, self.job, self.job.sequences
        if rows is None:
            return
        if job.micro < job.examples and job.parts > 1:
            held.hold("gradients of rows of all", job.examples * rows.columns * job.dtype)
        held.hold("gradients as padded", job.examples * rows.widest * job.dtype)
        held.hold("gradients of rows, cast", rows.own * job.dtype if job.dtype != FLOAT else 0)
        held.hold("gradients of rows", rows.own * FLOAT)
        held.drop("gradients as padded", "gradients of rows, cast", "gradients of rows of all")
        tables, backward = self.group.tables, self.group.backward
        if job.hosts > 1:
            held.hold("rows to peers", rows.own * job.backward * (rows.pieces > 1 or job.backward != FLOAT))
            held.hold("rows from peers", rows.host * job.backward)
            if rows.host_pieces > 1:
                held.hold("in order", rows.host * job.backward)
                held.drop("rows to peers", "rows from peers")
                held.rename("in order", "rows from peers")
            copied = rows.host_pieces > 1 or job.backward != backward
            held.hold("rows sent back", rows.host * backward * copied)
        else:
            copied = rows.pieces > 1 or backward != FLOAT
            held.hold("rows sent back", rows.own * backward * copied)
        if tables.ranks > 1:
            held.hold("rows came back", tables.rows * backward)
        if not copied:
            held.rename("gradients of rows" if job.hosts == 1 else "rows from peers", "rows sent back")
        held.drop("rows to peers", "rows from peers", "gradients of rows")

    def _rows_finish(self) -> None:
        tables = self.group.tables
        if self.job.sequences is None or tables.ranks == 1:
            return
        self.held.drop("rows sent back")
        if tables.row_slots > 1 or tables.blocks > 1:
            self.held.hold("gradients of tables' rows", tables.rows * self.group.backward)
