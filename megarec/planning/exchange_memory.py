"""What the messages of the sparse side and their surroundings hold of a rank's memory: the part `exchange`.

It is the most, at any time of a step, of the bytes of all tensors that the sparse side makes or takes in: ids where the
tables are with their offsets, looked-up rows, messages both ways, the embeddings that the dense model sees and their
gradient (which has the memory of the whole gradient of X_0, that of numeric features as well), the gradients of
replicated tables and of tower modules while they are summed over ranks. Other parts have tables and their optimizer's
state, what the dense model saves (embeddings that it saves are `activations`), and the weights, gradients and saved
tensors of tower modules. The batch itself is the loader's. What tables need to sort, sum and update their rows is
nobody's, but for updates of all rows on an accelerator.

exchange_paths.py walks through the step; exchange_meter.py measures the same in a real one. The rules for accelerators
(one kernel for the local shuffle, NCCL's messages, Triton's tables) are read from the code; no one has measured them.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace

import torch

from megarec.config.sections import RunConfig
from megarec.dense.settings import settings_of
from megarec.distributed.collectives import MESSAGE_TYPES
from megarec.distributed.topology import Topology
from megarec.planning.exchange_paths import Job, Sequences, StepWalk
from megarec.planning.exchange_walk import FLOAT, GroupTables, GroupWalk, Held
from megarec.planning.memo import Same, remembered
from megarec.planning.probes import TowerPass, dense_pass, embeddings_type, tower_pass
from megarec.planning.traffic import copied, mean_ids, rank_loads
from megarec.run.build import overlaps
from megarec.run.spec import ModelSpec
from megarec.sparse.layout import EmbeddingLayout
from megarec.sparse.lookups import plan_lookups
from megarec.sparse.placement import Shard
from megarec.sparse.run_placement import layouts_by_host, on_host
from megarec.sparse.tables.local import requested_backend
from megarec.sparse.tables.optimizers import whole_update_bytes


@remembered(
    lambda config, spec, topology, shards, micro_batch, accumulation, device, connected=True: (
        (Same(spec), Same(shards), topology.rank, topology.world_size, topology.ranks_per_host),
        (micro_batch, accumulation, device.type, connected),
        (settings_of(config.deepspeed).dtype, config.dense.recompute, str(config.parallel)),
        config.embedding.model_dump_json(),
    )
)
def exchange_bytes(
    config: RunConfig,
    spec: ModelSpec,
    topology: Topology,
    shards: Sequence[Shard],
    micro_batch: int,
    accumulation: int,
    device: torch.device,
    connected: bool = True,
) -> int:
    """The part `exchange` of a rank: lists with their mean length, positions of sequences as if all were taken.

    Args:
        topology: the job and the rank; its groups are not looked at.
        shards: where all tables lie.
        micro_batch: examples of the rank in one micro-batch, of which a step has `accumulation`.
        connected: whether the other ranks are there; a rehearsal's are not, and its messages then are not posted piece
            by piece on a CPU.

    Raises:
        UserError: the hosts cannot share the towers equally.
    """
    flat, modules = config.parallel.exchange == "flat", spec.towers.modules
    layouts = layouts_by_host(spec.layout, topology, config.parallel.exchange, spec.towers)
    host, hosts = (0, 1) if flat else (topology.host, topology.hosts)
    layout, held_shards = layouts[host], shards if flat else on_host(shards, topology)
    ranks = topology.world_size if flat else topology.ranks_per_host
    examples, overlap = micro_batch * accumulation, overlaps(config, topology, device)
    looked = examples * hosts
    tables, ids, more = _tables(config, layout, held_shards, ranks, topology.rank % ranks, looked, hosts, device)
    hop_a = 0.0 if flat else _hop_a_bytes(layout, looked, _index_bytes(layouts))
    means = tables.means * tables.examples if flat or modules else _means(spec.layout) * examples
    forward, backward = (MESSAGE_TYPES[name].itemsize for name in config.parallel.messages)
    parts = accumulation if overlap and (modules is None or not flat) else 1
    made, weights, sees = layout.width, None, TowerPass(saved=False, made_saved=False)
    if modules is not None and spec.towers.towers is not None:
        here = spec.towers.towers.of_host(host, hosts)
        layers = spec.cost.layers["towers"]
        made, sees = modules.output_columns(here), tower_pass(spec, tuple(here))
        weights = FLOAT * sum(layers[f"towers.{tower}"].parameters for tower in here)
    job = Job(
        examples=examples,
        micro=micro_batch,
        ranks=topology.world_size,
        hosts=hosts,
        dtype=embeddings_type(config).itemsize,
        columns=spec.arriving - spec.layout.sequence_columns,
        pooled=layout.width,
        made=made,
        parts=parts,
        forward=forward,
        backward=backward,
        fused=device.type != "cpu",
        mean=_means(spec.layout) > 0,
        l2=any(config.embedding.looked_up_l2(feature.table) for feature in spec.layout.features),
        modules=weights,
        replicas=ranks,
        next_ids=more + hop_a if overlap else 0.0,
        dense=dense_pass(config, spec),
        towers=sees,
        sequences=_sequences(spec.layout, layout if not flat else None, held_shards, examples, hosts),
    )
    held, posted = Held(), device.type == "cpu" and connected
    inside = GroupWalk(held, tables, forward, backward, parts if flat else 1, fused=job.fused, posted=posted)
    held.hold("ids", ids + hop_a + FLOAT * means)
    step = StepWalk(held, inside, job)
    if flat:
        step.flat()
    elif modules is None:
        step.towers()
    else:
        step.towers_with_modules()
    return round(held.peak)


def _tables(
    config: RunConfig, layout: EmbeddingLayout, shards: Sequence[Shard], ranks: int, rank: int, examples: int,
    blocks: int, device: torch.device,
) -> tuple[GroupTables, float, float]:  # fmt: skip
    """What a rank of a group holds, the bytes of the ids that it has to look up there, and those of the next batch:
    without lists their offsets are the same."""
    names, embedding = copied(shards), config.embedding
    loads = rank_loads(layout, shards, ranks, examples)
    own = [shard for shard in shards if shard.rank == rank]
    spread, copies = ([s for s in own if (s.table in names) == copy] for copy in (False, True))
    reads, rows_read = (Counter(f.table for f in listed) for listed in (layout.features, layout.unpooled))
    backends = _backends(config, layout, shards, {shard.table for shard in spread}, device)
    pooled: dict[str, int] = {}
    for shard in spread:
        backend = backends[shard.table]
        pooled[backend] = pooled.get(backend, 0) + shard.columns * reads[shard.table]
    pooled = {backend: columns for backend, columns in pooled.items() if columns}
    means, every = _means(layout), sum(loads.columns)
    alone = [size for size in (every, loads.split[rank], sum(s.columns for s in copies)) if size]
    mine = spread or copies
    tables = GroupTables(
        ranks=ranks,
        examples=examples,
        blocks=blocks,
        pooled=pooled,
        columns=loads.columns[rank],
        all_columns=every,
        split=loads.split[rank],
        copied=sum(shard.columns * reads[shard.table] for shard in copies),
        copied_numbers=sum(shard.rows * (shard.columns + 1) for shard in copies),
        in_place=len(alone) == 1 and not means and (ranks == 1 or not every) and _in_order(layout, mine, backends),
        means=means,
        rows=ranks * loads.rows[rank],
        row_slots=sum(rows_read[shard.table] for shard in spread),
        whole_update=whole_update_bytes(own, embedding) if device.type != "cpu" else 0,
    )
    index = _index_bytes([layout])
    bags = sum(reads[shard.table] + rows_read[shard.table] for shard in spread) * tables.looked_up
    offsets = index * bags * max(1, len(pooled))
    ids = index * ranks * loads.ids[rank] + FLOAT * ranks * loads.ids[rank] * (loads.weights[rank] > 0)
    for feature in layout.looked_up:
        if feature.table in names:
            ids += index * (mean_ids(feature, examples) + examples) + FLOAT * feature.weighted * examples
    return tables, ids + offsets, ids + offsets * any(loads.lists)


def _backends(
    config: RunConfig, layout: EmbeddingLayout, shards: Sequence[Shard], names: set[str], device: torch.device
) -> dict[str, str]:
    """Of these tables, where nothing that they need is missing; of their shards, columns alone matter."""
    cuts, unpooled = defaultdict[str, dict[int, Shard]](dict), {feature.table for feature in layout.unpooled}
    for shard in shards:  # there are millions
        if shard.table in names:
            cuts[shard.table].setdefault(shard.column_start, shard)
    return {
        name: requested_backend([*own.values()], config.embedding, device.type, unpooled=name in unpooled).backend
        for name, own in cuts.items()
    }


def _in_order(layout: EmbeddingLayout, shards: Sequence[Shard], backends: dict[str, str]) -> bool:
    """Whether the columns of a rank's slots lie as the layout has them."""
    fused, triton = ([name for name, own in backends.items() if own == kind] for kind in ("fbgemm", "triton"))
    (slots,) = plan_lookups(layout, [replace(shard, rank=0) for shard in shards], 1, fused, triton).slots
    starts = [slot.start for slot in slots]
    return starts == sorted(starts)


