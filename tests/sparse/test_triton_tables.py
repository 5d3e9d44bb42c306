"""The Triton backend beside the torch backend: its kernels are interpreted on a CPU (TRITON_INTERPRET, conftest)."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from megarec.config.sections import EmbeddingConfig
from megarec.kernels import tables as kernels
from megarec.sparse.exchange import group
from megarec.sparse.layout import EmbeddingLayout, Feature, Table
from megarec.sparse.lookups import plan_lookups
from megarec.sparse.placement import Shard, place
from megarec.sparse.tables.base import LocalIds, LocalShard, Tables, group_lookups
from megarec.sparse.tables.local import Choice
from megarec.sparse.tables.torch_backend import TorchTables
from megarec.sparse.tables.triton_backend import TritonTables
from tests.sparse.plain import LAYOUT, train_plain
from tests.sparse.ranks import together, train

CPU = torch.device("cpu")
OPTIMIZERS = ["rowwise_adagrad", "adagrad", "sgd"]


@dataclass(frozen=True)
class Slot:
    """A feature: its table, and of every example the ids and their weights."""

    table: int
    ids: list[list[int]]
    multi_valued: bool


def shards_of(sizes: Sequence[tuple[int, int]], slots: Sequence[Slot]) -> tuple[LocalShard, ...]:
    tables = tuple(Table(f"t{index}", rows, columns) for index, (rows, columns) in enumerate(sizes))
    widths = [sizes[slot.table][1] for slot in slots]
    starts = [0, *itertools.accumulate(widths)]
    features = tuple(
        Feature(f"f{index}", f"t{slot.table}", "sum", slot.multi_valued, starts[index], widths[index])
        for index, slot in enumerate(slots)
    )
    layout = EmbeddingLayout(1, tables, features, 0, starts[-1])
    # As fused tables: in the order of the layout, whatever their widths.
    plan = plan_lookups(layout, place(layout, "table", 1), 1, fused=[t.name for t in tables])
    return group_lookups(plan.slots[0], plan.shards[0])


def ids_of(slots: Sequence[Slot], weighted: bool, dtype: torch.dtype = torch.int64) -> LocalIds:
    """In the order of their tables, as the slots of `shards_of` are."""
    slots = sorted(slots, key=lambda slot: slot.table)
    lengths = [len(ids) for slot in slots for ids in slot.ids]
    values = torch.tensor([i for slot in slots for ids in slot.ids for i in ids], dtype=dtype)
    counts = tuple(sum(map(len, slot.ids)) for slot in slots)
    weights = None
    if weighted:  # ones for a single-valued feature
        draw = torch.Generator().manual_seed(3)
        weights = torch.cat(
            [
                torch.rand(n, generator=draw) if slot.multi_valued else torch.ones(n)
                for slot, n in zip(slots, counts, strict=True)
            ]
        )
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype)
    return LocalIds(values, offsets, counts, len(slots[0].ids), weights)


def pair(
    shards: Sequence[LocalShard], config: EmbeddingConfig, output: torch.dtype
) -> tuple[TorchTables, TritonTables]:
    """Tables of both backends with the same random weights."""
    plain = TorchTables(shards, [local.shard.columns for local in shards], config, CPU, None)
    ours = TritonTables(shards, config, CPU, output)
    fill(plain)
    fill(ours)
    return plain, ours


def fill(tables: Tables) -> None:
    for name, (_, tensor) in tables.state().items():
        if name.endswith("/weight"):
            tensor.copy_(
                torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name) + tensor.shape[0]))
            )


def gradient_of(pooled: Tensor, occurrences: int) -> Tensor:
    """Random, so large that the sum over all occurrences of a row is about 1."""
    gradient = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(5)) / max(1, occurrences) ** 0.5
    return gradient.to(pooled.dtype)


def assert_same_step(plain: TorchTables, ours: TritonTables, ids: LocalIds) -> None:
    """One lookup and one update; float32 to 1e-6, 16-bit types to one of their units."""
    unit = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
    looked_up, pooled = plain.pool(ids), ours.pool(ids)
    expected, found = looked_up.values, pooled.values
    torch.testing.assert_close(
        found, expected.to(found.dtype), rtol=unit[found.dtype], atol=max(1e-6, unit[found.dtype] * 1e-2)
    )
    gradient = gradient_of(found, ids.values.numel())
    looked_up.update(gradient)
    pooled.update(gradient)
    state = ours.state()
    assert state.keys() == plain.state().keys()
    for name, (shard, tensor) in plain.state().items():
        mine = state[name][1]
        assert (state[name][0], mine.dtype, mine.shape) == (shard, tensor.dtype, tensor.shape)
        torch.testing.assert_close(mine, tensor, rtol=unit[tensor.dtype], atol=unit[tensor.dtype])
        mine.copy_(tensor)  # the next step starts equal


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[tuple[int, int]], list[Slot]]:
    """Tables of any width, shared or not, with features of any kind; few rows, so that some are met often."""
    sizes = draw(st.lists(st.tuples(st.integers(1, 9), st.sampled_from([1, 3, 4, 6, 20])), min_size=1, max_size=3))
    examples, slots = draw(st.integers(1, 8)), []
    for table in [*range(len(sizes)), *draw(st.lists(st.integers(0, len(sizes) - 1), max_size=2))]:
        multi = draw(st.booleans())
        ids = st.integers(0, sizes[table][0] - 1)
        bag = st.lists(ids, max_size=4) if multi else st.lists(ids, min_size=1, max_size=1)
        slots.append(Slot(table, draw(st.lists(bag, min_size=examples, max_size=examples)), multi))
    return sizes, slots


@settings(max_examples=20, phases=[Phase.generate])  # to shrink a failure takes interpreted kernels minutes
@given(
    case=cases(),
    optimizer=st.sampled_from(OPTIMIZERS),
    weights=st.sampled_from(["fp32", "fp16"]),
    output=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    dtype=st.sampled_from([torch.int32, torch.int64]),
    weighted=st.booleans(),
    piece=st.sampled_from([2, 4, kernels.PIECE]),
)
def test_a_step_is_that_of_the_torch_backend(
    case: tuple[list[tuple[int, int]], list[Slot]],
    optimizer: str,
    weights: str,
    output: torch.dtype,
    dtype: torch.dtype,
    weighted: bool,
    piece: int,
) -> None:
    sizes, slots = case
    weighted = weighted and any(slot.multi_valued for slot in slots)
    # a large eps: g / (|g| + eps) turns the rounding of a gradient that cancels to nothing into a step
    config = EmbeddingConfig(optimizer=optimizer, weights=weights, learning_rate=0.1, eps=0.1)  # type: ignore[arg-type]
    plain, ours = pair(shards_of(sizes, slots), config, output)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "PIECE", piece)  # so that few occurrences make a row a hot one
        patch.setattr(kernels, "UNROLL", 2)
        for _ in range(2):
            assert_same_step(plain, ours, ids_of(slots, weighted, dtype))


def slot_of(table: int, counts: Sequence[int], seed: int) -> Slot:
    """A feature that meets row i counts[i] times, in an order of no pattern, one id an example."""
    rows = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return Slot(table, [[row] for row in rows[order].tolist()], False)


def test_rows_that_a_batch_meets_very_often() -> None:
    """As many times as one program sums, and more than twice as many."""
    assert kernels.PIECE == 256
    config = EmbeddingConfig(learning_rate=0.1, eps=0.1)
    slots = [slot_of(0, [1, 256, 0, 515], seed=1)]
    plain, ours = pair(shards_of([(4, 5)], slots), config, torch.float32)
    assert_same_step(plain, ours, ids_of(slots, weighted=False))


def test_a_row_gets_the_same_bits_whatever_lies_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the same, and with other tables of its width and of others, whose runs move it in the sorted order."""
    monkeypatch.setattr(kernels, "PIECE", 8)
    monkeypatch.setattr(kernels, "UNROLL", 2)
    sizes = [(3, 7), (2, 7), (5, 9)]
    met = [[1, 30, 9], [17, 23], [2, 3, 5, 11, 19]]
    gradient = torch.randn(40, 7, generator=torch.Generator().manual_seed(4))
    found = []
    for order in ([0], [0], [2, 1, 0]):
        slots = [slot_of(place, met[table], seed=table) for place, table in enumerate(order)]
        shards, last = shards_of([sizes[table] for table in order], slots), f"t{len(order) - 1}"
        tables = TritonTables(shards, EmbeddingConfig(learning_rate=0.1), CPU, torch.bfloat16)
        fill(tables)
        state = tables.state()
        pooled = tables.pool(ids_of(slots, weighted=False))
        others = torch.ones(40, pooled.values.shape[1] - 7)
        pooled.update(torch.cat([others, gradient], dim=1).to(torch.bfloat16))
        found.append([pooled.values[:, -7:], state[f"{last}/weight"][1], state[f"{last}/rowwise_square_sum"][1]])
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))


