"""Silent corruption: what several ranks hold copies of must be the same on all of them, to the last bit.

Copies are hashed where they lie and the hashes compared: over all ranks for dense parameters (over the data group for
what tensor parallelism shards; at ZeRO-3 only the small parameters that stay whole have copies), over the ranks that
run the same tower modules, and over those that hold copies of a table. Optimizer states that have copies are compared
with them: those of tables and modules, and at ZeRO 0 the dense ones and the fp32 masters.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from megarec.distributed.collectives import Channel, all_gather_rows, build_channel, gather_texts
from megarec.distributed.topology import group_ranks
from megarec.run.build import Run
from megarec.training.faults.report import shortened

CHUNK = 1 << 20  # elements hashed at a time: 16 MiB of int64 stay in the cache
CHUNK_OF_ACCELERATOR = 1 << 26  # fewer launches
Replicated = tuple[Channel, Sequence[int], dict[str, Tensor]]
"""A group, its ranks in the world, and what every rank of it holds a copy of, in the same order."""


def differing_replicas(run: Run) -> str | None:
    """The ranks whose copies differ from the rest, by tensor, the same on all ranks; None: none. Collective."""
    texts = gather_texts("; ".join(_differences(run)), run.topology, run.device)
    found = dict.fromkeys(line for text in texts.values() for line in text.split("; "))
    return "; ".join(found) or None


def _differences(run: Run) -> Iterator[str]:
    for channel, ranks, tensors in replicated_tensors(run):
        # Wherever they lie: lazy Adam counts its steps on the CPU.
        hashes = torch.stack([hash_of(tensor).to(run.device) for tensor in tensors.values()])
        gathered = all_gather_rows(hashes.unsqueeze(0), channel, "hashes").wait()
        by_tensor: dict[str, list[str]] = {}
        for name, values in zip(tensors, gathered.T.tolist(), strict=True):
            if len(set(values)) > 1:
                by_tensor.setdefault(differing_ranks(values, ranks), []).append(name)
        for who, names in by_tensor.items():
            yield f"{who} {shortened(names)}"


def differing_ranks(values: Sequence[int], ranks: Sequence[int]) -> str:
    """The ranks that differ from the majority; without a majority, all of them."""
    common, count = Counter(values).most_common(1)[0]
    if 2 * count <= len(values):
        return f"ranks {', '.join(map(str, ranks))} (no majority tells which) hold different copies of"
    wrong = [str(rank) for rank, value in zip(ranks, values, strict=True) if value != common]
    return f"rank{'s' * (len(wrong) > 1)} {', '.join(wrong)} against {count} others: another copy of"


def replicated_tensors(run: Run) -> Iterator[Replicated]:
    """By group, everything that its ranks hold copies of."""
    topology = run.topology
    kinds = group_ranks(topology.world_size, topology.ranks_per_host, topology.tensor_size)
    members = {kind: next(ranks for ranks in kinds[kind] if topology.rank in ranks) for kind in ("tower", "data")}
    members["world"] = list(range(topology.world_size))
    world = build_channel(topology, "world", run.ledger)
    data = Channel("data", topology.data, members["data"].index(topology.rank), topology.data_size, run.ledger)
    replicated: dict[str, Tensor] = {}
    sharded: dict[str, Tensor] = {}
    for name, is_shard, tensor in run.dense.replicated():
        (sharded if is_shard else replicated)[name] = tensor
    of_host: Literal["tower", "world"] = "tower" if run.config.parallel.exchange == "tower" else "world"
    held: list[tuple[Channel, str, dict[str, Tensor]]] = [(world, "world", replicated), (data, "data", sharded)]
    if run.sparse.modules is not None:
        held.append((run.sparse.modules.replicas, of_host, _tensors(run.sparse.modules.state_dict())))
    tables = {f"table {name}": tensor for name, (_, tensor) in run.sparse.replicated().items()}
    held.append((build_channel(topology, of_host, run.ledger), of_host, tables))
    for channel, kind, tensors in held:
        if channel.size > 1 and tensors:
            yield channel, members[kind], tensors


def _tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


@torch.no_grad()
def hash_of(tensor: Tensor) -> Tensor:
    """int64 []: the sum of all elements' bits, each times an odd number of its own, modulo 2^64.

    A change of any one element is always seen: a number below 2^64 times an odd number is 0 only if it is 0 itself.
    """
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.detach().reshape(-1).view(width)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    length = CHUNK if tensor.device.type == "cpu" else CHUNK_OF_ACCELERATOR
    for start in range(0, bits.numel(), length):
        chunk = bits[start : start + length].long()
        odd = torch.arange(2 * start + 1, 2 * (start + len(chunk)) + 1, 2, device=tensor.device)
        total += (chunk * (odd * _MIX | 1)).sum()
    return total


_MIX = 0x5851F42D4C957F2D  # Knuth's MMIX multiplier: neighbours get far numbers
