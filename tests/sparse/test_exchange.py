"""The sparse side on 1 to 4 ranks against plain torch in one process."""

import dataclasses
import functools
from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch

from megarec.config.sections import EmbeddingConfig, TableConfig
from megarec.data.batch import Ids
from megarec.distributed.rank_pool import RankPool
from megarec.sparse.layout import EmbeddingLayout, Feature, Table
from megarec.sparse.side import SparseSide
from megarec.sparse.tables import stacked
from megarec.sparse.tables.base import State
from tests.sparse.plain import (
    LAYOUT,
    SINGLE_LAYOUT,
    SIX_COLUMNS_LAYOUT,
    WEIGHTED_LAYOUT,
    Trained,
    global_batch,
    train_plain,
)
from tests.sparse.ranks import Part, sparse_side, together, train, train_all

EXAMPLES = 24
OPTIMIZERS = ("rowwise_adagrad", "adagrad", "sgd", "adam")


MIXED = {"item": "row", "user": "column", "clicks": "replicated", "small": "row", "wide": "table"}


def embedding(optimizer: str, placement: str, backend: str, weights: str = "fp32") -> EmbeddingConfig:
    """`placement` "mixed" places every table of LAYOUT in a way of its own."""
    tables = {name: TableConfig(placement=kind) for name, kind in MIXED.items()}  # type: ignore[arg-type]
    return EmbeddingConfig(
        optimizer=optimizer,  # type: ignore[arg-type]
        placement="table" if placement == "mixed" else placement,  # type: ignore[arg-type]
        tables=tables if placement == "mixed" else {},
        backend=backend,  # type: ignore[arg-type]
        weights=weights,  # type: ignore[arg-type]
        learning_rate=0.1,
        eps=1e-6,
    )


EVERYTHING = [(o, p, "torch") for o in OPTIMIZERS for p in ("table", "column")]
EVERYTHING += [(o, p, "fbgemm") for o in ("adagrad", "sgd") for p in ("table", "column")]
EVERYTHING += [("rowwise_adagrad", "table", "fbgemm")]
EVERYTHING += [(o, "row", "torch") for o in ("rowwise_adagrad", "adam")]
EVERYTHING += [(o, "row", "fbgemm") for o in ("rowwise_adagrad", "sgd")]
TRITON = [("rowwise_adagrad", "table", "triton"), ("adagrad", "column", "triton"), ("sgd", "row", "triton")]
TRITON = TRITON if find_spec("triton") else []
EVERYTHING += TRITON
EVERYTHING += [(o, "replicated", "auto") for o in ("rowwise_adagrad", "adam")]
EVERYTHING += [(o, "mixed", "auto") for o in OPTIMIZERS] + [("rowwise_adagrad", "mixed", "torch")]
EVERYTHING += [("rowwise_adagrad", "auto", "auto")]
HALF = [("rowwise_adagrad", p, "torch") for p in ("table", "column")] + [("sgd", "table", "torch")]
HALF += TRITON[:1]
HALF += [("rowwise_adagrad", p, "auto") for p in ("row", "replicated")]
HALF += [(o, "table", "fbgemm") for o in ("rowwise_adagrad", "sgd")]
SINGLE = [("rowwise_adagrad", "table", "fbgemm"), ("rowwise_adagrad", "column", "auto"), ("sgd", "table", "auto")]
SINGLE += [("sgd", "row", "fbgemm"), ("rowwise_adagrad", "replicated", "auto")]
BOTH_BACKENDS = [
    ("sgd", "table", "auto"),
    ("sgd", "column", "auto"),
    ("sgd", "row", "auto"),
]  # six columns are torch's, the others FBGEMM's
WEIGHTED = [("rowwise_adagrad", p, "auto") for p in ("table", "row", "mixed")]
WEIGHTED += [("adagrad", "mixed", "auto"), ("sgd", "row", "torch"), ("adam", "table", "torch")]
CASES = {
    **{" ".join(case): (LAYOUT, embedding(*case)) for case in EVERYTHING},
    **{f"{' '.join(case)} fp16": (LAYOUT, embedding(*case, weights="fp16")) for case in HALF},
    **{f"{' '.join(case)} weighted": (WEIGHTED_LAYOUT, embedding(*case)) for case in WEIGHTED},
    **{f"{' '.join(case)} single-valued": (SINGLE_LAYOUT, embedding(*case)) for case in SINGLE},
    **{f"{' '.join(case)} both backends": (SIX_COLUMNS_LAYOUT, embedding(*case)) for case in BOTH_BACKENDS},
}


