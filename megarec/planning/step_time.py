"""How long a rank's work takes on a machine, as pieces on its streams; nothing is measured.

On an accelerator a host thread starts operations ahead of the device, and messages travel as the code lets them
(training/step.py, dense/reduction.py, docs/accelerators.md):

    the ids of the next batch     once the backward pass is made, beside check, optimizer and update
    embeddings of a micro-batch   beside the dense work of the one before
    dense gradients               bucket by bucket in the backward pass (stage 0), or by full bucket (overlap_comm)
    the check                     the host waits for its answer, and only then starts the optimizer
    weights (ZeRO 1 to 3)         after the optimizer; the tables' update waits for them

On a CPU the ranks of a host share its cores, which send as well as compute: all pieces follow one another.
"""

from collections.abc import Sequence

from megarec.planning.clock import FITTED, Clock, Constants
from megarec.planning.hardware import Figure, Hardware, needed
from megarec.planning.links import linked_hosts, network_delay
from megarec.planning.pieces import Piece, Stream
from megarec.planning.skew import hits
from megarec.planning.table_work import part_seconds
from megarec.planning.work import Work

FORWARD = 1 / 3  # of the work of a forward and backward pass
LOOKUP_KERNELS, UPDATE_KERNELS, CHECK_KERNELS = 10, 16, 12
"""Of the sparse side and of the step's check, whatever the tables are; from the code."""
IDS, EXCHANGED = ("ids", "lengths", "weights"), ("embeddings", "towers", "squares", "gradients")


def pieces_of(work: Work, hardware: Hardware, constants: Constants = FITTED) -> list[Piece]:
    """A step, in an order in which its streams could run it.

    Raises:
        UserError: a figure of the machine is not known.
    """
    rates = _Rates(work, hardware, constants)
    return _in_turn(work, hardware, rates) if hardware.device == "cpu" else _on_streams(work, hardware, rates)


