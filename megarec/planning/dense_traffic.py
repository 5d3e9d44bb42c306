"""What the dense side of a rank sends in a step, as far as the run's ledger counts it.

At ZeRO 0 gradients, bucket by bucket (dense/reduction.py): a reduce-scatter in the host, an all-reduce among peers, an
all-gather in the host, or one all-reduce where a level has one rank. The messages of tensor-parallel layers at every
stage (dense/tensor_parallel.py). Of several labels, which of them have a finite loss (dense/objective.py). From ZeRO 1
on DeepSpeed sends gradients and weights by itself: zero_traffic.py has their bytes, as passes of a ring.
"""

from collections.abc import Iterator, Sequence

from torch import nn

from megarec.config.sections import RunConfig
from megarec.dense.reduction import ALIGNED, buckets_of
from megarec.dense.settings import settings_of
from megarec.dense.tensor_parallel import is_sharded, shard_mlps
from megarec.distributed.collectives import Channel, Ledger
from megarec.distributed.topology import Topology
from megarec.models.blocks import MLP
from megarec.planning.memory import is_shared, parameter_sizes
from megarec.planning.traffic import Message, sparse_messages
from megarec.planning.zero import Zero, zero_of
from megarec.run.spec import ModelSpec
from megarec.sparse.placement import Shard

PURPOSE = "dense gradients"


def run_messages(
    config: RunConfig, spec: ModelSpec, topology: Topology, shards: Sequence[Shard] | None = None
) -> list[Message]:
    """All that the run's ledger counts of a training step of a rank: the sparse side, dense gradients, tensor-parallel
    layers."""
    return sparse_messages(config, spec, topology, shards) + dense_messages(config, spec, topology)


def dense_messages(config: RunConfig, spec: ModelSpec, topology: Topology) -> list[Message]:
    """Those of the dense side."""
    examples, zero = config.data.batch_size // topology.world_size, zero_of(config, topology)
    given = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
    dtype = str(settings_of(config.deepspeed).dtype).removeprefix("torch.")
    dtype = given.get(str(config.deepspeed.get("communication_data_type")), dtype)
    gradients = gradient_messages(parameter_sizes(spec, topology), zero, dtype)
    found = gradients + tensor_messages(config, spec, topology, examples) + _averaged(config, spec, topology, zero)
    return found + zero.accumulation * _finite_labels(spec, topology)


def _finite_labels(spec: ModelSpec, topology: Topology) -> list[Message]:
    """Of a micro-batch: a number for each label, to all ranks."""
    others = topology.world_size - 1
    if spec.labels == 1 or not others:
        return []
    own, far = 4 * spec.labels, topology.world_size - topology.ranks_per_host
    return [Message("world", "all_gather labels", "float32", "forward", others * own, far * own, far)]


def gradient_messages(sizes: Sequence[int], zero: Zero, dtype: str) -> list[Message]:
    """Of ZeRO 0; none at other stages, or on one rank.

    Args:
        sizes: elements of every dense parameter of the rank, in the model's order.
    """
    if zero.stage or zero.ranks == 1:
        return []
    local, hosts = zero.of_host, zero.ranks // zero.of_host
    found = []
    for bucket in buckets_of(sizes, zero.sent):
        elements = sum(-(-sizes[index] // ALIGNED) * ALIGNED for index in bucket)
        flat = zero.sent * (elements + -elements % local)
        if local == 1 or hosts == 1:
            found.append(_ring(flat, max(local, hosts), hosts > 1, dtype))
            continue
        share = flat // local
        inside = (local - 1) * share
        found.append(Message("data", f"reduce_scatter {PURPOSE}", dtype, "backward", inside, 0, 0))
        found.append(_ring(share, hosts, True, dtype))
        found.append(Message("data", f"all_gather {PURPOSE}", dtype, "backward", inside, 0, 0))
    return found


def _ring(size: int, ranks: int, across: bool, dtype: str) -> Message:
    sent = 2 * (ranks - 1) * (size // ranks)
    return Message("data", f"all_reduce {PURPOSE}", dtype, "backward", sent, sent * across, (ranks - 1) * across)


def tensor_messages(config: RunConfig, spec: ModelSpec, topology: Topology, examples: int) -> list[Message]:
    """Of the tensor-parallel layers, for the rank's examples in a step; without what is computed again."""
    if topology.tensor_size == 1:
        return []
    dtype = settings_of(config.deepspeed).dtype
    name, one = str(dtype).removeprefix("torch."), dtype.itemsize * examples * (topology.tensor_size - 1)
    model = spec.meta_model()
    mlps = [(path, module) for path, module in model.named_modules() if is_shared(module, topology.tensor_size)]
    return [
        Message("tensor", op, name, direction, round(one * columns), 0, 0)  # type: ignore[arg-type]
        for path, mlp in mlps
        if isinstance(mlp, MLP)
        for op, direction, columns in _of_mlp(mlp, topology.tensor_size, "numeric" not in path)
    ]


def _averaged(config: RunConfig, spec: ModelSpec, topology: Topology, zero: Zero) -> list[Message]:
    """Gradients of what the ranks of a tensor group hold alike (dense/replicated.py); from ZeRO 1 on of about as much
    of it as the rank has."""
    if topology.tensor_size == 1:
        return []
    model = spec.meta_model()
    shard_mlps(model, Channel("tensor", None, 0, topology.tensor_size, Ledger()))
    elements = sum(parameter.numel() for parameter in model.parameters() if not is_sharded(parameter))
    dtype = settings_of(config.deepspeed).dtype
    kept = dtype.itemsize * (elements // (zero.ranks if zero.stage else 1)) // topology.tensor_size
    name, sent = str(dtype).removeprefix("torch."), 2 * (topology.tensor_size - 1) * kept
    return [Message("tensor", "all_reduce replicated gradients", name, "backward", sent, 0, 0)]


def _of_mlp(mlp: MLP, size: int, input_gradient: bool) -> Iterator[tuple[str, str, float]]:
    """Messages by columns of an example; an input that is data has no gradient."""
    linears = [linear for linear in mlp.linears if isinstance(linear, nn.Linear)]
    for index, linear in enumerate(linears):
        last = index + 1 == len(linears)
        if index % 2 == 0 and not last:  # column-parallel: gathered twice, its input's gradient scattered
            yield "all_gather activations", "forward", linear.in_features
            yield "all_gather activations", "backward", linear.in_features
            if index or input_gradient:
                yield "reduce_scatter gradients", "backward", linear.in_features
            continue
        yield "reduce_scatter activations", "forward", linear.out_features
        yield "all_gather gradients", "backward", linear.out_features
        if index % 2 == 0:
            yield "all_to_all columns", "forward", linear.in_features / size
            yield "all_to_all columns", "backward", linear.in_features / size
