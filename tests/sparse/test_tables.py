"""Which backend holds which table, and that both backends do the same."""

import importlib.util
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megarec.config.sections import EmbeddingConfig
from megarec.errors import UserError
from megarec.kernels.launch import triton_problem
from megarec.sparse.layout import EmbeddingLayout, Feature, Table
from megarec.sparse.lookups import plan_lookups
from megarec.sparse.placement import place
from megarec.sparse.tables import fbgemm_backend, local
from megarec.sparse.tables.base import LocalIds, group_lookups
from megarec.sparse.tables.local import choose_backends, requested_backend
from tests.sparse.plain import LAYOUT, train_plain
from tests.sparse.ranks import together, train

CPU = torch.device("cpu")


def choices(ranks: int = 1, layout: EmbeddingLayout = LAYOUT, **embedding: object) -> dict[str, local.Choice]:
    config = EmbeddingConfig(**embedding)  # type: ignore[arg-type]
    return choose_backends(layout, place(layout, config.placement, ranks), config, CPU)


def test_auto_takes_fbgemm_where_it_can_and_says_why_not() -> None:
    assert {choice.backend for choice in choices(optimizer="sgd").values()} == {"fbgemm"}
    assert {choice.backend for choice in choices(optimizer="sgd", backend="torch").values()} == {"torch"}
    assert choices(optimizer="rowwise_adagrad")["user"].backend == "fbgemm"
    assert "Adam" in choices(optimizer="adam")["user"].reason
    odd = EmbeddingLayout(6, (Table("t", 5, 6),), (Feature("t", "t", "sum", False, 0, 6),), 1, 0)
    assert "multiples of 4 columns, not 6" in choices(layout=odd, optimizer="sgd")["t"].reason


def test_auto_by_placement() -> None:
    def wished(optimizer: str, placement: str, table: str) -> local.Choice:
        config = EmbeddingConfig(optimizer=optimizer, placement=placement)  # type: ignore[arg-type]
        shards = [shard for shard in place(LAYOUT, config.placement, 2) if shard.table == table]
        return requested_backend(shards, config, "cpu", unpooled=False)

    assert wished("rowwise_adagrad", "table", "user").backend == "fbgemm"
    assert wished("adagrad", "column", "user").backend == "fbgemm"
    assert "whole row" in wished("rowwise_adagrad", "column", "user").reason
    assert wished("rowwise_adagrad", "column", "small").backend == "fbgemm"  # four columns: one slice


def test_fbgemm_by_name_wherever_it_can() -> None:
    for optimizer in ("rowwise_adagrad", "adagrad", "sgd"):
        assert {c.backend for c in choices(backend="fbgemm", optimizer=optimizer).values()} == {"fbgemm"}
    with pytest.raises(UserError, match=r"""backend="fbgemm" cannot hold table 'item': Adam.*; use "auto\""""):
        choices(backend="fbgemm", optimizer="adam")


def test_without_fbgemm_everything_is_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megarec.sparse.tables.fbgemm_backend", None)  # importing it raises ImportError
    local._fbgemm_problem.cache_clear()
    try:
        choice = choices(optimizer="sgd")["user"]
        assert (choice.backend, "cannot be imported" in choice.reason) == ("torch", True)
        with pytest.raises(UserError, match="cannot be imported"):
            choices(backend="fbgemm")
        config = EmbeddingConfig(optimizer="sgd", learning_rate=0.1)  # its slots are in the order for FBGEMM
        found, plain = together(LAYOUT, [train(LAYOUT, config, 6)]), train_plain(LAYOUT, config, 6)
        torch.testing.assert_close(found.state["wide/weight"], plain.state["wide/weight"], rtol=1e-5, atol=1e-6)
    finally:
        local._fbgemm_problem.cache_clear()


def test_a_cpu_build_is_not_used_on_cuda() -> None:
    if torch.version.cuda is not None:
        pytest.skip("this installation has CUDA kernels")
    config = EmbeddingConfig(optimizer="sgd")
    choice = choose_backends(LAYOUT, place(LAYOUT, "table", 1), config, torch.device("cuda"))["user"]
    assert (choice.backend != "fbgemm", "without CUDA" in choice.reason) == (True, True)


def test_what_torch_alone_can_do_is_torchs_and_the_rest_stays() -> None:
    decay = {"weight": 0.1, "rows": "all", "coupled": False}
    tables = {"item": {"l2": decay}, "wide": {"update_rows": "all"}, "user": {"l2": 0.1}}
    config = EmbeddingConfig.model_validate({"optimizer": "sgd", "tables": tables})
    found = choose_backends(LAYOUT, place(LAYOUT, "table", 1), config, CPU)
    assert {name: choice.backend for name, choice in found.items()} == {
        "item": "torch", "wide": "torch", "user": "fbgemm", "clicks": "fbgemm", "small": "fbgemm",
    }  # fmt: skip
    assert found["item"].reason == "its rows decay at every step, which torch's alone can"
    half = choices(optimizer="sgd", weights="fp16", rounding="stochastic")["user"]
    assert half == local.Choice("torch", "its weights are rounded stochastically, which torch's alone can")
    with pytest.raises(UserError, match="cannot hold table 'item': every row is updated at every step, which torch's"):
        choices(backend="fbgemm", optimizer="sgd", update_rows="all")


