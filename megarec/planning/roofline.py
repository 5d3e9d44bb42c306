"""Time of a training step on a device that is not here, by part, and what bounds each part; nothing is measured.

Operations of the dense model and of tower modules are those that the real modules start, counted on the meta device
(op_counts.py); bytes of the optimizer's step those that DeepSpeed's operations move (tests hold them to a count of its
engines). A part takes as long as its work at the device's rates, or as the host needs to start it. Parts follow one
another, messages as well: what a run hides behind other work is won over this. Not in it: batches from the host,
metrics, waits of the host, its launches for the sparse side, waves of thread blocks that do not fill the chip. Rates
and delays are a machine's own (hardware/); several hosts are towers_pay.py's.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from megarec.config.sections import RunConfig
from megarec.dense.layers import recompute_layers
from megarec.dense.settings import settings_of
from megarec.distributed.topology import Topology, check_divides
from megarec.errors import UserError
from megarec.models.blocks import MLP
from megarec.planning import skew
from megarec.planning.clock import Clock, PartTime
from megarec.planning.hardware import load_hardware
from megarec.planning.memo import Same, remembered
from megarec.planning.memory import parameter_sizes
from megarec.planning.op_counts import Op, OpCounter
from megarec.planning.traffic import mean_ids, sparse_messages, touched_rows
from megarec.planning.zero import Zero, zero_of
from megarec.planning.zero_traffic import dense_sent
from megarec.run.spec import ModelSpec
from megarec.sparse.layout import EmbeddingLayout
from megarec.sparse.placement import Shard
from megarec.sparse.tables.optimizers import table_bytes
from megarec.sparse.towers.modules import TowerModules

# Assumptions, from a review of the code for CUDA; gpu_check.py is there to hold them to a device. Rates and delays of
# the device itself are in its JSON (hardware/).
GLUE_BYTES_A_COLUMN, GLUE_BYTES_IN_FP32 = 24, 48
"""Read and written between tables and first product, both ways, for a column of the looked-up embeddings of an
example, with messages in 16 bits that the tables take and give, and in fp32; tests/device counts them."""
SORT_BYTES_AN_ID = 96  # a radix sort of ids, with their places, before the update


class StepBytes(NamedTuple):
    """Bytes that DeepSpeed moves for an element of a parameter, beside the optimizer's own, and how often.

    Attributes:
        copies: in the backward pass, of gradients into buckets and back; every rank for all of its parameters. At
            stage 0, where there are other ranks: into buckets, and their scaling (dense/reduction.py).
        step: conversions, overflow check, norm, weights back; of the partition.
        clip: more, with gradient_clipping.
        launches: operations for a parameter, of whatever size.
    """

    copies: int
    step: int
    clip: int
    launches: int


STEP_BYTES = {  # by (ZeRO stage, low precision); DeepSpeed 0.19.8, with what dense/engine.py sets
    (0, False): StepBytes(16, 0, 12, 3),
    (0, True): StepBytes(8, 26, 8, 21),
    (1, False): StepBytes(32, 36, 8, 6),
    (1, True): StepBytes(16, 34, 8, 6),
    (2, False): StepBytes(32, 36, 8, 6),
    (2, True): StepBytes(16, 34, 8, 6),
    (3, False): StepBytes(40, 36, 8, 6),
    (3, True): StepBytes(20, 34, 8, 6),
}


@dataclass(frozen=True)
class Roofline:
    """A predicted step.

    Attributes:
        examples: of the rank.
        parts: by name, in the order of a step.
        mfu: against the data sheet's peak of the device; `fused_mfu`: with fused parts.
    """

    device: str
    examples: int
    ranks: int
    parts: dict[str, PartTime]
    mfu: float
    fused_mfu: float

    @property
    def seconds(self) -> float:
        return sum(part.seconds for part in self.parts.values())

    @property
    def fused_seconds(self) -> float:
        return sum(part.fused_seconds for part in self.parts.values())

    def as_json(self) -> dict[str, Any]:
        """For `tools/flops.py --json`."""
        return {
            **{name: getattr(self, name) for name in ("device", "examples", "ranks", "seconds", "fused_seconds")},
            **{name: getattr(self, name) for name in ("mfu", "fused_mfu")},
            "parts": {name: dataclasses.asdict(part) for name, part in self.parts.items()},
        }


def predict_step(config: RunConfig, spec: ModelSpec, name: str, batch: int | None = None) -> Roofline:
    """Predict a step of one rank; all ranks are on one host.

    Ranks are parallel.ranks_per_host, else those of a tensor group.

    Args:
        spec: the model that `config` asks for.
        name: of the device (hardware/).
        batch: examples of the rank; None: its share of data.batch_size.

    Raises:
        UserError: the device or its fp32 rate is not known, ranks or batch do not divide, or optimizer states lie in
            host memory.
    """
    device = load_hardware(name, "--roofline")
    ranks = config.parallel.ranks_per_host or config.parallel.tensor
    check_divides(ranks, ranks, config.parallel.tensor)
    topology = Topology(0, ranks, ranks, config.parallel.tensor)
    zero = zero_of(config, topology)
    if batch is None and config.data.batch_size % ranks:
        raise UserError(
            f"--roofline: data.batch_size={config.data.batch_size} does not divide by {ranks} ranks: give --batch"
        )
    batch = config.data.batch_size // ranks if batch is None else batch
    micro, rest = divmod(batch, zero.accumulation)
    if rest or not micro:
        raise UserError(
            f"--batch {batch} does not divide by deepspeed.gradient_accumulation_steps={zero.accumulation}: take "
            f"{max(1, round(batch / zero.accumulation)) * zero.accumulation}"
        )
    if zero.offloaded:
        raise UserError("--roofline: deepspeed.zero_optimization.offload_optimizer is not in its model; leave it out")
    clock = Clock(device)
    sizes = parameter_sizes(spec, topology)
    parts = clock.dense(dense_ops(config, spec, micro), zero.accumulation, zero.width)
    if spec.towers.modules is not None:
        parts["tower modules"] = clock.whole(tower_ops(spec, batch), 4)
    parts["exchange glue"] = clock.memory(glue_bytes(config, spec.layout, batch))
    parts["table lookup"] = clock.memory(lookup_bytes(config, spec.layout, batch))
    parts["table update"] = clock.memory(update_bytes(config, spec.layout, batch * ranks) // ranks)
    launches = STEP_BYTES[zero.stage, zero.width < 4].launches * len(sizes)
    parts["optimizer"] = clock.memory(optimizer_bytes(config, sum(sizes), zero), launches)
    if ranks > 1:
        of_batch = config.model_copy(update={"data": config.data.model_copy(update={"batch_size": batch * ranks})})
        parts["exchange links"] = clock.messages(sparse_messages(of_batch, spec, topology), topology)
        passes = [*dense_sent(sizes, zero).passes, *tensor_messages(spec, zero, topology, batch)]
        parts["dense links"] = clock.rings(passes)
    peak, flop = 1e12 * clock.peak(zero.width), spec.cost.flop * batch
    made = Roofline(device.name, batch, ranks, parts, 0.0, 0.0)
    return dataclasses.replace(made, mfu=flop / made.seconds / peak, fused_mfu=flop / made.fused_seconds / peak)


@remembered(
    lambda config, spec, examples: (Same(spec), examples, settings_of(config.deepspeed).dtype, config.dense.recompute)
)
def dense_ops(config: RunConfig, spec: ModelSpec, examples: int) -> list[Op]:
    """Forward and backward of the dense model on some examples, but for what puts X_0 together: that is glue."""
    dtype = settings_of(config.deepspeed).dtype
    model = spec.meta_model().to(dtype)
    recompute_layers(model, config.dense.recompute)
    with torch.device("meta"):
        embedded = torch.empty(examples, model.width, dtype=dtype, requires_grad=True)
        numeric, keys = torch.empty(examples, spec.numeric, dtype=dtype), torch.empty(examples, dtype=torch.int64)
        with OpCounter() as first:
            x_BND = model.embed(numeric, embedded, keys)
            gradient = torch.empty_like(x_BND)
            x_BND.backward(gradient)
        glued = [tensor for tensor in (embedded, x_BND, gradient, embedded.grad) if tensor is not None]
        places = {tensor.untyped_storage()._cdata for tensor in glued}
        with OpCounter() as second:
            logits = model.logits(x_BND.detach().requires_grad_(), keys)
            nn.functional.binary_cross_entropy_with_logits(logits, torch.empty(logits.shape)).backward()
    own = [op for op in first.ops if op.kind != "memory" or places.isdisjoint(op.reads.keys() | op.writes.keys())]
    return own + second.ops


@remembered(lambda spec, examples, towers=None: (Same(spec), examples, None if towers is None else tuple(towers)))
def tower_ops(spec: ModelSpec, examples: int, towers: Sequence[int] | None = None) -> list[Op]:
    """Forward and backward of some towers' modules on some examples; None: of all, as each rank of a host sees them
    on its own examples, or its share of them on as many more."""
    modules = spec.towers.modules
    assert modules is not None
    own = range(len(modules.inputs)) if towers is None else towers
    with torch.device("meta"), OpCounter() as counter:
        bank = TowerModules(modules, own)
        columns = sum(modules.inputs[tower] for tower in own) * modules.width
        bank(torch.empty(examples, columns, requires_grad=True)).sum().backward()
    return counter.ops


def glue_bytes(config: RunConfig, layout: EmbeddingLayout, examples: int) -> int:
    """Between tables and dense model, both ways: what the lookup writes and the update reads as well."""
    in_fp32 = "fp32" in config.parallel.messages
    return (
        (GLUE_BYTES_IN_FP32 if in_fp32 else GLUE_BYTES_A_COLUMN) * (layout.width + layout.sequence_columns) * examples
    )


def lookup_bytes(config: RunConfig, layout: EmbeddingLayout, examples: int) -> int:
    """Ids and rows that are read; what is written belongs to the glue."""
    element = 2 if config.embedding.weights == "fp16" else 4
    of_table = {table.name: table.columns for table in layout.tables}
    return int(sum(mean_ids(f, examples) * (of_table[f.table] * element + 4) for f in layout.looked_up))


@remembered(
    lambda config, layout, examples, skewed=False: (
        Same(layout),
        examples,
        skewed,
        config.embedding.optimizer,
        config.embedding.weights,
    )
)
def update_bytes(config: RunConfig, layout: EmbeddingLayout, examples: int, skewed: bool = False) -> int:
    """Ids sorted, weights and optimizer states of the rows that are updated read and written: of all, or of the touched
    ones. What is read of gradients belongs to the glue.

    Args:
        skewed: ids follow a power law (skew.py); else they are spread evenly over the rows.
    """
    total, touched = 0, skew.touched_rows if skewed else touched_rows
    for table in layout.tables:
        ids = sum(mean_ids(feature, examples) for feature in layout.looked_up if feature.table == table.name)
        all_rows = config.embedding.rule_of(table.name).all_rows
        count = table.rows if all_rows else max(1, round(touched(table.rows, ids)))
        rows = Shard(table.name, 0, 0, count, 0, table.columns)
        total += int(ids * SORT_BYTES_AN_ID) + 2 * table_bytes([rows], config.embedding)
    return total


def optimizer_bytes(config: RunConfig, parameters: int, zero: Zero) -> int:
    """What a step of the engine moves for the parameters of a rank, its buckets in the backward pass included."""
    moved = STEP_BYTES[zero.stage, zero.width < 4]
    clip = moved.clip if config.deepspeed.get("gradient_clipping") else 0
    own = parameters // (zero.ranks if zero.stage else 1)
    copies = moved.copies if zero.stage or zero.ranks > 1 else 0
    return copies * parameters + (12 + 8 * zero.moments + moved.step + clip) * own


@remembered(lambda spec, zero, topology, examples: (Same(spec), zero.width, topology.tensor_size, examples))
def tensor_messages(spec: ModelSpec, zero: Zero, topology: Topology, examples: int) -> list[float]:
    """Bytes that a rank sends for the tensor-parallel layers."""
    if topology.tensor_size == 1:
        return []
    sent = zero.width * examples * (topology.tensor_size - 1)
    mlps = [module for module in spec.meta_model().modules() if isinstance(module, MLP)]
    return [sent * columns for mlp in mlps for columns in tensor_columns(mlp, topology.tensor_size)]


def tensor_columns(mlp: MLP, size: int) -> list[float]:
    """Columns of each message of a tensor-parallel MLP, forward and backward (dense/tensor_parallel.py)."""
    linears = [linear for linear in mlp.linears if isinstance(linear, nn.Linear)]
    columns: list[float] = []
    for index, linear in enumerate(linears):
        last = index + 1 == len(linears)
        if index % 2 == 0 and not last:  # column-parallel: gathered twice, its input's gradient scattered
            columns += 3 * [linear.in_features]
            continue
        columns += 2 * [linear.out_features]
        if index % 2 == 0:
            columns += 2 * [linear.in_features / size]  # an all-to-all each way
    return columns
