"""L2 on all rows, whole-table updates and lazy decay on 1 to 4 ranks, against torch.optim over whole tables."""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import embedding_bag

from megarec.config.regularisation import L2Config
from megarec.config.sections import EmaConfig, EmbeddingConfig, TableConfig
from megarec.dense.side import DenseSide
from megarec.distributed.rank_pool import RankPool
from megarec.run.averages import Averages
from megarec.sparse.tables import stacked
from megarec.sparse.tables.initial import initial_rows
from tests.sparse.plain import LAYOUT, SEED, PlainTables, Trained, global_batch, loss, slice_of
from tests.sparse.ranks import Part, sparse_side, together, train, train_all

EXAMPLES, STEPS = 24, 4
PLACEMENTS = ("table", "column", "row", "replicated", "mixed")
MIXED = {"item": "row", "user": "column", "clicks": "replicated", "small": "row", "wide": "table"}
RATE, WEIGHT = 0.05, 0.02
EXACT = {"rtol": 1e-6, "atol": 1e-6}


def embedding(optimizer: str, placement: str, **settings: object) -> EmbeddingConfig:
    tables = {name: TableConfig(placement=kind) for name, kind in MIXED.items()}  # type: ignore[arg-type]
    return EmbeddingConfig(
        optimizer=optimizer,  # type: ignore[arg-type]
        placement="table" if placement == "mixed" else placement,  # type: ignore[arg-type]
        tables=tables if placement == "mixed" else {},
        learning_rate=RATE,
        **settings,  # type: ignore[arg-type]
    )


COUPLED = L2Config(weight=WEIGHT, rows="all")
DECOUPLED = L2Config(weight=WEIGHT, rows="all", coupled=False)
DENSE = {
    "adam coupled": ("adam", {"l2": COUPLED}, lambda w: torch.optim.Adam(w, RATE, weight_decay=WEIGHT)),
    "adam": ("adam", {"update_rows": "all"}, lambda w: torch.optim.Adam(w, RATE)),
    "adamw": (
        "adam",
        {"l2": DECOUPLED, "update_rows": "all"},
        lambda w: torch.optim.AdamW(w, RATE, weight_decay=WEIGHT),
    ),
    "adagrad coupled": (
        "adagrad",
        {"l2": COUPLED},
        lambda w: torch.optim.Adagrad(w, RATE, weight_decay=WEIGHT, eps=1e-8),
    ),
    "sgd coupled": ("sgd", {"l2": COUPLED}, lambda w: torch.optim.SGD(w, RATE, weight_decay=WEIGHT)),
}
CASES = {
    f"{name} {placement}": (LAYOUT, embedding(optimizer, placement, **settings))
    for name, (optimizer, settings, _) in DENSE.items()
    for placement in PLACEMENTS
}
HALF = {
    f"half {optimizer} {placement}": (
        LAYOUT,
        embedding(optimizer, placement, weights="fp16", rounding="stochastic", l2=l2, backend="torch"),
    )
    for optimizer, l2 in (("adam", COUPLED), ("sgd", DECOUPLED), ("adagrad", 0.0))
    for placement in ("table", "column", "replicated")
}


def plain(optimizer: Callable[[list[Tensor]], torch.optim.Optimizer], dtype: torch.dtype) -> Trained:
    """Whole tables as parameters of one of torch's optimizers, dense gradients."""
    weights = {t.name: initial_rows(t, SEED, None, 0, t.rows).to(dtype).requires_grad_() for t in LAYOUT.tables}
    made = optimizer(list(weights.values()))
    seen = []
    for step in range(STEPS):
        batch = global_batch(LAYOUT, EXAMPLES, step)
        parts = []
        for feature in LAYOUT.features:
            ids = batch.ids[feature.name]
            lengths = torch.ones(batch.size, dtype=torch.int64) if ids.lengths is None else ids.lengths
            weight = weights[feature.table]
            parts.append(embedding_bag(ids.values, weight, lengths.cumsum(0) - lengths, mode=feature.pooling))
        embedded = torch.cat(parts, dim=1)
        seen.append(embedded.detach())
        loss(embedded, batch.keys).backward()
        made.step()
        made.zero_grad(set_to_none=False)
    return Trained(seen, {f"{name}/weight": weight.detach() for name, weight in weights.items()})


@functools.cache
def reference(name: str) -> Trained:
    return plain(DENSE[name][2], torch.float32)


