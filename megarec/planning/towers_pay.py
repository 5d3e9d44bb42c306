"""Whether towers pay: a step of a run's model, batch and cluster with the flat exchange, SPTT alone and tower modules.

Nothing is measured. Bytes are the ledger's (traffic.py), operations those that the modules start (roofline.py), rates
and delays those of a machine's JSON (hardware/), collectives as in links.py. A variant is one row. Parts follow one
another; a step waits for the rank that sends most to other hosts, and tables and towers are taken to be spread evenly
over the ranks in what they look up and update.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megarec.config.base import Section
from megarec.config.sections import RunConfig
from megarec.config.towers import TOWER_MODULES, IdentityTowerConfig, TowerModule
from megarec.data.schema import Schema
from megarec.distributed.topology import Topology
from megarec.errors import UserError
from megarec.planning.hardware import Hardware
from megarec.planning.pieces import timeline
from megarec.planning.step_time import pieces_of
from megarec.planning.work import Work, work_of
from megarec.run.spec import ModelSpec, resolve
from megarec.sparse.placement import Shard
from megarec.sparse.run_placement import place_run

COMPRESSIONS = (2, 4, 8, 16)
FLAT, SPTT = "flat", "SPTT alone"
PAYS = 0.9  # of flat's step: a smaller gain lies within the prediction's own error
NEAR = 1.05  # of the shortest step: a compression that comes so near costs less quality


@dataclass(frozen=True)
class Variant:
    """One way to run the model.

    Attributes:
        compression: of its tower modules; None: it has none.
        seconds: by part, in the order of a step.
        host_bytes, network_bytes: that a rank sends in a step in the exchange, to its host and to other hosts; of the
            rank that sends most to other hosts.
        dense_bytes: that a rank sends for gradients and weights of the dense model.
        flop: of a rank and step, as run/cost.py counts them.
        impossible: why the model cannot be run so; then nothing else is known.
    """

    name: str
    compression: float | None = None
    seconds: dict[str, float] | None = None
    host_bytes: int = 0
    network_bytes: int = 0
    dense_bytes: int = 0
    flop: int = 0
    impossible: str | None = None

    @property
    def links(self) -> float:
        """Seconds of ids and exchange."""
        assert self.seconds is not None
        return self.seconds.get("ids", 0.0) + self.seconds["exchange"]

    @property
    def total(self) -> float:
        assert self.seconds is not None
        return sum(self.seconds.values())


@dataclass(frozen=True)
class TowersPay:
    """The comparison.

    Attributes:
        run: the model as its config has it.
        variants: flat first.
        best: the tower variant to take, or None where none is possible.
        sentence: the answer in plain English.
    """

    run: Variant
    variants: tuple[Variant, ...]
    best: Variant | None
    pays: bool
    sentence: str


def compare(
    config: RunConfig, schema: Schema, hosts: int, ranks_per_host: int, hardware: Hardware, work: Work | None = None
) -> TowersPay:
    """Predict the run and every variant of it.

    Args:
        work: of the run, where it is known.

    Raises:
        UserError: ranks, batch, tables and machine do not fit together, or a figure of the machine is not known.
    """
    known = work
    if known is None:
        known = work_of(config, resolve(config, schema), hosts, ranks_per_host, kinds=hardware.table_kinds)
    run = time_of(known, hardware, "this run")
    plain = config.parallel.exchange == "flat" and run.compression is None
    variants = [
        dataclasses.replace(run, name=FLAT)
        if plain
        else predict(*_flat(config, schema), hosts, ranks_per_host, hardware, FLAT)
    ]
    shards = None  # modules change nothing of where tables lie
    for compression in (None, *COMPRESSIONS):
        name = SPTT if compression is None else f"compression {compression}"
        try:
            own = with_towers(config, hosts, compression)
            spec = resolve(own, schema)
            if shards is None:
                job = Topology(0, hosts * ranks_per_host, ranks_per_host, own.parallel.tensor)
                shards = place_run(own, spec.layout, spec.towers, job)
            variants.append(predict(own, spec, hosts, ranks_per_host, hardware, name, shards))
        except UserError as error:
            variants.append(Variant(name, compression, impossible=str(error)))
    best, pays = choose(variants)
    return TowersPay(
        run,
        tuple(variants),
        best,
        pays,
        sentence((config.model.name, module_name(config)), variants, best, pays, hosts),
    )


def _flat(config: RunConfig, schema: Schema) -> tuple[RunConfig, ModelSpec]:
    parallel = config.parallel.model_copy(update={"exchange": "flat", "towers": None})
    flat = config.model_copy(update={"parallel": parallel, "tower_module": IdentityTowerConfig()})
    return flat, resolve(flat, schema)


def module_name(config: RunConfig) -> str:
    """Of the config's tower module, or of its model family's own (else DLRM's)."""
    if not isinstance(config.tower_module, IdentityTowerConfig):
        return config.tower_module.name
    return config.model.name if config.model.name in TOWER_MODULES else "dlrm"


def with_towers(config: RunConfig, hosts: int, compression: float | None) -> RunConfig:
    """The run under the tower exchange, with the config's towers, or one strided tower a host.

    Args:
        compression: of the tower module (`module_name`); None: no modules.
    """
    towers = hosts if config.parallel.towers is None else config.parallel.towers
    module: TowerModule | IdentityTowerConfig = IdentityTowerConfig()
    if compression is not None:
        given = config.tower_module
        kept: dict[str, Any] = {"name": module_name(config)}
        if not isinstance(given, IdentityTowerConfig):
            kept = given.model_dump(exclude={"compression", "dim", *given.EMITTED}, exclude_unset=True) | {
                "name": given.name
            }
        module = _validated(TOWER_MODULES[kept["name"]], {**kept, "compression": compression})
    parallel = config.parallel.model_copy(update={"exchange": "tower", "towers": towers})
    return config.model_copy(update={"parallel": parallel, "tower_module": module})


def _validated(kind: type[Section], values: dict[str, Any]) -> Any:
    return kind.model_validate(values)


def time_of(work: Work, hardware: Hardware, name: str) -> Variant:
    """How long it takes on a machine.

    Raises:
        UserError: a figure of the machine is not known.
    """
    found = timeline(pieces_of(work, hardware))
    across = sum(message.cross_host_bytes for message in work.messages)
    return Variant(
        name=name,
        compression=work.compression,
        seconds=found.exposed,
        host_bytes=sum(message.bytes for message in work.messages) - across,
        network_bytes=across,
        dense_bytes=work.sent.over_the_ring,
        flop=work.flop,
    )


def predict(
    config: RunConfig,
    spec: ModelSpec,
    hosts: int,
    ranks_per_host: int,
    hardware: Hardware,
    name: str,
    shards: Sequence[Shard] | None = None,
) -> Variant:
    """A step of one way to run the model; see `work_of` and `time_of`."""
    work = work_of(config, spec, hosts, ranks_per_host, shards, kinds=hardware.table_kinds)
    return time_of(work, hardware, name)


def choose(variants: Sequence[Variant]) -> tuple[Variant | None, bool]:
    """The tower variant to take, and whether it pays: the mildest compression near the shortest step.

    It pays where the step is shorter by more than the prediction's error, and at least half of that is the exchange:
    a smaller dense model alone can be had without towers.
    """
    flat, *towers = variants
    possible = [variant for variant in towers if variant.impossible is None]
    if not possible:
        return None, False
    shortest = min(variant.total for variant in possible)
    best = next(variant for variant in possible if variant.total <= NEAR * shortest)
    gain = flat.total - best.total
    return best, best.total <= PAYS * flat.total and flat.links - best.links >= gain / 2


# By model, tower module and compression, with a learned partition; docs/results/towers.md, docs/results/quality.md.
KNOWN_COSTS = {
    ("dlrm", "dlrm", 2): "0.0016 AUC on MovieLens-1M",
    ("wukong", "wukong", 2): "0.0037 AUC on MovieLens-1M",
    ("dlrm", "dlrm", 4): "no AUC on synthetic data",
    ("dlrm", "dlrm", 8): "0.005 AUC on synthetic data",
    ("wukong", "wukong", 4): "0.016 AUC on synthetic data",
    ("wukong", "wukong", 8): "0.017 AUC on synthetic data",
} | {(model, "dcn", times): "no AUC on synthetic data" for model in ("wukong", "dlrm", "dcn") for times in (4, 8)}


def sentence(names: tuple[str, str], variants: Sequence[Variant], best: Variant | None, pays: bool, hosts: int) -> str:
    """The answer.

    Args:
        variants: flat, SPTT alone, then by compression.
        names: of the model and of its tower modules.
    """
    flat = variants[0]
    if hosts == 1:
        return "No: towers do not pay on one host, because nothing crosses between hosts."
    if best is None:
        return f"No: this model cannot be run with towers on {hosts} hosts ({variants[1].impossible})."
    ratio, share = best.total / flat.total, flat.links / flat.total
    said = (
        f"{best.name} is predicted to take {ratio:.2f} of flat's step ({1e3 * best.total:,.2f} of "
        f"{1e3 * flat.total:,.2f} ms)"
    )
    if not pays:
        smaller = ", mostly by a smaller dense model, which needs no towers" if ratio <= PAYS else ""
        return f"No: towers do not pay; at best {said}{smaller}; flat's exchange is {share:.0%} of its step."
    if best.compression is None:
        return f"Yes: {said}, at no cost in quality: SPTT alone changes no number."
    model, module = names
    cost = KNOWN_COSTS.get((model, module, round(best.compression)))
    known = f"it cost {cost}" if cost else f"what {module} modules cost {model} in quality was not measured"
    return f"Yes: towers pay; {said}, and {known} (docs/results/towers.md)."
