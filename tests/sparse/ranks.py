"""What the ranks of a pool run: train a case on this rank's slices, hand back what it holds."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megarec.config.sections import EmbeddingConfig
from megarec.distributed.collectives import Ledger
from megarec.distributed.topology import build_topology
from megarec.sparse.layout import EmbeddingLayout
from megarec.sparse.run_placement import place_shards
from megarec.sparse.side import SparseSide
from megarec.sparse.tables.base import State
from tests.sparse.plain import SEED, STEPS, Trained, global_batch, loss, slice_of


@dataclass
class Part:
    """One rank's share of a training."""

    embedded: list[Tensor]
    state: State
    usage: dict[str, float]
    traffic: list[dict[str, Any]]


def sparse_side(
    layout: EmbeddingLayout, config: EmbeddingConfig, ledger: Ledger | None = None, examples: int | None = None
) -> SparseSide:
    """Over the ranks of the pool, or in this process alone."""
    topology, device = build_topology(None, tensor=1), torch.device("cpu")
    shards = place_shards([layout], config, topology, "flat", examples)
    return SparseSide(layout, config, topology, seed=SEED, device=device, ledger=ledger or Ledger(), shards=shards)


def train(
    layout: EmbeddingLayout,
    config: EmbeddingConfig,
    examples: int,
    steps: int = STEPS,
    first_step: int = 0,
    state: State | None = None,
) -> Part:
    """Train on this rank's slices of the global batches first_step .. steps, from the start or from a state."""
    ledger = Ledger()
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    sparse = sparse_side(layout, config, ledger, examples // ranks)
    if state is not None:
        for name, (_, tensor) in sparse.state().items():
            tensor.copy_(state[name][1])
    seen = []
    for step in range(first_step, steps):
        batch = slice_of(global_batch(layout, examples, step), rank, ranks)
        lookup = sparse.look_up(batch)
        leaf = lookup.values.clone().requires_grad_()
        loss(leaf, batch.keys).backward()
        assert leaf.grad is not None
        lookup.backward(leaf.grad)
        lookup.apply()
        seen.append(leaf.detach())
    sparse.settle()
    return Part(seen, sparse.state(), sparse.row_usage(), ledger.rows())


def train_all(cases: dict[str, tuple[EmbeddingLayout, EmbeddingConfig]], examples: int) -> dict[str, Part]:
    """Several cases in one call."""
    return {name: train(layout, config, examples) for name, (layout, config) in cases.items()}


def together(layout: EmbeddingLayout, parts: list[Part]) -> Trained:
    """Global embeddings and tables from what the ranks hold.

    Slices that several ranks hold must be equal to the last bit, and every cell must be held by some rank.
    """
    embedded = [torch.cat(step) for step in zip(*(part.embedded for part in parts), strict=True)]
    state: dict[str, Tensor] = {}
    for part in parts:
        for name, (shard, tensor) in part.state.items():
            rows, columns = _global_shape(layout, name)
            whole = state.setdefault(name, torch.full((rows, columns), float("nan")))
            before = whole[shard.slices]
            assert torch.equal(before[~before.isnan()], tensor.float()[~before.isnan()]), f"{name}: copies differ"
            whole[shard.slices] = tensor.float()
    assert not any(tensor.isnan().any() for tensor in state.values()), "a cell that no rank holds"
    return Trained(embedded, state)


def _global_shape(layout: EmbeddingLayout, name: str) -> tuple[int, int]:
    table_name, what = name.split("/")
    table = layout.table(table_name)
    if what == "steps":
        return 1, 1
    return table.rows, 1 if what in ("rowwise_square_sum", "touched") else table.columns