@functools.cache
def reference(case: str) -> Trained:
    return train_plain(*CASES[case], EXAMPLES)


@pytest.fixture(scope="module")
def trained(rank_pool: Callable[[int], RankPool]) -> Callable[[int, str], list[Part]]:
    """What each rank holds after training a case; all cases of a world size are trained in one go."""

    @functools.cache
    def all_cases(ranks: int) -> list[dict[str, Part]]:
        return [train_all(CASES, EXAMPLES)] if ranks == 1 else rank_pool(ranks).run(train_all, CASES, EXAMPLES)

    return lambda ranks, case: [part[case] for part in all_cases(ranks)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow), 3, 4])
def test_any_ranks_train_as_one_plain_process(trained: Callable, ranks: int, case: str) -> None:
    layout, config = CASES[case]
    expected, found = reference(case), together(layout, trained(ranks, case))
    # float16 numbers are 2^-10 apart: an update may round the other way, and FBGEMM's SGD rounds the change as well
    tolerance = {"rtol": 4e-3, "atol": 1e-3} if config.weights == "fp16" else {"rtol": 2e-5, "atol": 2e-6}
    for mine, its in zip(found.embedded, expected.embedded, strict=True):
        torch.testing.assert_close(mine, its, **tolerance)
    for name, tensor in expected.state.items():
        torch.testing.assert_close(found.state[name], tensor, **tolerance)
    for part in trained(ranks, case):
        for table, share in part.usage.items():
            own = part.state[f"{table}/touched"][0].slices
            assert share == pytest.approx(float(found.state[f"{table}/touched"][own].mean()))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_touched_rows_in_many_chunks(monkeypatch: pytest.MonkeyPatch, optimizer: str) -> None:
    monkeypatch.setattr(stacked, "CPU_CHUNK", 3)
    config = embedding(optimizer, "table", "torch")
    found, expected = together(LAYOUT, [train(LAYOUT, config, EXAMPLES)]), reference(f"{optimizer} table torch")
    for name, tensor in expected.state.items():
        torch.testing.assert_close(found.state[name], tensor, rtol=2e-5, atol=2e-6)


def test_bytes_that_leave_a_rank(trained: Callable[[int, str], list[Part]]) -> None:
    """Flat exchange, table- or column-wise: a rank receives its S = B x width floats except its own part."""
    steps, ranks, width = 4, 4, SINGLE_LAYOUT.width
    size = EXAMPLES // ranks
    for case, slots in (("sgd table auto single-valued", 5), ("rowwise_adagrad column auto single-valued", None)):
        sent: dict[tuple[str, str], int] = {}
        kept = 0
        for part in trained(ranks, case):
            for row in part.traffic:
                assert row["group"] == "world"
                key = row["op"], row["direction"]
                sent[key] = sent.get(key, 0) + row["bytes"]
                kept += row["self_bytes"] if key == ("all_to_all ids", "forward") else 0
                assert row["calls"] == steps
                assert row["dtype"] == ("int32" if row["op"] == "all_to_all ids" else "float32")
        pooled = steps * 4 * ranks * size * width  # of all ranks, own parts included
        assert sent["all_to_all embeddings", "forward"] == pooled * (ranks - 1) // ranks
        assert sent["all_to_all embeddings", "backward"] == pooled * (ranks - 1) // ranks
        if slots:  # every rank sends every feature once, and keeps what it owns itself
            assert sent["all_to_all ids", "forward"] + kept == steps * 4 * ranks * size * slots
        assert (("all_to_all squares", "backward") in sent) == ("column" in case)
        assert len(sent) == (4 if "column" in case else 3), "no collective that nobody needs"


