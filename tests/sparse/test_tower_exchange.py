"""The tower exchange (SPTT) against the flat one: the same numbers, the bytes of the formula, no collective of all."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megarec.config.regularisation import L2Config
from megarec.config.sections import EmbeddingConfig, TableConfig
from megarec.distributed.collectives import FP32, Ledger, WireDtypes
from megarec.distributed.rank_pool import RankPool
from megarec.distributed.topology import build_topology
from megarec.sparse.layout import EmbeddingLayout, Feature, Table
from megarec.sparse.side import SparseSide
from megarec.sparse.tables.base import State
from megarec.sparse.towers.assignment import Towers
from megarec.sparse.towers.sizes import NO_TOWERS, ResolvedTowers
from tests.sparse.plain import LAYOUT, SEED, WEIGHTED_LAYOUT, global_batch, loss, slice_of

EXAMPLES, STEPS = 24, 3
TWO = Towers((("item", "history", "cart", "wide"), ("user", "clicks", "small")))
FOUR = Towers((("item", "history", "cart"), ("user",), ("clicks", "small"), ("wide",)))
EQUAL = EmbeddingLayout(
    4,
    tuple(Table(f"t{i}", 30, 4) for i in range(8)),
    tuple(Feature(f"f{i}", f"t{i}", "sum", False, 4 * i, 4) for i in range(8)),
    full_embeddings=8,
    small_columns=0,
)
EIGHT = Towers(tuple((f"f{i}",) for i in (3, 1, 4, 0, 5, 2, 6, 7)))


@dataclass
class Outcome:
    """What a rank saw and holds after training."""

    embedded: list[Tensor]
    state: State
    traffic: list[dict[str, Any]]


def embedding(optimizer: str, placement: str, backend: str) -> EmbeddingConfig:
    settings = {"optimizer": optimizer, "placement": placement, "backend": backend}
    return EmbeddingConfig(learning_rate=0.1, eps=1e-6, l2=1e-2, **settings)  # type: ignore[arg-type]


CONFIGS = [embedding(o, "table", "torch") for o in ("rowwise_adagrad", "adagrad", "sgd", "adam")]
CONFIGS += [embedding(o, "table", "fbgemm") for o in ("rowwise_adagrad", "sgd")]
CONFIGS += [embedding("adagrad", "column", "torch"), embedding("sgd", "column", "fbgemm")]
# L2 on all rows: every row stepped, or decayed when it is touched; the latter in float16, rounded by chance.
WHOLE = {"l2": L2Config(weight=1e-2, rows="all")}
LAZY = {"l2": L2Config(weight=1e-2, rows="all", coupled=False), "weights": "fp16", "rounding": "stochastic"}
CONFIGS += [embedding("adam", p, "torch").model_copy(update=WHOLE) for p in ("table", "column")]
CONFIGS += [embedding(o, "table", "torch").model_copy(update=LAZY) for o in ("rowwise_adagrad", "adam")]
if find_spec("triton"):
    CONFIGS += [embedding("rowwise_adagrad", "table", "triton"), embedding("adagrad", "column", "triton")]
MIXED = {"item": "row", "user": "column", "clicks": "replicated", "small": "row", "wide": "table"}
PARTIAL_SUMS = [embedding(o, "row", "torch") for o in ("rowwise_adagrad", "adam")]
PARTIAL_SUMS += [embedding("adam", p, "auto").model_copy(update=WHOLE) for p in ("row", "replicated")]
PARTIAL_SUMS += [embedding("rowwise_adagrad", "row", "fbgemm"), embedding("rowwise_adagrad", "replicated", "auto")]
PARTIAL_SUMS += [
    embedding(o, "table", "auto").model_copy(
        update={"tables": {name: TableConfig(placement=kind) for name, kind in MIXED.items()}}  # type: ignore[arg-type]
    )
    for o in ("sgd", "adagrad")
]
# The mean of a row's g^2 is summed over the owners of its columns, and these are fewer inside a host than in the world.
OTHER_SUMS = embedding("rowwise_adagrad", "column", "auto")


def train(
    layout: EmbeddingLayout,
    config: EmbeddingConfig,
    ranks_per_host: int,
    towers: Towers | None,
    messages: WireDtypes = FP32,
) -> Outcome:
    ledger = Ledger()
    topology = build_topology(ranks_per_host, tensor=1)
    sparse = SparseSide(
        layout,
        config,
        topology,
        seed=SEED,
        device=torch.device("cpu"),
        ledger=ledger,
        exchange="flat" if towers is None else "tower",
        towers=NO_TOWERS if towers is None else ResolvedTowers(towers, None, ()),
        messages=messages,
    )
    seen = []
    for step in range(STEPS):
        batch = slice_of(global_batch(layout, EXAMPLES, step), topology.rank, topology.world_size)
        lookup = sparse.look_up(batch)
        leaf = lookup.values.detach().requires_grad_()
        loss(leaf, batch.keys).backward()
        assert leaf.grad is not None
        lookup.backward(leaf.grad)
        lookup.apply()
        seen.append(leaf.detach())
    sparse.settle()
    return Outcome(seen, sparse.state(), ledger.rows())


def flat_and_tower(
    layout: EmbeddingLayout, configs: list[EmbeddingConfig], ranks_per_host: int, towers: Towers
) -> list[tuple[Outcome, Outcome]]:
    return [(train(layout, c, ranks_per_host, None), train(layout, c, ranks_per_host, towers)) for c in configs]


def whole(layout: EmbeddingLayout, outcomes: list[Outcome]) -> dict[str, Tensor]:
    """Global tensors from the slices of all ranks."""
    found: dict[str, Tensor] = {}
    for name, (shard, tensor) in itertools.chain.from_iterable(outcome.state.items() for outcome in outcomes):
        table, what = name.split("/")
        rows = 1 if what == "steps" else layout.table(table).rows
        columns = layout.table(table).columns if tensor.shape[1] == shard.columns and what != "touched" else 1
        columns = 1 if what in ("steps", "touched", "rowwise_square_sum") else columns
        target = found.setdefault(name, torch.full((rows, columns), float("nan")))
        target[shard.slices] = tensor.float()
    assert not any(tensor.isnan().any() for tensor in found.values())
    return found


@pytest.mark.parametrize(
    ("hosts", "local", "towers"),
    [
        (1, 2, TWO),
        *(pytest.param(*shape, marks=pytest.mark.slow) for shape in ((2, 1, TWO), (2, 1, FOUR), (2, 2, TWO))),
        (2, 2, FOUR),
        pytest.param(4, 1, FOUR, marks=pytest.mark.slow),
    ],
    ids=lambda value: str(len(value)) + " towers" if isinstance(value, Towers) else str(value),
)
def test_same_as_flat_to_the_last_bit(
    rank_pool: Callable[[int], RankPool], hosts: int, local: int, towers: Towers
) -> None:
    compare(rank_pool(hosts * local).run(flat_and_tower, LAYOUT, CONFIGS, local, towers), LAYOUT, CONFIGS)


@pytest.mark.parametrize("local", [1, 2])
def test_eight_towers(rank_pool: Callable[[int], RankPool], local: int) -> None:
    compare(rank_pool(4).run(flat_and_tower, EQUAL, CONFIGS[:2], local, EIGHT), EQUAL, CONFIGS[:2])


def test_row_wise_adagrad_over_columns(rank_pool: Callable[[int], RankPool]) -> None:
    for flat, tower in (pair for (pair,) in rank_pool(4).run(flat_and_tower, LAYOUT, [OTHER_SUMS], 2, FOUR)):
        for mine, its in zip(flat.embedded, tower.embedded, strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("hosts", "local"), [(2, 1), (2, 2)])
def test_weights_travel_through_both_hops(rank_pool: Callable[[int], RankPool], hosts: int, local: int) -> None:
    configs = [CONFIGS[0], CONFIGS[4]]
    compare(
        rank_pool(hosts * local).run(flat_and_tower, WEIGHTED_LAYOUT, configs, local, FOUR), WEIGHTED_LAYOUT, configs
    )


@pytest.mark.parametrize(("hosts", "local", "towers"), [(1, 2, TWO), (2, 1, TWO), (2, 2, FOUR)])
def test_rows_and_copies_up_to_summation_order(
    rank_pool: Callable[[int], RankPool], hosts: int, local: int, towers: Towers
) -> None:
    by_rank = rank_pool(hosts * local).run(flat_and_tower, LAYOUT, PARTIAL_SUMS, local, towers)
    for index, config in enumerate(PARTIAL_SUMS):
        flat, tower = ([pair[index][side] for pair in by_rank] for side in (0, 1))
        for mine, its in zip(flat, tower, strict=True):
            for a, b in zip(mine.embedded, its.embedded, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        expected, found = whole(LAYOUT, flat), whole(LAYOUT, tower)
        for name, tensor in expected.items():
            torch.testing.assert_close(tensor, found[name], rtol=1e-6, atol=1e-6, msg=lambda m, c=config: f"{c}: {m}")


def test_four_hosts_of_two_ranks() -> None:
    with RankPool(8) as pool:
        compare(pool.run(flat_and_tower, EQUAL, CONFIGS[:5], 2, EIGHT), EQUAL, CONFIGS[:5])


def compare(
    by_rank: list[list[tuple[Outcome, Outcome]]], layout: EmbeddingLayout, configs: list[EmbeddingConfig]
) -> None:
    for index, _ in enumerate(configs):
        flat, tower = ([pair[index][side] for pair in by_rank] for side in (0, 1))
        for mine, its in zip(flat, tower, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine.embedded, its.embedded, strict=True))
        expected, found = whole(layout, flat), whole(layout, tower)
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            assert torch.equal(tensor, found[name]), f"{configs[index]}: {name}"


def test_bytes_equal_the_formula(rank_pool: Callable[[int], RankPool]) -> None:
    """spec: S (H-1)/H across hosts each way in both; inside S (L-1)/(H L) flat, S (L-1)/L tower, for even towers."""
    hosts, local, width = 2, 2, EQUAL.width
    size = EXAMPLES // (hosts * local)
    s = 4 * size * width
    by_rank = rank_pool(4).run(flat_and_tower, EQUAL, CONFIGS[:1], local, EIGHT)
    for ((flat, tower),) in by_rank:
        for direction in ("forward", "backward"):
            assert embedding_bytes(flat, "world", direction) == (s * 3 // 4 * STEPS, s // 2 * STEPS)
            assert embedding_bytes(tower, "tower", direction) == (s // 2 * STEPS, 0)
            assert embedding_bytes(tower, "peer", direction) == (s // 2 * STEPS, s // 2 * STEPS)
        assert {row["group"] for row in tower.traffic} == {"tower", "peer"}, "no collective over all ranks"
        ids = sum(row["cross_host_bytes"] for row in tower.traffic if row["op"] == "all_to_all ids")
        assert ids == STEPS * 4 * size * 4, "an id crosses once, to the one host that wants it"


def test_bytes_of_rows_and_copies(rank_pool: Callable[[int], RankPool]) -> None:
    """spec: S (G-1) flat, S (L-1) in the host for tables split by rows; copies send their gradients alone."""
    hosts, local = 2, 2
    size, steps = EXAMPLES // 4, STEPS
    s = 4 * size * EQUAL.width
    configs = [embedding("sgd", "row", "fbgemm"), embedding("sgd", "replicated", "auto")]
    rows = sum(table.rows for table in EQUAL.tables)
    for (flat, tower), (flat_copies, tower_copies) in rank_pool(4).run(flat_and_tower, EQUAL, configs, local, EIGHT):
        for direction, op in (("forward", "reduce_scatter embeddings"), ("backward", "all_gather embeddings")):
            assert sent(flat, "world", op, direction) == s * (4 - 1) * steps
            assert sent(tower, "tower", op, direction) == hosts * s // hosts * (local - 1) * steps
        assert embedding_bytes(tower, "peer", "forward") == (s // 2 * steps, s // 2 * steps)
        ids = sent(flat, "world", "all_to_all ids", "forward")
        own = sum(row["self_bytes"] for row in flat.traffic if row["op"] == "all_to_all ids")
        assert ids + own == 4 * size * len(EQUAL.features) * steps, "every id goes to the one owner of its row"
        assert {row["op"] for row in flat_copies.traffic} == {"all_reduce gradients"}
        gradients = 2 * 4 * rows * (4 + 1)  # as a ring
        assert sent(flat_copies, "world", "all_reduce gradients", "backward") == gradients * 3 // 4 * steps
        assert sent(tower_copies, "tower", "all_reduce gradients", "backward") == gradients // 2 // 2 * steps


def sent(outcome: Outcome, group: str, op: str, direction: str) -> int:
    """Bytes of one operation."""
    keys = [(row["group"], row["op"], row["direction"]) for row in outcome.traffic]
    return int(outcome.traffic[keys.index((group, op, direction))]["bytes"])


def embedding_bytes(outcome: Outcome, group: str, direction: str) -> tuple[int, int]:
    """Sent by a rank in embedding messages of a group: in all, and to other hosts."""
    rows = [
        row
        for row in outcome.traffic
        if row["op"] in ("all_to_all embeddings", "all_to_all towers")
        and (row["group"], row["direction"]) == (group, direction)
    ]
    return sum(row["bytes"] for row in rows), sum(row["cross_host_bytes"] for row in rows)


def with_messages(ranks_per_host: int, towers: Towers) -> list[Outcome]:
    messages = WireDtypes(torch.float16, torch.bfloat16)
    return [train(LAYOUT, CONFIGS[2], ranks_per_host, chosen, messages) for chosen in (None, towers)]


def test_low_precision_messages(rank_pool: Callable[[int], RankPool]) -> None:
    """Numbers are rounded once in both exchanges: the second hop sends on what the first one brought."""
    by_rank = rank_pool(4).run(with_messages, 2, FOUR)
    exact = rank_pool(4).run(train, LAYOUT, CONFIGS[2], 2, None)
    for (flat, tower), full in zip(by_rank, exact, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(flat.embedded, tower.embedded, strict=True))
        assert not torch.equal(flat.embedded[0], full.embedded[0])
        torch.testing.assert_close(tower.embedded[-1], full.embedded[-1], rtol=2e-2, atol=4e-3)
        types = {(row["direction"], row["dtype"]) for row in tower.traffic if "ids" not in row["op"]}
        assert ("forward", "float16") in types
        assert ("backward", "bfloat16") in types


def rows_with_messages(ranks_per_host: int) -> list[Outcome]:
    config = embedding("adagrad", "row", "torch").model_copy(update={"l2": 0.0})
    types = (FP32, WireDtypes(torch.float16, torch.bfloat16))
    return [train(EQUAL, config, ranks_per_host, EIGHT, messages) for messages in types]


def test_low_precision_sums_of_rows(rank_pool: Callable[[int], RankPool]) -> None:
    for full, half in rank_pool(4).run(rows_with_messages, 2):
        assert not torch.equal(full.embedded[0], half.embedded[0])
        torch.testing.assert_close(full.embedded[-1], half.embedded[-1], rtol=2e-2, atol=4e-3)
        types = {(row["op"], row["dtype"]) for row in half.traffic if row["group"] == "tower"}
        assert ("all_to_all embeddings", "float16") in types
        assert ("all_gather embeddings", "bfloat16") in types


def without_groups() -> list[Outcome]:
    """In a process of its own: another test may have left this one in a group."""
    dist.destroy_process_group()
    return [train(LAYOUT, CONFIGS[0], 1, towers) for towers in (None, FOUR)]


def test_one_process_needs_no_groups(rank_pool: Callable[[int], RankPool]) -> None:
    flat, tower = rank_pool(1).run(without_groups)[0]
    assert all(torch.equal(a, b) for a, b in zip(flat.embedded, tower.embedded, strict=True))
    for name, tensor in whole(LAYOUT, [flat]).items():
        assert torch.equal(tensor, whole(LAYOUT, [tower])[name])