@pytest.fixture(scope="module")
def trained(rank_pool: Callable[[int], RankPool]) -> Callable[[int, str], list[Part]]:
    """What each rank holds after training a case; all cases of a world size are trained in one go."""

    @functools.cache
    def all_cases(ranks: int) -> list[dict[str, Part]]:
        cases = CASES | HALF
        return [train_all(cases, EXAMPLES)] if ranks == 1 else rank_pool(ranks).run(train_all, cases, EXAMPLES)

    return lambda ranks, case: [part[case] for part in all_cases(ranks)]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("case", CASES)
def test_every_row_is_stepped_as_torchs_optimizer_does(trained: Callable, ranks: int, case: str) -> None:
    name = case.rpartition(" ")[0]
    expected, found = reference(name), together(LAYOUT, trained(ranks, case))
    for mine, its in zip(found.embedded, expected.embedded, strict=True):
        torch.testing.assert_close(mine, its, **EXACT)
    for key, tensor in expected.state.items():
        torch.testing.assert_close(found.state[key], tensor, **EXACT)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("case", HALF)
def test_rounding_by_chance_is_the_same_on_every_topology(trained: Callable, ranks: int, case: str) -> None:
    """To the last bit; copies sum gradients in another order, which may turn a chance near its threshold."""
    expected, found = together(LAYOUT, trained(1, case)), together(LAYOUT, trained(ranks, case))
    for key, tensor in expected.state.items():
        if "replicated" in case:
            torch.testing.assert_close(found.state[key], tensor, rtol=2e-3, atol=2e-4)
        else:
            assert torch.equal(found.state[key], tensor), key


# Of a learning rate that changes at every step; saves settle what waits. A large eps: the reference is in float64, and
# Adam makes a full step of the rounding of a gradient that cancels to nothing.
FACTORS, SAVES, DECAY_STEPS = (1.0, 0.3, 0.7, 0.1, 0.9, 0.5, 0.2, 0.8), (3, 4), 8
LAZY = {
    f"{optimizer} {placement}": embedding(
        optimizer, placement, l2=L2Config(weight=0.5, rows="all", coupled=False), eps=1e-2
    )
    for optimizer in ("rowwise_adagrad", "adam", "sgd")
    for placement in PLACEMENTS
}


def lazily(configs: dict[str, EmbeddingConfig], save: bool) -> dict[str, list[Part]]:
    """Of every case what this rank holds after the steps of SAVES, in a state that is saved there, and at the end."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    found: dict[str, list[Part]] = {}
    for name, config in configs.items():
        sparse = sparse_side(LAYOUT, config, examples=EXAMPLES // ranks)
        seen: list[Tensor] = []
        held = found.setdefault(name, [])
        for step, factor in enumerate(FACTORS):
            sparse.scale_learning_rate(factor)
            batch = slice_of(global_batch(LAYOUT, EXAMPLES, step), rank, ranks)
            lookup = sparse.look_up(batch)
            seen.append(lookup.values.clone())
            lookup.backward(gradient_of(seen[-1], batch.keys))
            lookup.apply()
            if (save and step in SAVES) or step + 1 == DECAY_STEPS:
                sparse.settle()
                state = {key: (shard, tensor.clone()) for key, (shard, tensor) in sparse.state().items()}
                held.append(Part(list(seen), state, {}, []))
    return found


def gradient_of(embedded: Tensor, examples: Tensor) -> Tensor:
    leaf = embedded.clone().requires_grad_()
    loss(leaf, examples).backward()
    assert leaf.grad is not None
    return leaf.grad


class Eager(PlainTables):
    """Every row decays at every step, in float64."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for weight in self.weights.values():
            weight.data = weight.data.double()
        self.square_sums = {name: sums.double() for name, sums in self.square_sums.items()}

    def decayed(self, rate: float, weight_decay: float) -> None:
        self.config = self.config.model_copy(update={"learning_rate": rate})
        for weight in self.weights.values():
            weight.data.mul_(1 - rate * weight_decay)
        if self.config.optimizer == "adam":
            self.adam.param_groups[0]["lr"] = rate


@functools.cache
def eagerly(optimizer: str) -> list[Trained]:
    tables, seen, held = Eager(LAYOUT, LAZY[f"{optimizer} table"]), list[Tensor](), list[Trained]()
    for step, factor in enumerate(FACTORS):
        batch = global_batch(LAYOUT, EXAMPLES, step)
        embedded = tables.look_up(batch)
        loss(embedded, batch.keys).backward()
        seen.append(embedded.detach())
        tables.decayed(RATE * factor, 0.5)
        tables.update(batch)
        if step in SAVES or step + 1 == DECAY_STEPS:
            held.append(Trained(list(seen), {key: tensor.clone() for key, tensor in tables.state().items()}))
    return held


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_lazy_decay_is_the_eager_one_at_every_save(rank_pool: Callable[[int], RankPool], ranks: int) -> None:
    parts = [lazily(LAZY, True)] if ranks == 1 else rank_pool(ranks).run(lazily, LAZY, True)
    for case in LAZY:
        for nth, expected in enumerate(eagerly(case.partition(" ")[0])):
            found = together(LAYOUT, [part[case][nth] for part in parts])
            for mine, its in zip(found.embedded, expected.embedded, strict=True):
                torch.testing.assert_close(mine.double(), its, **EXACT)
            for key, tensor in expected.state.items():
                torch.testing.assert_close(found.state[key].double(), tensor.double(), **EXACT)


