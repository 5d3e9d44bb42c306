"""Rows that travel one by one, those of sequences, against plain torch in one process; flat against tower; bytes."""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megarec.config.sections import EmbeddingConfig, TableConfig
from megarec.distributed.collectives import Ledger, WireDtypes
from megarec.distributed.rank_pool import RankPool
from megarec.distributed.topology import build_topology
from megarec.sparse.exchange.sequences import newest
from megarec.sparse.side import SparseSide
from megarec.sparse.towers.assignment import Towers
from megarec.training.faults.report import embedding_faults
from tests.sparse.plain import SEED, SEQUENCE_LAYOUT, Trained, global_batch, slice_of, train_plain
from tests.sparse.ranks import Part, sparse_side, together, train_all
from tests.sparse.test_tower_exchange import STEPS, Outcome, compare, flat_and_tower, train, whole

EXAMPLES = 24
MIXED = {"item": "row", "likes": "column", "clicks": "replicated", "small": "row", "user": "column"}


def embedding(optimizer: str, placement: str, weights: str = "fp32") -> EmbeddingConfig:
    tables = {name: TableConfig(placement=kind) for name, kind in MIXED.items()}  # type: ignore[arg-type]
    return EmbeddingConfig(
        optimizer=optimizer,  # type: ignore[arg-type]
        placement="table" if placement == "mixed" else placement,  # type: ignore[arg-type]
        tables=tables if placement == "mixed" else {},
        weights=weights,  # type: ignore[arg-type]
        learning_rate=0.1,
        eps=1e-3,  # far above rounding: Adam makes full steps of smaller gradients
    )


PLACEMENTS = ("table", "column", "row", "replicated", "mixed", "auto")
CASES = {f"rowwise_adagrad {p}": embedding("rowwise_adagrad", p) for p in PLACEMENTS}
CASES |= {f"{o} {p}": embedding(o, p) for o in ("adagrad", "sgd", "adam") for p in ("table", "mixed")}
CASES["fp16"] = embedding("rowwise_adagrad", "mixed", "fp16")


@functools.cache
def reference(case: str) -> Trained:
    return train_plain(SEQUENCE_LAYOUT, CASES[case], EXAMPLES)