def test_whole_updates_that_are_felt_are_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    choices(optimizer="adam", update_rows="all", ranks=2)
    assert not caplog.records
    monkeypatch.setattr(local, "SMALL_UPDATE", (60_000, 2**40))
    choices(optimizer="adam", update_rows="all", ranks=2)
    (line,) = (record.getMessage() for record in caplog.records)
    assert "reads and writes 0.0 GB on rank " in line
    assert "most of it for 300 rows x 8 columns of table 'user'; L2 with coupled=false touches" in line


@st.composite
def layouts(draw: st.DrawFn) -> EmbeddingLayout:
    """Tables of any size, shared or not, features of any kind in any order."""
    sizes = draw(st.lists(st.tuples(st.integers(1, 12), st.sampled_from([4, 8, 12])), min_size=1, max_size=4))
    made = [Table(f"t{index}", rows, columns) for index, (rows, columns) in enumerate(sizes)]
    users = draw(st.permutations(made + draw(st.lists(st.sampled_from(made), max_size=3))))
    features, start = [], 0
    for index, table in enumerate(users):
        pooling, multi = draw(st.sampled_from([("sum", False), ("sum", True), ("mean", True)]))
        features.append(Feature(f"f{index}", table.name, pooling, multi, start, table.columns))
        start += table.columns
    return EmbeddingLayout(4, tuple(made), tuple(features), 0, start)


@settings(max_examples=40, deadline=None)
@given(
    layout=layouts(),
    optimizer=st.sampled_from(["rowwise_adagrad", "adagrad", "sgd"]),
    examples=st.integers(1, 9),
)
def test_both_backends_train_as_plain_torch(layout: EmbeddingLayout, optimizer: str, examples: int) -> None:
    trained = {}
    for backend in ("torch", "fbgemm"):
        # a large eps: g / (|g| + eps) turns the rounding of a gradient that cancels to nothing into a step
        config = EmbeddingConfig(optimizer=optimizer, backend=backend, learning_rate=0.1, eps=0.1)  # type: ignore[arg-type]
        trained[backend] = together(layout, [train(layout, config, examples, steps=2)])
    plain = train_plain(layout, config, examples, steps=2)
    # gradients that nearly cancel keep the rounding of their large parts; a wrong update is off by far more than 1e-4
    for found in trained.values():
        for mine, its in zip(found.embedded, plain.embedded, strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)
        for name, tensor in plain.state.items():
            torch.testing.assert_close(found.state[name], tensor, rtol=1e-4, atol=1e-5)


GPU = torch.device("cuda")


def one_table(columns: int) -> EmbeddingLayout:
    return EmbeddingLayout(columns, (Table("t", 9, columns),), (Feature("t", "t", "sum", False, 0, columns),), 1, 0)


def on_gpu(layout: EmbeddingLayout, **embedding: object) -> dict[str, local.Choice]:
    config = EmbeddingConfig(**embedding)  # type: ignore[arg-type]
    return choose_backends(
        layout, place(layout, config.placement, 1 if config.placement == "table" else 2), config, GPU
    )