class _Rates:
    """Seconds of the parts of a step."""

    def __init__(self, work: Work, hardware: Hardware, constants: Constants) -> None:
        self._work, self._hardware, self._clock = work, hardware, Clock(hardware, constants)

    def sent(self, what: Sequence[str], direction: str | None = None) -> float:
        own = [
            message
            for message in self._work.messages
            if message.op.split(" ", 1)[1] in what and direction in (None, message.direction)
        ]
        return self._clock.messages(own, self._work.topology).seconds

    def memory(self, moved: float, kernels: int = 0, rate: Figure | None = None) -> float:
        return self._clock.memory(round(moved), rate=rate).seconds + kernels * self._clock.start

    @property
    def lookup(self) -> float:
        """Ids and rows, as far as a cache does not answer, and what lies between tables and dense model."""
        work, cache = self._work, self._hardware.cache_mb
        missed = 1.0
        if cache is not None:
            missed -= hits(work.reads, 1e6 * cache.value * work.topology.world_size)
        rows = self.memory(missed * work.moved["lookup"], LOOKUP_KERNELS, self._hardware.lookup_gb_s)
        return rows + self.memory(work.moved["glue"])

    @property
    def update(self) -> float:
        moved = self._work.moved["update" if self._hardware.cache_mb is None else "skewed update"]
        return self.memory(moved, UPDATE_KERNELS, self._hardware.update_gb_s)

    @property
    def optimizer(self) -> float:
        return self.memory(self._work.moved["optimizer"], self._work.launches)

    @property
    def dense(self) -> float:
        """Of a micro-batch, on the device alone."""
        return self._clock.on_device(self._work.dense, self._work.width)

    @property
    def towers(self) -> float:
        work = self._work
        return self._clock.on_device(work.towers, 4) if work.towers else 0.0

    @property
    def tensor(self) -> float:
        return self._clock.rings(self._work.tensor).seconds

    def ring(self, sent: float) -> float:
        """One pass over the ranks that share the dense model."""
        topology, ways = self._work.topology, self._work.topology.tensor_size
        return self._clock.rings([sent], topology.hosts, topology.ranks_per_host // ways, ways).seconds

    def reduction(self, buckets: int = 1) -> float:
        """Of a bucket of the gradients, of so many: an all-reduce, or a reduce-scatter."""
        topology, passes = self._work.topology, [sent / buckets for sent in self._work.sent.gradients]
        ways = topology.tensor_size
        ranks = topology.hosts, topology.ranks_per_host // ways, ways
        return (
            self._clock.all_reduce(passes, *ranks) if len(passes) == 2 else self._clock.rings(passes, *ranks)
        ).seconds

    @property
    def inside(self) -> float:
        """Weights for a backward pass, inside a host."""
        return self._clock.rings([self._work.sent.inside]).seconds

    def forward_weights(self, micro: int) -> float:
        """Weights for the forward pass of a micro-batch."""
        over, inside = self._work.sent.for_forward(micro)
        return self.ring(over) + self._clock.rings([inside]).seconds

    @property
    def answer(self) -> float:
        """All ranks' small message."""
        topology = self._work.topology
        if topology.world_size == 1:
            return 0.0
        hosts = linked_hosts(topology.hosts, topology.ranks_per_host, self._hardware)
        return network_delay(hosts, self._hardware) if hosts > 1 else 1e-6 * needed(self._hardware, "host_link_us")


def _in_turn(work: Work, hardware: Hardware, rates: _Rates) -> list[Piece]:
    clock = Clock(hardware)
    dense = clock.dense(work.dense, work.accumulation, work.width)
    computing = sum(part.seconds for part in dense.values())
    tables = None if work.tables is None else part_seconds(work.tables, hardware)
    pieces = [
        Piece("ids", "ids", "compute", rates.sent(IDS)),
        *([] if tables is None else [Piece("ids joined", "ids", "compute", tables["ids"])]),
        Piece("lookup", "lookup", "compute", rates.lookup if tables is None else tables["lookup"]),
        Piece("embeddings", "exchange", "compute", rates.sent(EXCHANGED, "forward")),
    ]
    if work.towers:
        towers = clock.whole(work.towers, 4).seconds
        pieces.append(Piece("tower modules", "tower modules", "compute", towers))
    pieces.append(Piece("forward", "dense compute", "compute", FORWARD * computing))
    pieces.append(Piece("backward", "dense compute", "compute", (1 - FORWARD) * computing))
    if work.tensor:
        pieces.append(Piece("tensor links", "tensor links", "compute", rates.tensor))
    if tables is not None:
        pieces.append(Piece("regroup", "lookup", "compute", tables["back"]))
    pieces.append(Piece("gradients of embeddings", "exchange", "compute", rates.sent(EXCHANGED, "backward")))
    sent, weights = work.sent, rates.ring(work.sent.after)
    gathered = sent.gathers * (rates.ring(sent.backward) + rates.inside)
    gathered += sum(rates.forward_weights(micro) for micro in range(sent.gathers))
    gradients = sent.reductions * rates.reduction() + gathered
    pieces.append(Piece("dense gradients", "dense gradients", "compute", gradients))
    if tower_gradients := rates.sent(["tower gradients"]):
        pieces.append(Piece("tower gradients", "dense gradients", "compute", tower_gradients))
    optimizer = clock.memory(work.moved["optimizer"], work.launches).seconds
    pieces.append(Piece("optimizer", "update", "compute", optimizer))
    if weights:
        pieces.append(Piece("weights", "dense gradients", "compute", weights))
    pieces.append(Piece("update", "update", "compute", rates.update if tables is None else tables["update"]))
    return pieces


class _Step:
    """Pieces of a step with the host's starts of them: a piece begins when the one before it has been started, and the
    one after it not before it is started itself."""

    def __init__(self, launch: float) -> None:
        self._launch = launch
        self.pieces: list[Piece] = []
        self._started: str | None = None
        self._last: str | None = None

    def compute(self, name: str, part: str, seconds: float, kernels: int, after_last: tuple[str, ...] = ()) -> None:
        """Work of the device after all that went before it."""
        self._add(name, part, "compute", seconds, kernels, after_last)

    def message(self, name: str, part: str, seconds: float, after_last: tuple[str, ...] = ()) -> None:
        """A message that the step waits for; none where it takes no time."""
        if seconds:
            self._add(name, part, "exchange", seconds, 1, after_last)

    def _add(
        self, name: str, part: str, stream: Stream, seconds: float, kernels: int, after_last: tuple[str, ...]
    ) -> None:
        after = tuple(piece for piece in (self._started, self._last) if piece is not None)
        self.pieces.append(Piece(f"start {name}", "launches", "host", kernels * self._launch))
        self.pieces.append(Piece(name, part, stream, seconds, after, after_last))
        self._started, self._last = f"start {name}", name

    def beside(self, name: str, part: str, stream: Stream, seconds: float) -> None:
        """Work that begins here and that what follows does not wait for."""
        after = (self._last,) if self._last is not None else ()
        self.pieces.append(Piece(name, part, stream, seconds, after))

    def wait_for(self, *names: str) -> None:
        """What follows on the device waits for them."""
        if self._last is not None and names:
            self.pieces.append(Piece(f"wait for {names[0]}", "launches", "compute", 0.0, (self._last, *names)))
            self._last = f"wait for {names[0]}"

    def host_waits(self) -> None:
        """The host starts nothing more before the device has come so far."""
        if self._last is not None:
            self.pieces.append(Piece(f"host waits for {self._last}", "launches", "host", self._launch, (self._last,)))


def _on_streams(work: Work, hardware: Hardware, rates: _Rates) -> list[Piece]:
    step = _Step(1e-6 * hardware.launch_us.value)
    overlap, ids = work.overlap is not False, rates.sent(IDS)
    if ids and not overlap:
        step.message("ids", "ids", ids)
    step.compute("lookup", "lookup", rates.lookup, LOOKUP_KERNELS, ("ids",) if ids and overlap else ())
    towered = [(d, rates.sent(["embeddings"], d), rates.sent(["towers"], d)) for d in ("forward", "backward")]
    (_, embeddings, towers), (_, gradients, tower_gradients) = towered
    step.message("embeddings", "exchange", embeddings)
    if work.towers:
        step.compute("tower modules", "tower modules", FORWARD * rates.towers, len(work.towers) // 3)
    step.message("tower outputs", "exchange", towers)
    waits = _dense(work, rates, step)
    step.message("gradients of tower outputs", "exchange", tower_gradients)
    if work.towers:
        backward = (1 - FORWARD) * rates.towers, len(work.towers) - len(work.towers) // 3
        step.compute("tower modules backward", "tower modules", *backward)
    step.message("gradients of embeddings", "exchange", gradients + rates.sent(["squares", "gradients"]))
    step.message("tower gradients", "dense gradients", rates.sent(["tower gradients"]))
    step.compute("check", "check", rates.memory(0, CHECK_KERNELS), CHECK_KERNELS)
    step.message("answer", "check", rates.answer)
    if ids and overlap:
        step.beside("ids", "ids", "ids", ids)
    step.host_waits()
    step.wait_for(*waits)
    step.compute("optimizer", "update", rates.optimizer, work.launches)
    step.message("weights", "dense gradients", rates.ring(work.sent.after))
    step.compute("update", "update", rates.update, UPDATE_KERNELS)
    step.compute("end", "update", 0.0, 0)
    return step.pieces


def _dense(work: Work, rates: _Rates, step: _Step) -> list[str]:
    """The dense model, micro-batch by micro-batch; what the optimizer has to wait for beside it."""
    kernels, dense, sent, waits = len(work.dense), rates.dense, work.sent, list[str]()
    for micro in range(work.accumulation):
        of_micro = f" {micro}" if work.accumulation > 1 else ""
        if sent.forward:
            weights = rates.forward_weights(micro)
            step.beside(f"weights for forward{of_micro}", "dense gradients", "gradients", weights)
        step.compute(f"forward{of_micro}", "dense compute", FORWARD * dense, kernels // 3)
        if sent.forward:
            step.wait_for(f"weights for forward{of_micro}")
        if work.tensor:
            step.message(f"tensor links {micro}", "tensor links", rates.tensor / work.accumulation)
        if work.labels:
            step.message(f"labels {micro}", "check", rates.answer)
        again = rates.ring(sent.backward) + rates.inside
        if again:
            step.beside(f"weights for backward{of_micro}", "dense gradients", "gradients", again)
        last = micro + 1 == work.accumulation
        waits += _backward(work, rates, step, of_micro, sends=last or sent.reductions > 1)
        if again:
            step.wait_for(f"weights for backward{of_micro}")
    return waits


def _backward(work: Work, rates: _Rates, step: _Step, micro: str, sends: bool) -> list[str]:
    """Of a micro-batch; where it sends gradients these leave bucket by bucket."""
    seconds, kernels = (1 - FORWARD) * rates.dense, len(work.dense) - len(work.dense) // 3
    buckets, waits = work.buckets if sends else 1, list[str]()
    for bucket in range(buckets):
        name = f"backward{micro}, part {bucket + 1}" if buckets > 1 else f"backward{micro}"
        step.compute(name, "dense compute", seconds / buckets, kernels // buckets)
        if not sends or not work.sent.gradients:
            continue
        sending = rates.reduction(buckets)
        if work.early and work.overlap is not False:
            step.beside(f"dense gradients{micro} {bucket + 1}", "dense gradients", "gradients", sending)
            waits.append(f"dense gradients{micro} {bucket + 1}")
        elif bucket + 1 == buckets:
            step.message(f"dense gradients{micro}", "dense gradients", buckets * sending)
    return waits