@pytest.fixture(scope="module")
def trained(rank_pool: Callable[[int], RankPool]) -> Callable[[int, str], list[Part]]:
    """What each rank holds after training a case; all cases of a world size are trained in one go."""
    every = {name: (SEQUENCE_LAYOUT, config) for name, config in CASES.items()}

    @functools.cache
    def all_cases(ranks: int) -> list[dict[str, Part]]:
        return [train_all(every, EXAMPLES)] if ranks == 1 else rank_pool(ranks).run(train_all, every, EXAMPLES)

    return lambda ranks, case: [part[case] for part in all_cases(ranks)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_any_ranks_train_as_one_plain_process(trained: Callable, ranks: int, case: str) -> None:
    expected, found = reference(case), together(SEQUENCE_LAYOUT, trained(ranks, case))
    tolerance = {"rtol": 4e-3, "atol": 1e-3} if case == "fp16" else {"rtol": 2e-5, "atol": 2e-6}
    for mine, its in zip(found.embedded, expected.embedded, strict=True):
        torch.testing.assert_close(mine, its, **tolerance)
    for name, tensor in expected.state.items():
        torch.testing.assert_close(found.state[name], tensor, **tolerance)


TWO = Towers((("item", "history", "cart", "wide", "views"), ("user", "clicks", "small", "kinds", "likes")))
FOUR = Towers((("item", "history", "cart", "views"), ("user",), ("likes",), ("clicks", "small", "kinds", "wide")))
EQUAL_TO_THE_BIT = [embedding(o, "table").model_copy(update={"l2": 1e-2}) for o in ("rowwise_adagrad", "adagrad")]
PARTIAL_SUMS = [CASES["rowwise_adagrad row"], CASES["rowwise_adagrad replicated"], CASES["rowwise_adagrad column"]]


@pytest.mark.parametrize(("hosts", "local", "towers"), [(1, 2, TWO), (2, 1, TWO), (2, 2, FOUR), (4, 1, FOUR)])
def test_tower_is_flat_to_the_last_bit(
    rank_pool: Callable[[int], RankPool], hosts: int, local: int, towers: Towers
) -> None:
    by_rank = rank_pool(hosts * local).run(flat_and_tower, SEQUENCE_LAYOUT, EQUAL_TO_THE_BIT, local, towers)
    compare(by_rank, SEQUENCE_LAYOUT, EQUAL_TO_THE_BIT)


@pytest.mark.parametrize(("hosts", "local"), [(2, 1), (2, 2)])
def test_tower_with_rows_copies_and_columns(rank_pool: Callable[[int], RankPool], hosts: int, local: int) -> None:
    by_rank = rank_pool(hosts * local).run(flat_and_tower, SEQUENCE_LAYOUT, PARTIAL_SUMS, local, FOUR)
    for index, _ in enumerate(PARTIAL_SUMS):
        flat, tower = ([pair[index][side] for pair in by_rank] for side in (0, 1))
        for mine, its in zip(flat, tower, strict=True):
            for a, b in zip(mine.embedded, its.embedded, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        expected, found = whole(SEQUENCE_LAYOUT, flat), whole(SEQUENCE_LAYOUT, tower)
        for name, tensor in expected.items():
            torch.testing.assert_close(tensor, found[name], rtol=1e-6, atol=1e-6)


def test_every_id_and_every_row_travel_once(rank_pool: Callable[[int], RankPool]) -> None:
    """What a rank sends of rows, those of its own examples included, is 4 bytes x columns for every id that counts."""
    config, ranks = CASES["sgd table"], 4
    by_rank = rank_pool(ranks).run(flat_and_tower, SEQUENCE_LAYOUT, [config], 2, FOUR)
    batches = [global_batch(SEQUENCE_LAYOUT, EXAMPLES, step) for step in range(STEPS)]
    rows = sum(newest(batch.ids[f.name], f).values.numel() for batch in batches for f in SEQUENCE_LAYOUT.unpooled)
    for group, side in (("world", 0), ("tower", 1), ("peer", 1)):
        for direction in ("forward", "backward"):
            sent = [
                row["bytes"] + row["self_bytes"]
                for (pair,) in by_rank
                for row in pair[side].traffic
                if (row["group"], row["op"], row["direction"]) == (group, "all_to_all sequences", direction)
            ]
            assert sum(sent) == 4 * 8 * rows
    ids = [
        row["bytes"] + row["self_bytes"]
        for ((flat, _),) in by_rank
        for row in flat.traffic
        if row["op"] == "all_to_all ids"
    ]
    pooled = sum(batch.ids[f.name].values.numel() for batch in batches for f in SEQUENCE_LAYOUT.features)
    assert sum(ids) == 4 * (pooled + rows)


def half(local: int) -> list[Outcome]:
    types = WireDtypes(torch.float16, torch.bfloat16)
    return [train(SEQUENCE_LAYOUT, CASES["sgd table"], local, towers, types) for towers in (None, FOUR)]


def test_rows_in_sixteen_bits(rank_pool: Callable[[int], RankPool]) -> None:
    for flat, tower in rank_pool(4).run(half, 2):
        assert all(torch.equal(a, b) for a, b in zip(flat.embedded, tower.embedded, strict=True))
        types = {(row["direction"], row["dtype"]) for row in tower.traffic if row["op"] == "all_to_all sequences"}
        assert types == {("forward", "float16"), ("backward", "bfloat16")}


def in_parts(parts: int) -> tuple[Tensor, Tensor]:
    """Embeddings of a step, and the table of `views` after it; exchanged in that many parts."""
    topology = build_topology(1, tensor=1)
    sparse = SparseSide(
        SEQUENCE_LAYOUT, CASES["rowwise_adagrad mixed"], topology, seed=SEED, device=torch.device("cpu"),
        ledger=Ledger(), overlap=True, shards=None,
    )  # fmt: skip
    batch = slice_of(global_batch(SEQUENCE_LAYOUT, EXAMPLES, 0), topology.rank, topology.world_size)
    lookup = sparse.forward(sparse.distribute(batch), parts)
    seen = []
    for micro in range(parts):
        seen.append(lookup.micro_batch(micro))
        rows = slice(micro * len(seen[micro]), (micro + 1) * len(seen[micro]))
        lookup.send_back(micro, torch.sin(seen[micro] + batch.keys[rows, None]))
    lookup.apply()
    return torch.cat(seen), torch.cat([tensor.flatten().float() for _, tensor in sparse.state().values()])


def test_micro_batches_give_the_same_bits(rank_pool: Callable[[int], RankPool]) -> None:
    pool = rank_pool(2)
    for one, three in zip(pool.run(in_parts, 1), pool.run(in_parts, 3), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def test_a_skipped_step_changes_nothing() -> None:
    sparse = sparse_side(SEQUENCE_LAYOUT, CASES["adagrad table"])
    before = {name: tensor.clone() for name, (_, tensor) in sparse.state().items()}
    lookup = sparse.look_up(global_batch(SEQUENCE_LAYOUT, EXAMPLES, 0))
    lookup.backward(torch.ones_like(lookup.values))
    lookup.skip()
    assert all(torch.equal(tensor, before[name]) for name, (_, tensor) in sparse.state().items())


def test_a_step_names_the_sequence_at_fault() -> None:
    sparse = sparse_side(SEQUENCE_LAYOUT, CASES["sgd table"])
    batch = global_batch(SEQUENCE_LAYOUT, EXAMPLES, 0)
    kinds = batch.ids["kinds"].values[-1]
    sparse.state()["clicks/weight"][1][kinds] = float("nan")
    faults = list(embedding_faults(*sparse.look_up(batch).looked_up(batch)))
    assert any(text.startswith("embeddings of feature kinds are not finite") for text in faults)
    assert not any("feature views" in text or "feature likes" in text for text in faults)