def _hop_a_bytes(layout: EmbeddingLayout, examples: int, index: int) -> float:
    """Ids of a host's features for the examples of all peers, and the lengths of lists."""
    ids = sum(mean_ids(feature, examples) * (index + FLOAT * feature.weighted) for feature in layout.looked_up)
    return ids + index * examples * sum(feature.multi_valued for feature in layout.looked_up)


def _index_bytes(layouts: Sequence[EmbeddingLayout]) -> int:
    return 4 if all(table.rows < 2**31 for layout in layouts for table in layout.tables) else 8


def _means(layout: EmbeddingLayout) -> int:
    """Features whose sums become means."""
    return sum(feature.multi_valued and feature.pooling == "mean" for feature in layout.features)


def _sequences(
    layout: EmbeddingLayout, of_host: EmbeddingLayout | None, shards: Sequence[Shard], examples: int, hosts: int
) -> Sequences | None:
    if not layout.sequences:
        return None
    spread = {feature.table for feature in layout.unpooled} - copied(shards)
    cut = any(count > 1 for count in Counter(shard.table for shard in shards if shard.table in spread).values())
    ids = {feature.name: mean_ids(feature, examples) for feature in layout.unpooled}
    unpooled = () if of_host is None else of_host.unpooled
    return Sequences(
        columns=layout.sequence_columns,
        widest=max(sequence.mask - sequence.start for sequence in layout.sequences),
        own=sum(ids[feature.name] * feature.columns for feature in layout.unpooled),
        host=sum(mean_ids(feature, examples * hosts) * feature.columns for feature in unpooled),
        places=sum(ids[sequence.features[0]] for sequence in layout.sequences),
        pieces=len(ids) + cut,
        host_pieces=len(unpooled) + cut,
        cut=cut,
    )