def test_without_gradients_nothing_is_recorded_and_nothing_changes() -> None:
    for backend in ("fbgemm", "torch"):
        sparse = sparse_side(LAYOUT, EmbeddingConfig(backend=backend))  # type: ignore[arg-type]
        before = copied(sparse)
        with torch.no_grad():
            embedded = sparse.look_up(global_batch(LAYOUT, 8, step=0)).values
        assert not embedded.requires_grad
        assert_same(copied(sparse), before)
        assert set(sparse.row_usage().values()) == {0.0}


def test_learning_rate_acts_on_the_next_update() -> None:
    for backend in ("fbgemm", "torch"):
        changes = []
        for rate in (0.1, 0.3):
            config = EmbeddingConfig(optimizer="sgd", learning_rate=0.1, backend=backend)  # type: ignore[arg-type]
            sparse = sparse_side(LAYOUT, config)
            sparse.scale_learning_rate(rate / config.learning_rate)
            before = sparse.state()["user/weight"][1].clone()
            lookup = sparse.look_up(global_batch(LAYOUT, 8, step=0))
            lookup.backward(torch.ones_like(lookup.values))
            lookup.apply()
            changes.append(sparse.state()["user/weight"][1] - before)
        torch.testing.assert_close(changes[1], 3 * changes[0], rtol=1e-5, atol=1e-6)
        assert changes[0].abs().max() > 0.05


@pytest.mark.parametrize("backend", ["fbgemm", "torch"])
def test_l2_shrinks_what_was_looked_up(backend: str) -> None:
    """l2 x mean over examples of |e|^2 alone, under SGD: w -= rate x count of w in the batch x 2 l2 w / B."""
    config = EmbeddingConfig(optimizer="sgd", learning_rate=0.5, l2=0.3, backend=backend)  # type: ignore[arg-type]
    sparse = sparse_side(SINGLE_LAYOUT, config)
    batch = global_batch(SINGLE_LAYOUT, 16, step=0)
    before = sparse.state()["user/weight"][1].clone()
    lookup = sparse.look_up(batch)
    lookup.backward(torch.zeros_like(lookup.values))
    lookup.apply()
    counts = torch.bincount(batch.ids["user"].values, minlength=300).unsqueeze(1)
    expected = before * (1 - 0.5 * counts * 2 * 0.3 / 16)
    torch.testing.assert_close(sparse.state()["user/weight"][1], expected)
    assert not torch.equal(expected, before)


def test_ids_that_lie_as_they_are_sent_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    sparse = sparse_side(LAYOUT, embedding("sgd", "column", "torch"))
    assert sorted(sparse.id_order) == sorted(feature.name for feature in LAYOUT.features)
    sparse = sparse_side(SINGLE_LAYOUT, embedding("sgd", "table", "torch"))
    values = torch.arange(8 * len(sparse.id_order), dtype=torch.int32).view(-1, 8)  # as loaders make them
    sent = []
    monkeypatch.setattr("megarec.sparse.exchange.ids.all_to_all", lambda flat, *rest: sent.append(flat) or flat)
    batch = global_batch(SINGLE_LAYOUT, 8, step=0)
    ids = {name: Ids(own) for name, own in zip(sparse.id_order, values.unbind(), strict=True)}
    sparse.distribute(dataclasses.replace(batch, ids=ids))
    assert sent[0].data_ptr() == values.data_ptr() and torch.equal(sent[0], values.view(-1))


