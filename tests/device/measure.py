"""Steps of rank 0 of 4 on the simulated accelerator: what the host waits for and starts in one step, as JSON by case.

A process of its own: the simulated device takes the place of torch's private backend for good.
"""

import json
import sys
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, embedding_bag

from megarec.config.models import WukongConfig
from megarec.config.sections import EmbeddingConfig
from megarec.data.batch import Batch
from megarec.dense.side import DenseResult, keep_gradient
from megarec.distributed.collectives import Ledger, WireDtypes, build_channel
from megarec.distributed.topology import build_topology
from megarec.models.initial import initialize, materialize
from megarec.models.recommender import Recommender
from megarec.planning.fake_job import fake_job
from megarec.sparse.exchange.parts import rows_of
from megarec.sparse.layout import EmbeddingLayout
from megarec.sparse.run_placement import layouts_by_host, place_shards
from megarec.sparse.side import SparseSide
from megarec.sparse.tables import fbgemm_backend, local
from megarec.sparse.tables.base import LocalIds, LocalShard, Pooled, State
from megarec.sparse.towers.assignment import assign_towers
from megarec.sparse.towers.sizes import NO_TOWERS, ResolvedTowers
from megarec.training.faults.step_check import HealthGather
from megarec.training.step import StepTensors
from tests.device.check_part import tables_part
from tests.device.glue import GLUE, glue_bytes
from tests.device.simulated import DEVICE, simulated
from tests.sparse.plain import LAYOUT, SEED, SINGLE_LAYOUT, global_batch

RANKS, EXAMPLES = 4, 8
CASES: dict[str, tuple[EmbeddingLayout, dict[str, Any], dict[str, Any]]] = {
    "fused": (SINGLE_LAYOUT, {}, {}),
    "fused, lists": (LAYOUT, {}, {}),
    "fused, messages in 16 bits": (SINGLE_LAYOUT, {}, {"messages": WireDtypes(torch.float16, torch.bfloat16)}),
    "triton": (SINGLE_LAYOUT, {"backend": "triton"}, {"messages": WireDtypes(torch.float16, torch.bfloat16)}),
    "triton, lists": (LAYOUT, {"backend": "triton"}, {}),
    "torch": (SINGLE_LAYOUT, {"backend": "torch"}, {}),
    "torch, lists": (LAYOUT, {"backend": "torch"}, {}),
    "torch, fp16 weights": (LAYOUT, {"backend": "torch", "weights": "fp16"}, {}),
    "column": (LAYOUT, {"placement": "column"}, {}),
    "row": (LAYOUT, {"placement": "row"}, {}),
    "replicated": (LAYOUT, {"placement": "replicated"}, {}),
    "tower, lists": (LAYOUT, {}, {"exchange": "tower"}),
    "fused, lists, two micro-batches": (LAYOUT, {}, {"overlap": True}),
    "tower, lists, two micro-batches": (LAYOUT, {}, {"exchange": "tower", "overlap": True}),
}


class FusedTables:
    """Stands in for FBGEMM's, whose CUDA kernels wait for nothing: one lookup, one update, SGD."""

    def __init__(self, shards: list[LocalShard], config: EmbeddingConfig, device: torch.device) -> None:
        self._shards = shards
        self._weights = [torch.zeros(of.shard.rows, of.shard.columns, device=device) for of in shards]

    def pool(self, ids: LocalIds) -> Pooled:
        slots = [weight for weight, of in zip(self._weights, self._shards, strict=True) for _ in of.slots]
        parts = [ids.part(slot, slot + 1) for slot in range(len(slots))]
        bags = [
            embedding_bag(p.values.long(), weight, p.offsets.long(), mode="sum", include_last_offset=True)
            for weight, p in zip(slots, parts, strict=True)
        ]
        return Pooled(torch.cat(bags, dim=1), lambda gradient: None)

    def set_learning_rate(self, rate: float) -> None: ...

    def state(self) -> State:
        return {
            f"{of.shard.table}/weight": (of.shard, weight)
            for of, weight in zip(self._shards, self._weights, strict=True)
        }


def measure(layout: EmbeddingLayout, embedding: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Two steps; the second counts: state kept between steps exists then."""
    config = EmbeddingConfig(**{"optimizer": "rowwise_adagrad", **embedding})
    exchange = options.get("exchange", "flat")
    towers = NO_TOWERS
    if exchange == "tower":
        towers = ResolvedTowers(assign_towers(layout, RANKS // 2), None, ())
    with fake_job(0, RANKS), simulated() as seen:
        topology = build_topology(2, tensor=1)
        shards = place_shards(layouts_by_host(layout, topology, exchange, towers), config, topology, exchange, EXAMPLES)
        sparse = SparseSide(
            layout, config, topology, seed=SEED, device=DEVICE, ledger=Ledger(), shards=shards, towers=towers, **options
        )
        with torch.device("meta"):
            model = Recommender(
                layout, 2, WukongConfig(dim=8, layers=2, num_fm=4, num_lcb=4, rank=4, mlp=[16], dropout=0.1)
            )
        materialize(model, DEVICE)
        initialize(model, SEED)
        health = HealthGather(model, build_channel(topology, "world", Ledger()), lambda: 0)
        for step in range(2):
            seen.clear()
            one_step(sparse, model, health, global_batch(layout, EXAMPLES, step), 2 if options.get("overlap") else 1)
    waits = {f"{what} at {place}": count for (what, place), count in seen.waits.items()}
    return {"waits": waits, "launches": dict(seen.launches)}


def one_step(sparse: SparseSide, model: Recommender, health: HealthGather, batch: Batch, micro_batches: int) -> None:
    """`megarec.training.step.train_step` without the engine, which does not run on the simulated device."""
    numeric = torch.ones(batch.size, 2)
    batch = Batch(numeric, batch.ids, batch.labels, batch.keys, batch.valid).in_one_buffer(pinned=False).to(DEVICE)
    lookup = sparse.forward(sparse.distribute(batch), micro_batches)
    made = []
    for micro in range(micro_batches):
        gradients: list[Tensor] = []
        numeric, labels, keys = (rows_of(t, micro, micro_batches) for t in (batch.numeric, batch.labels, batch.keys))
        logits = model(numeric, keep_gradient(lookup.micro_batch(micro), gradients), keys)
        loss = binary_cross_entropy_with_logits(logits, labels)
        loss.backward()
        lookup.send_back(micro, gradients[0])
        made.append(DenseResult(logits.detach(), loss.detach(), gradients[0]))
    health(StepTensors(batch, lookup, made))()
    health.clear()
    lookup.apply()


if __name__ == "__main__":
    local._fbgemm_problem = lambda device: None  # type: ignore[assignment]
    fbgemm_backend.FbgemmTables = FusedTables  # type: ignore[assignment,misc]
    here = find_spec("triton") is not None
    names = sys.argv[1:] or [name for name in CASES if here or not name.startswith("triton")]
    measured: dict[str, Any] = {name: measure(*CASES[name]) for name in names}
    if not sys.argv[1:]:
        measured["glue"] = {name: glue_bytes(*case) for name, case in GLUE.items()}
        measured["part of gpu_check"] = tables_part()
    print(json.dumps(measured))