def test_no_examples_and_no_values() -> None:
    for ids, examples in (([], 0), ([[], [], []], 3)):
        slots = [Slot(0, ids, True)]
        tables = TritonTables(shards_of([(4, 3)], slots), EmbeddingConfig(), CPU)
        fill(tables)
        before = tables.state()["t0/weight"][1].clone()
        pooled = tables.pool(ids_of(slots, weighted=False))
        assert torch.equal(pooled.values, torch.zeros(examples, 3))
        pooled.update(torch.ones(examples, 3))
        assert torch.equal(tables.state()["t0/weight"][1], before)


def test_keys_of_many_rows_are_int64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 2^31 and more are only made up here: no memory holds them on a small machine."""
    slots = [slot_of(0, [1, 4, 2], seed=1)]
    plain, ours = pair(shards_of([(3, 5)], slots), EmbeddingConfig(learning_rate=0.1), torch.float32)
    assert ours._key_type == torch.int32
    monkeypatch.setattr(ours, "_key_type", torch.int64)
    assert_same_step(plain, ours, ids_of(slots, weighted=False, dtype=torch.int32))


@pytest.mark.parametrize("mixed", [("fbgemm", "triton"), ("triton", "torch"), ("fbgemm", "triton", "torch")])
@pytest.mark.parametrize("asked", [True, False])
def test_backends_side_by_side(monkeypatch: pytest.MonkeyPatch, mixed: tuple[str, ...], asked: bool) -> None:
    """Every table in the backend of its choice, also where the routes reckoned with FBGEMM for all."""
    kinds = dict(zip((table.name for table in LAYOUT.tables), itertools.cycle(mixed), strict=False))
    if not asked:
        kinds = {name: kind if kind != "torch" else "triton" for name, kind in kinds.items()}

    def choose(shards: Sequence[Shard], *_: object, unpooled: bool) -> Choice:
        return Choice(kinds[shards[0].table] if asked else "fbgemm", "")  # type: ignore[arg-type]

    monkeypatch.setattr("megarec.sparse.tables.local.requested_backend", choose)
    monkeypatch.setattr(group, "choose_backends", lambda *_: {name: Choice(kind, "") for name, kind in kinds.items()})  # type: ignore[arg-type]
    config = EmbeddingConfig(optimizer="rowwise_adagrad", learning_rate=0.1, eps=1e-2)
    found, plain = together(LAYOUT, [train(LAYOUT, config, 6)]), train_plain(LAYOUT, config, 6)
    for name, tensor in plain.state.items():
        torch.testing.assert_close(found.state[name], tensor, rtol=1e-5, atol=1e-6)


def test_a_state_goes_from_one_backend_to_the_other() -> None:
    config = {name: EmbeddingConfig(backend=name, learning_rate=0.1, eps=0.1) for name in ("torch", "triton")}  # type: ignore[arg-type]
    whole = train(LAYOUT, config["torch"], 6)
    for first, second in (("torch", "triton"), ("triton", "torch")):
        half = train(LAYOUT, config[first], 6, steps=2)
        assert half.state.keys() == whole.state.keys()
        rest = train(LAYOUT, config[second], 6, first_step=2, state=half.state)
        for name, (_, tensor) in whole.state.items():
            torch.testing.assert_close(rest.state[name][1], tensor, rtol=1e-5, atol=1e-6)
