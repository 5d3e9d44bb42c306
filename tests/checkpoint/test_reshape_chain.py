"""A run goes from topology to topology; its losses are those of a run that never stopped."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megarec.distributed.rank_pool import RankPool
from megarec.run.state import TrainState
from megarec.sparse.tables.base import State
from tests.checkpoint.runs import TOWER_MODULE, TOWERS, build, leg, store, train_steps, write_run

Pools = Callable[[int], RankPool]

FLAT_2 = (2, ["deepspeed.zero_optimization.stage=1"])
TOWER_4 = (
    4,
    [
        "parallel.tensor=2",
        "parallel.ranks_per_host=2",
        "parallel.exchange=tower",
        "deepspeed.zero_optimization.stage=3",
    ],
)
ONE = (1, ["deepspeed.zero_optimization.stage=0", "embedding.backend=torch"])
COLUMN_2 = (2, ["parallel.tensor=2", "parallel.ranks_per_host=2", "embedding.placement=column"])
ROWS_2 = (2, ['embedding.placement="row"', 'deepspeed.zero_optimization.offload_optimizer={"device": "cpu"}'])


def drift(found: list[float], expected: list[float]) -> float:
    return max(abs(a / b - 1) for a, b in zip(found, expected, strict=True))


# Most tables decay lazily, of one Adam steps every row.
ALL_ROWS = {
    "optimizer": "adam",
    "l2": {"weight": 0.1, "rows": "all", "coupled": False},
    "tables": {"single_1": {"l2": {"weight": 1e-3, "rows": "all"}}},
    "eps": 1e-3,
}


@pytest.mark.parametrize(
    ("dense", "table"),
    [
        ("adamw", {"optimizer": "rowwise_adagrad"}),
        pytest.param("sgd", {"optimizer": "sgd"}, marks=pytest.mark.slow),
        pytest.param("adamw", ALL_ROWS, marks=pytest.mark.slow),
    ],
    ids=["adamw-rowwise_adagrad", "sgd-sgd", "adamw-all rows"],
)
def test_losses_continue_on_every_topology(
    rank_pool: Pools, data: Path, tmp_path: Path, dense: str, table: dict[str, object]
) -> None:
    path = write_run(
        tmp_path,
        data,
        dense={"optimizer": dense, "learning_rate": 0.01 if dense == "adamw" else 0.1},
        embedding={"learning_rate": 0.1, **table},
        parallel={"towers": TOWERS},
        train={"keep_checkpoints": 9, "output_dir": str(tmp_path / "out")},
        tower_module=TOWER_MODULE,
    )
    ranks, overrides = FLAT_2
    whole = rank_pool(ranks).run(partial(leg, load=False, save=False), path, overrides, 0, 22)[0].losses
    first = rank_pool(ranks).run(partial(leg, load=False, save=True), path, overrides, 0, 3)[0].losses
    assert first == whole[:3]
    chain = [TOWER_4, ONE, FLAT_2, COLUMN_2, ROWS_2]
    for position, (ranks, overrides) in enumerate(chain):
        start, stop = 3 + 3 * position, 6 + 3 * position
        found = rank_pool(ranks).run(partial(leg, load=True, save=True), path, overrides, start, stop)[0].losses
        assert drift(found[:1], whole[start : start + 1]) < 1e-6, overrides
        assert drift(found, whole[start:stop]) < 1e-5, overrides
    # ten steps after the one that all of these have led to
    ranks, overrides = TOWER_4
    found = rank_pool(ranks).run(partial(leg, load=True, save=False), path, overrides, 12, 22)[0].losses
    assert drift(found, whole[12:]) < 1e-5


def test_a_stream_goes_on_in_the_middle_of_an_epoch(rank_pool: Pools, data: Path, tmp_path: Path) -> None:
    """Two ranks, then four, then one; a window has three batches."""
    path = write_run(tmp_path, data, data={"stream_rows": 240})
    whole = rank_pool(2).run(partial(leg, load=False, save=False), path, [], 0, 12)[0].losses
    assert rank_pool(2).run(partial(leg, load=False, save=True), path, [], 0, 4)[0].losses == whole[:4]
    for ranks, start, stop in ((4, 4, 8), (1, 8, 12)):
        found = rank_pool(ranks).run(partial(leg, load=True, save=True), path, [], start, stop)[0].losses
        assert drift(found[:1], whole[start : start + 1]) < 1e-6
        assert drift(found, whole[start:stop]) < 1e-5
    cached = rank_pool(2).run(partial(leg, load=False, save=False), path, ["data.stream_rows=null"], 0, 4)[0].losses
    assert cached != whole[:4]  # another order


@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.slow), 3])
def test_low_precision_weights_are_the_masters_rounded(
    rank_pool: Pools, data: Path, tmp_path: Path, stage: int
) -> None:
    path = write_run(tmp_path, data, deepspeed={"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}})
    whole = rank_pool(2).run(partial(leg, load=False, save=False), path, [], 0, 4)[0].losses
    rank_pool(2).run(partial(leg, load=False, save=True), path, [], 0, 2)
    overrides = [f"deepspeed.zero_optimization.stage={stage}"]
    found = rank_pool(2).run(partial(leg, load=True, save=True), path, overrides, 2, 4)[0].losses
    assert drift(found[:1], whole[2:3]) < 1e-6
    assert drift(found, whole[2:]) < 5e-3
    again = rank_pool(2).run(partial(leg, load=True, save=False), path, overrides, 2, 4)[0].losses
    assert again == found


MOMENTUM = {"type": "SGD", "params": {"lr": 0.05, "momentum": 0.9}}
DEEPSPEED_ADAM = {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}}


@pytest.mark.parametrize("optimizer", [MOMENTUM, DEEPSPEED_ADAM], ids=["momentum", "adamw"])
@pytest.mark.parametrize("first", [0, 2], ids=["before any step", "after two steps"])
def test_optimizers_of_deepspeeds_section(
    rank_pool: Pools, data: Path, tmp_path: Path, optimizer: dict[str, object], first: int
) -> None:
    """Before its first step an optimizer has no states, and a checkpoint none of them."""
    path = write_run(tmp_path, data, deepspeed={"optimizer": optimizer})
    whole = rank_pool(2).run(partial(leg, load=False, save=False), path, [], 0, first + 3)[0].losses
    rank_pool(2).run(partial(leg, load=False, save=True), path, [], 0, first)
    for ranks, stage in ((2, 3), (1, 0)):
        overrides = [f"deepspeed.zero_optimization.stage={stage}"]
        found = rank_pool(ranks).run(partial(leg, load=True, save=False), path, overrides, first, first + 3)[0].losses
        assert drift(found[:1], whole[first : first + 1]) < 1e-6 and drift(found, whole[first:]) < 1e-5


def tables_of(path: Path, overrides: list[str], steps: int) -> State:
    """On a rank: its tables as saved after that many steps; 0: as it has loaded them."""
    run = build(path, overrides)
    checkpoints = store(run)
    if steps:
        train_steps(run, 0, steps)
        checkpoints.save(TrainState(step=steps))
        checkpoints.wait()
    else:
        assert checkpoints.resume() is not None
    return {name: (shard, tensor.clone()) for name, (shard, tensor) in run.sparse.state().items()}


def test_tables_of_other_ranks_are_the_same_to_the_last_bit(rank_pool: Pools, data: Path, tmp_path: Path) -> None:
    """In float16, rounded by chance: decayed to the step of the save, and with the steps that chances hang on."""
    half = {"weights": "fp16", "rounding": "stochastic"}
    path = write_run(tmp_path, data, embedding={**ALL_ROWS, **half}, parallel={"towers": TOWERS})

    def tables(ranks: int, overrides: list[str], steps: int) -> dict[str, Tensor]:
        parts = [part for state in rank_pool(ranks).run(tables_of, path, overrides, steps) for part in state.items()]
        found: dict[str, Tensor] = {}
        for name, (shard, _) in parts:
            rows, columns = shard.row_stop, shard.column_stop
            before = found.get(name, torch.empty(0, 0)).shape
            found[name] = torch.full((max(rows, before[0]), max(columns, before[1])), float("nan"))
        for name, (shard, tensor) in parts:
            found[name][shard.slices] = tensor.float()
        return found

    saved = tables(*FLAT_2, 3)
    assert not any(tensor.isnan().any() for tensor in saved.values())
    assert saved["single_0/steps"].item() == 3 and "single_1/second_moment" in saved
    for ranks, overrides in (TOWER_4, COLUMN_2, ROWS_2):
        loaded = tables(ranks, overrides, 0)
        assert loaded.keys() == saved.keys()
        assert all(torch.equal(tensor, saved[name]) for name, tensor in loaded.items()), overrides