def test_saves_in_between_change_nothing_but_rounding() -> None:
    config = {"adam": LAZY["adam table"]}
    (with_saves, without) = (lazily(config, save)["adam"][-1] for save in (True, False))
    for key, (_, tensor) in with_saves.state.items():
        torch.testing.assert_close(tensor, without.state[key][1], rtol=1e-6, atol=1e-7)


def test_a_step_that_is_skipped_decays_nothing() -> None:
    sparse = sparse_side(LAYOUT, LAZY["sgd table"])
    before = {key: tensor.clone() for key, (_, tensor) in sparse.state().items()}
    lookup = sparse.look_up(global_batch(LAYOUT, EXAMPLES, 0))
    lookup.backward(torch.ones_like(lookup.values))
    lookup.skip()
    sparse.settle()
    assert all(torch.equal(tensor, before[key]) for key, (_, tensor) in sparse.state().items())


def test_tables_differ() -> None:
    """Row by row: L2 on what is looked up, on all rows, decay, none; and first weights of their own."""
    tables = {
        "item": TableConfig(l2=0.3),
        "user": TableConfig(l2=COUPLED, initial_std=0.5),
        "wide": TableConfig(l2=DECOUPLED),
        "small": TableConfig(update_rows="all"),
    }
    config = EmbeddingConfig(optimizer="sgd", learning_rate=0.5, tables=tables)
    sparse = sparse_side(LAYOUT, config)
    before = {key: tensor.clone() for key, (_, tensor) in sparse.state().items()}
    assert before["user/weight"].std() == pytest.approx(0.5, rel=0.1)
    batch = global_batch(LAYOUT, 16, step=0)
    lookup = sparse.look_up(batch)
    lookup.backward(torch.zeros_like(lookup.values))
    lookup.apply()
    sparse.settle()
    after = {key: tensor for key, (_, tensor) in sparse.state().items()}
    for name in ("user", "wide"):
        torch.testing.assert_close(after[f"{name}/weight"], before[f"{name}/weight"] * (1 - 0.5 * WEIGHT))
    for name in ("small", "clicks"):
        assert torch.equal(after[f"{name}/weight"], before[f"{name}/weight"])
    looked_up = torch.cat([batch.ids[name].values for name in ("item", "history", "cart")]).unique()
    changed = (after["item/weight"] != before["item/weight"]).any(dim=1)
    assert changed.nonzero().squeeze(1).tolist() == looked_up.tolist()


def test_all_rows_in_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacked, "CPU_CHUNK", 3)
    monkeypatch.setattr(stacked, "CPU_CELLS", 60)
    found = together(LAYOUT, [train(*CASES["adam coupled table"], EXAMPLES)])
    for key, tensor in reference("adam coupled").state.items():
        torch.testing.assert_close(found.state[key], tensor, **EXACT)
    (lazy,) = [parts[-1] for parts in lazily({"adam": LAZY["adam table"]}, True).values()]
    for key, tensor in eagerly("adam")[-1].state.items():
        torch.testing.assert_close(lazy.state[key][1].double(), tensor.double(), **EXACT)


def test_averages_are_of_decayed_rows() -> None:
    """Of small tables (train.ema), whether a batch looks their rows up or not."""
    sparse, eager = (sparse_side(LAYOUT, embedding("sgd", "table", l2=DECOUPLED, update_rows=r)) for r in (None, "all"))
    dense = cast("DenseSide", SimpleNamespace(masters=lambda: ()))
    found = []
    for side in (sparse, eager):
        averages = Averages(EmaConfig(table_rows=40), dense, side, LAYOUT)
        for step in range(3):
            batch = global_batch(LAYOUT, EXAMPLES, step)
            lookup = side.look_up(batch)
            lookup.backward(gradient_of(lookup.values, batch.keys))
            lookup.apply()
            averages.update(step + 1)
        found.append(averages.tables)
    assert set(found[0]) == {"item/weight", "clicks/weight", "small/weight"}
    for name, average in found[1].items():
        torch.testing.assert_close(found[0][name], average, **EXACT)