def test_on_a_gpu_triton_holds_what_fbgemm_cannot(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(local, "_fbgemm_problem", lambda device: None)
    monkeypatch.setattr(local, "triton_problem", lambda device: None)
    assert on_gpu(one_table(1024))["t"].backend == "fbgemm"
    wide = "FBGEMM's CUDA kernels take at most 1024 columns, not 1028"
    assert on_gpu(one_table(1028))["t"] == local.Choice("triton", wide)
    assert on_gpu(one_table(6))["t"] == local.Choice("triton", "FBGEMM wants multiples of 4 columns, not 6")
    assert on_gpu(one_table(1024), backend="triton")["t"] == local.Choice("triton", 'embedding.backend="triton"')
    assert on_gpu(one_table(8196))["t"].reason == "a Triton kernel holds at most 8192 columns, not 8196"
    for torchs in ({"backend": "torch"}, {"optimizer": "adam"}, {"placement": "column"}, {"placement": "replicated"}):
        assert on_gpu(one_table(1028), **torchs)["t"].backend == "torch"
    assert not caplog.records
    for backend, columns, why in (("fbgemm", 1028, wide), ("triton", 8196, "a Triton kernel holds at most 8192")):
        with pytest.raises(UserError, match=f'backend="{backend}" cannot hold table \'t\': {why}.*; use "auto"'):
            on_gpu(one_table(columns), backend=backend)


def test_on_a_gpu_a_missing_fbgemm_is_made_up_by_triton_or_is_loud(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = "fbgemm_gpu cannot be imported (undefined symbol)"
    monkeypatch.setattr(local, "_fbgemm_problem", lambda device: broken)
    monkeypatch.setattr(local, "triton_problem", lambda device: None)
    assert set(on_gpu(LAYOUT).values()) == {local.Choice("triton", broken)}
    with pytest.raises(UserError, match=r"cannot hold table 'item': fbgemm_gpu cannot be imported"):
        on_gpu(LAYOUT, backend="fbgemm")
    assert not caplog.records
    monkeypatch.setattr(local, "triton_problem", lambda device: "Triton does not start (no compiler)")
    assert {choice.backend for choice in on_gpu(LAYOUT).values()} == {"torch"}
    assert f"SLOW TABLES: 5 tables are held by plain torch, because {broken}, and Triton does not start" in caplog.text
    with pytest.raises(UserError, match=r"cannot hold table 'item': Triton does not start \(no compiler\)"):
        on_gpu(LAYOUT, backend="triton")


def test_on_a_cpu_auto_takes_no_triton(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assert choices(layout=one_table(1028))["t"].backend == "fbgemm"
    assert choices(layout=one_table(6))["t"].backend == "torch"
    monkeypatch.setattr(local, "_fbgemm_problem", lambda device: "fbgemm_gpu cannot be imported")
    assert choices(layout=one_table(8))["t"].backend == "torch"
    assert not caplog.records


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    triton_problem.cache_clear()
    try:
        assert choices(optimizer="sgd")["user"].backend == "fbgemm"
        with pytest.raises(UserError, match=r"backend=\"triton\" cannot hold table 'item': triton is not installed"):
            choices(backend="triton")
    finally:
        triton_problem.cache_clear()


def test_where_triton_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    try:
        for device, without in (("cpu", "Triton has no kernels for CPUs"), ("cuda", "Triton does not start")):
            triton_problem.cache_clear()
            assert triton_problem(device) is None  # interpreted
            triton_problem.cache_clear()
            with monkeypatch.context() as patch:
                patch.delenv("TRITON_INTERPRET")
                problem = triton_problem(device)
            assert torch.cuda.is_available() or (problem is not None and problem.startswith(without))
    finally:
        triton_problem.cache_clear()


def test_ids_are_wide_enough_for_the_rows_of_all_tables_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Module:
        def __init__(self, *_: object, **__: object) -> None: ...

        def __call__(self, values: torch.Tensor, offsets: torch.Tensor, weights: None) -> torch.Tensor:
            seen.append((values.dtype, offsets.dtype))
            return torch.zeros(1, 16)

    monkeypatch.setattr(fbgemm_backend, "SplitTableBatchedEmbeddingBagsCodegen", Module)
    ids = LocalIds(torch.zeros(2, dtype=torch.int32), torch.arange(3, dtype=torch.int32), (1, 1), 1)
    for rows in (2**30 - 1, 2**30):
        tables = (Table("a", rows, 8), Table("b", rows, 8))
        layout = EmbeddingLayout(8, tables, tuple(Feature(t.name, t.name, "sum", False, 0, 8) for t in tables), 2, 0)
        plan = plan_lookups(layout, place(layout, "table", 1), 2, fused={"a", "b"})
        shards = group_lookups(plan.slots[0], plan.shards[0])
        fbgemm_backend.FbgemmTables(shards, EmbeddingConfig(), CPU).pool(ids)
    assert seen == [(torch.int32, torch.int32), (torch.int64, torch.int64)]


@pytest.mark.filterwarnings("ignore")
def test_ids_are_checked_where_fbgemms_variable_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = EmbeddingLayout(4, (Table("t", 5, 4),), (Feature("t", "t", "sum", False, 0, 4),), 1, 0)
    plan = plan_lookups(layout, place(layout, "table", 1), 1, fused={"t"})
    shards = group_lookups(plan.slots[0], plan.shards[0])
    outside = LocalIds(torch.tensor([1, 5]), torch.arange(3), (2,), 2)
    monkeypatch.setenv(fbgemm_backend.BOUNDS_CHECK, "0")
    with pytest.raises(RuntimeError, match="idx < num_rows"):
        fbgemm_backend.FbgemmTables(shards, EmbeddingConfig(), CPU).pool(outside)
    monkeypatch.setenv(fbgemm_backend.BOUNDS_CHECK, "fatal")
    with pytest.raises(UserError, match=r"FBGEMM_TBE_BOUNDS_CHECK_MODE='fatal': expected one of 0 \(fatal\), 1"):
        fbgemm_backend.FbgemmTables(shards, EmbeddingConfig(), CPU)
    monkeypatch.delenv(fbgemm_backend.BOUNDS_CHECK)
    assert fbgemm_backend.bounds_check() is fbgemm_backend.BoundsCheckMode.NONE
