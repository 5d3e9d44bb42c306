"""Predicted activations, tables and totals against what a real step holds, and plain arithmetic."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megarec.config.load import load_config
from megarec.config.sections import EmbeddingConfig, RunConfig
from megarec.data.schema import CategoricalFeature, Schema
from megarec.dense.layers import recompute_layers
from megarec.dense.memory import saved_activations
from megarec.distributed.collectives import Ledger
from megarec.distributed.topology import ONE_RANK, Topology
from megarec.models.initial import initialize
from megarec.models.recommender import Recommender
from megarec.planning.memory import parameter_sizes, predict, with_totals
from megarec.run.fits import activation_bytes
from megarec.run.spec import resolve
from megarec.sparse.layout import build_layout
from megarec.sparse.placement import Shard
from megarec.sparse.run_placement import place_run
from megarec.sparse.side import SparseSide
from megarec.sparse.tables.optimizers import table_bytes, whole_update_bytes
from megarec.sparse.towers.sizes import NO_TOWERS

SCHEMA = Schema(
    name="made up",
    categorical=(
        CategoricalFeature(name="user", rows=1_000),
        CategoricalFeature(name="item", rows=300),
        CategoricalFeature(name="history", rows=300, multi_valued=True, table="item"),
    ),
    numeric=("age", "price"),
    rows={},
)
MODELS: list[dict[str, Any]] = [
    {"name": "wukong", "dim": 16, "layers": 2, "num_fm": 4, "num_lcb": 4, "rank": 6, "mlp": [32, 32], "head": [16]},
    {"name": "wukong", "dim": 16, "projection": "attentive", "num_fm": 4, "num_lcb": 4, "rank": 6, "mlp": [32]},
    {"name": "dlrm", "dim": 16, "head": [32, 16]},
    {"name": "dcn", "dim": 16, "layers": 2, "rank": 8, "head": [32]},
]


def config_of(model: dict[str, Any], **sections: Any) -> RunConfig:
    return RunConfig.model_validate({"model": model, "data": {"path": "", "batch_size": 64}, **sections})


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model["name"])
def test_activations_are_those_of_a_forward_pass(model: dict[str, Any], recompute: str) -> None:
    if recompute == "full" and model["name"] != "wukong":
        pytest.skip("only Wukong's layers are recomputed")
    config = config_of({**model, "dropout": 0.1}, dense={"recompute": recompute})
    layout = build_layout(SCHEMA, config.embedding, config.model.dim)
    real = Recommender(layout, 2, config.model)
    initialize(real, 1)
    recompute_layers(real, config.dense.recompute)
    kept: dict[str, int] = {}
    embedded = torch.randn(8, layout.width).requires_grad_()
    with saved_activations(kept, real):
        logits = real(torch.randn(8, 2), embedded, torch.arange(8))
    assert logits.requires_grad
    spec = resolve(config, SCHEMA)
    assert activation_bytes(config, spec, 8) == kept["bytes"]
    assert activation_bytes(config, spec, 80) == pytest.approx(10 * kept["bytes"], rel=0.1)


def test_views_of_parameters_are_no_activations() -> None:
    linear = torch.nn.Linear(100, 100)
    kept: dict[str, int] = {}
    with saved_activations(kept):
        linear(torch.randn(2, 100))
    assert kept["bytes"] == 4 * 2 * 100


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adagrad", "sgd", "adam"])
@pytest.mark.parametrize("weights", ["fp32", "fp16"])
def test_tables_are_as_large_as_the_real_ones(optimizer: str, weights: str) -> None:
    embedding = {"optimizer": optimizer, "weights": weights, "features": {"user": {"embeddings": 2}}}
    config = config_of(MODELS[0], embedding=embedding)
    layout = build_layout(SCHEMA, config.embedding, 16)
    cpu = torch.device("cpu")
    real = SparseSide(layout, config.embedding, ONE_RANK, seed=1, device=cpu, ledger=Ledger())
    steps = sum(tensor.nbytes for name, (_, tensor) in real.state().items() if name.endswith("/steps"))
    assert table_bytes(real.shards, config.embedding) == real.memory_bytes() - steps


def test_what_regularisation_keeps_is_counted() -> None:
    """How far rows are decayed; and, where it is not made in pieces, the gradient of a whole-table update."""
    lazy = {"weight": 0.1, "rows": "all", "coupled": False}
    config = config_of(MODELS[0], embedding={"l2": lazy, "tables": {"item": {"l2": {"weight": 0.1, "rows": "all"}}}})
    layout = build_layout(SCHEMA, config.embedding, 16)
    real = SparseSide(layout, config.embedding, ONE_RANK, seed=1, device=torch.device("cpu"), ledger=Ledger())
    assert table_bytes(real.shards, config.embedding) == real.memory_bytes()
    plain = table_bytes(real.shards, EmbeddingConfig())
    assert real.memory_bytes() - plain == 8 * sum(t.rows for t in layout.tables if t.name != "item")
    item = layout.table("item")
    assert whole_update_bytes(real.shards, config.embedding) == 8 * item.rows * item.columns


@given(rows=st.integers(1, 10**9), columns=st.integers(1, 512))
@settings(max_examples=20)
def test_table_arithmetic(rows: int, columns: int) -> None:
    config = config_of(MODELS[0], embedding={"weights": "fp16"}).embedding
    shard = Shard("t", 0, 0, rows, 0, columns)
    assert table_bytes([shard, shard], config) == 2 * (2 * rows * columns + 4 * rows + rows)


def test_tensor_parallelism_divides_the_mlps() -> None:
    config = config_of(MODELS[0], parallel={"tensor": 4})
    spec = resolve(config, SCHEMA)
    whole = parameter_sizes(spec, Topology(0, 4, 4, 1))
    shards = [parameter_sizes(spec, Topology(rank, 4, 4, 4)) for rank in range(4)]
    for size, *parts in zip(whole, *shards, strict=True):
        assert sum(parts) in (size, 4 * size)  # sharded, or replicated
    assert sum(sum(parts) for parts in shards) < 1.5 * sum(whole)


def test_the_largest_ladder_row_by_hand() -> None:
    """Rank 0 of 256 H100: 2.4 G parameters a tensor-parallel rank, over 32 data ranks, bf16, AdamW."""
    from megarec.data.schema import schema_of

    config = load_config(Path(__file__).parents[2] / "ds_configs/ladder/wukong-108gflop.json")
    parts = predict(config, resolve(config, schema_of(config.data)), Topology(0, 256, 8, 8), micro_batch=4)
    mlp = 138_816 * 16_384 + 7 * 73_728 * 16_384 + 8 * (2 * 16_384**2 + 16_384 * 30_720)
    partition = mlp // 8 // 32
    assert parts["gradients"] == pytest.approx(2 * partition, rel=0.05)
    assert parts["optimizer"] == pytest.approx(12 * partition, rel=0.05)
    totals = with_totals(parts)
    assert totals["model_states"] == parts["parameters"] + parts["gradients"] + parts["optimizer"]
    in_step = parts["activations"] + parts["communication"] + parts["exchange"]
    assert totals["total"] == totals["model_states"] + parts["tables"] + in_step


def test_the_step_counts_where_it_needs_more_than_the_backward_pass() -> None:
    parts = {"parameters": 1, "gradients": 2, "optimizer": 3, "tables": 4, "activations": 5, "communication": 6}
    parts |= {"towers": 7, "exchange": 8}
    assert with_totals({**parts, "step": 10})["total"] == 17 + 8 + 11
    assert with_totals({**parts, "step": 20})["total"] == 17 + 8 + 20


def test_averages_are_there_twice_while_they_are_the_weights() -> None:
    parts = dict.fromkeys(("parameters", "gradients", "optimizer", "tables", "towers"), 1)
    parts |= {"activations": 5, "communication": 6, "step": 10, "averages": 8, "exchange": 0}
    assert with_totals(parts)["total"] == 5 + 8 + 11
    assert with_totals({**parts, "averages": 20})["total"] == 5 + 20 + 20


def test_averages_by_hand() -> None:
    """Master weights of the rank's partition, and the tables that are small enough."""
    topology, averages = Topology(1, 4, 4, 1), {}
    for limit in (0, 300, 1_000):
        config = config_of(
            MODELS[2], train={"ema": {"table_rows": limit}}, deepspeed={"zero_optimization": {"stage": 1}}
        )
        spec = resolve(config, SCHEMA)
        shards = [Shard("user", 1, 0, 500, 0, 16), Shard("item", 1, 0, 300, 0, 16), Shard("item", 2, 0, 300, 0, 16)]
        averages[limit] = predict(config, spec, topology, 16, shards)["averages"]
    partition = -(-sum(parameter_sizes(spec, topology)) // 8) * 2
    assert averages == {0: 4 * partition, 300: 4 * (partition + 4_800), 1_000: 4 * (partition + 4_800 + 8_000)}


def test_micro_batches_on_the_wire_hold_what_arrives_twice() -> None:
    sections: dict[str, Any] = {"embedding": {"backend": "torch"}, "deepspeed": {"gradient_accumulation_steps": 2}}
    topology = Topology(rank=0, world_size=2, ranks_per_host=1, tensor_size=1)
    held = {}
    for overlap in (False, True):
        config = config_of(MODELS[2], **sections, parallel={"overlap": overlap})
        shards = place_run(config, resolve(config, SCHEMA).layout, NO_TOWERS, topology)
        held[overlap] = predict(config, resolve(config, SCHEMA), topology, 16, shards)["exchange"]
    own = [shard.table for shard in shards if shard.rank == topology.rank]
    features, ids = (2, 1 + 2.5) if own == ["item"] else (1, 1)  # item and its lists, or user
    next_ids = 4 * 2 * 32 * (ids + features)
    # Put together they are there twice; one message of the whole gradient is gone by then, and so is what it is cut of.
    together, message, joined = 4 * 2 * 32 * 16 * features, 4 * 32 * 48, 4 * 32 * 48
    assert len(own) == 1 and held[True] - held[False] == next_ids + max(together, message) - message - joined