@pytest.mark.parametrize("backend", ["fbgemm", "torch"])
def test_order_within_a_list_does_not_matter(backend: str) -> None:
    """A sequence pools as any list: ids and weights reversed within every example give the same sums."""
    config = embedding("rowwise_adagrad", "table", backend)
    batch = global_batch(WEIGHTED_LAYOUT, 16, step=0)
    backward = {name: reversed_lists(f) for name, f in batch.ids.items()}
    results = []
    for ids in (batch.ids, backward):
        sparse = sparse_side(WEIGHTED_LAYOUT, config)
        lookup = sparse.look_up(dataclasses.replace(batch, ids=ids))
        embedded = lookup.values.clone()
        lookup.backward(torch.ones_like(embedded))
        lookup.apply()
        results.append((embedded, sparse.state()["item/weight"][1]))
    assert any(not torch.equal(batch.ids[name].values, f.values) for name, f in backward.items())
    for forward, reverse in zip(*results, strict=True):
        torch.testing.assert_close(forward, reverse, rtol=1e-6, atol=1e-6)


def reversed_lists(ids: Ids) -> Ids:
    if ids.lengths is None:
        return ids
    stops = ids.lengths.cumsum(0).tolist()
    order = [i for stop, n in zip(stops, ids.lengths.tolist(), strict=True) for i in range(stop - 1, stop - n - 1, -1)]
    return Ids(ids.values[order], ids.lengths, None if ids.weights is None else ids.weights[order])


def resume_halfway(config: EmbeddingConfig) -> tuple[State, State]:
    """On every rank: state after four steps in one go, and after two, a copy into a new sparse side, and two more."""
    straight = train(LAYOUT, config, EXAMPLES)
    half = train(LAYOUT, config, EXAMPLES, steps=2)
    resumed = train(LAYOUT, config, EXAMPLES, first_step=2, state=half.state)
    return straight.state, resumed.state


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resumed_from_state_trains_on_bit_for_bit(optimizer: str) -> None:
    for backend in ("torch", "fbgemm") if optimizer != "adam" else ("torch",):
        straight, resumed = resume_halfway(embedding(optimizer, "table", backend))
        assert_same({name: t for name, (_, t) in resumed.items()}, {name: t for name, (_, t) in straight.items()})


def test_resumed_column_slices(rank_pool: Callable[[int], RankPool]) -> None:
    for straight, resumed in rank_pool(2).run(resume_halfway, EmbeddingConfig(placement="column")):
        assert_same({name: t for name, (_, t) in resumed.items()}, {name: t for name, (_, t) in straight.items()})


def test_memory_and_description() -> None:
    sparse = sparse_side(LAYOUT, EmbeddingConfig(weights="fp16"))
    rows, cells = 40 + 300 + 17 + 90 + 9, 40 * 8 + 300 * 8 + 17 * 8 + 90 * 16 + 9 * 4
    assert sparse.memory_bytes() == 2 * cells + 4 * rows + rows  # weights, row-wise state, touched flags
    placed, backend = sparse.describe()
    assert placed == f"tables: rank 0 holds 5 shards, {cells:,} weights"
    assert backend.startswith("tables: item, wide, user, clicks, small in fbgemm (embedding.backend=")


def copied(sparse: SparseSide) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, (_, tensor) in sparse.state().items()}


def assert_same(mine: dict[str, torch.Tensor], its: dict[str, torch.Tensor]) -> None:
    assert mine.keys() == its.keys()
    for name, tensor in its.items():
        assert torch.equal(mine[name], tensor), name


def test_hundreds_of_tables_do_not_drown_the_log() -> None:
    tables = tuple(Table(f"t{i}", 3, 8) for i in range(300))
    features = tuple(Feature(t.name, t.name, "sum", False, 8 * i, 8) for i, t in enumerate(tables))
    *_, line = sparse_side(EmbeddingLayout(8, tables, features, 300, 0), EmbeddingConfig()).describe()
    assert line.startswith("tables: t0, t1, t2, t3, t4, t5, t6, t7, ... (291 more), t299 in ")
