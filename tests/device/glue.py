"""Bytes between the lookup and the first product of the dense model, and on the way back, on the simulated accelerator.

Counted is every pass over embeddings or their gradients: what the lookup writes, all messages and shuffles, and what
the update reads. Not counted: what the lookup reads and the update writes of tables, ids, and the dense model's GEMMs,
which read X_0 and write its gradient.
"""

from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from megarec.config.models import WukongConfig
from megarec.config.sections import EmbeddingConfig
from megarec.dense.side import keep_gradient
from megarec.distributed.collectives import FP32, Ledger, WireDtypes
from megarec.distributed.topology import build_topology
from megarec.models.initial import materialize
from megarec.models.recommender import Recommender
from megarec.planning.fake_job import fake_job
from megarec.sparse.layout import EmbeddingLayout, Feature, Table
from megarec.sparse.run_placement import layouts_by_host, place_shards
from megarec.sparse.side import SparseSide
from megarec.sparse.tables import fbgemm_backend, local
from megarec.sparse.tables.base import LocalIds, Pooled, State
from megarec.sparse.towers.sizes import NO_TOWERS
from tests.device.simulated import DEVICE, Seen, simulated
from tests.sparse.plain import SEED, global_batch

RANKS, EXAMPLES, FEATURES, NUMERIC, DIM = 4, 32, 44, 2, 160  # the ladder: 691 features and 32 numeric embeddings
LAYOUT = EmbeddingLayout(
    DIM,
    tuple(Table(f"t{i}", 50, DIM) for i in range(FEATURES)),
    tuple(Feature(f"f{i}", f"t{i}", "sum", False, DIM * i, DIM) for i in range(FEATURES)),
    full_embeddings=FEATURES,
    small_columns=0,
)
LADDER = WireDtypes(torch.float16, torch.bfloat16)
GLUE = {  # messages, type of the dense model, type that the tables emit and take back
    "tables in the type of the messages": (LADDER, torch.bfloat16, True),
    "tables in float32": (LADDER, torch.bfloat16, False),
    "all in float32": (FP32, torch.float32, False),
}


class FirstProduct(torch.autograd.Function):
    """Stands for what the dense model does with X_0."""

    @staticmethod
    def forward(ctx: Any, x_BND: Tensor, seen: Seen) -> Tensor:
        ctx.seen, ctx.x_BND = seen, x_BND
        with seen.paused():
            return x_BND.float().sum(dim=(1, 2))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        with ctx.seen.paused():
            return torch.ones_like(ctx.x_BND), None


def glue_bytes(messages: WireDtypes, dtype: torch.dtype, emit_messages: bool) -> float:
    """Of one step, by example and column of X_0."""
    emitted = messages.forward if emit_messages else torch.float32

    class CountedTables:
        """In the place of a fused backend: the lookup writes its output once, the update reads its gradient once."""

        def __init__(self, *arguments: Any) -> None: ...

        def pool(self, ids: LocalIds) -> Pooled:
            columns = FEATURES // RANKS * DIM
            with seen.paused():
                values = torch.ones(ids.examples, columns, dtype=emitted, device=DEVICE)
            seen.bytes += values.numel() * values.element_size()

            def update(gradient: Tensor) -> None:
                read = gradient if emit_messages else gradient.to(emitted)
                seen.bytes += read.numel() * read.element_size()

            return Pooled(values, update)

        def state(self) -> State:
            return {}

    config = EmbeddingConfig()
    fbgemm_is_here = patch.object(local, "_fbgemm_problem", lambda device: None)
    with (
        fake_job(0, RANKS), simulated() as seen, fbgemm_is_here,
        patch.object(fbgemm_backend, "FbgemmTables", CountedTables), patch.object(local.LocalTables, "_touch"),
    ):  # fmt: skip
        topology = build_topology(2, tensor=1)
        shards = place_shards(layouts_by_host(LAYOUT, topology, "flat", NO_TOWERS), config, topology, "flat", EXAMPLES)
        sparse = SparseSide(
            LAYOUT, config, topology, seed=SEED, device=DEVICE, ledger=Ledger(), shards=shards, messages=messages,
            dtype=dtype,
        )  # fmt: skip
        with torch.device("meta"):
            model = Recommender(LAYOUT, 2, WukongConfig(dim=DIM, layers=1, numeric_embeddings=NUMERIC, numeric_mlp=[]))
        materialize(model.to(dtype), DEVICE)
        ids = sparse.distribute(global_batch(LAYOUT, EXAMPLES, 0).to(DEVICE))
        numeric = torch.ones(EXAMPLES, 2, dtype=dtype, device=DEVICE)
        seen.clear()
        lookup = sparse.forward(ids)
        kept: list[Tensor] = []
        x_BND = model.inputs(numeric, keep_gradient(lookup.values, kept).to(dtype), None)
        FirstProduct.apply(x_BND, seen).sum().backward()
        lookup.backward(kept[0])
        lookup.gradient_total()
        lookup.apply()
    return seen.bytes / x_BND.numel()
