"""Faulty steps, one by one: what is noticed, named, and left as it was."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megarec.config.sections import FaultsConfig
from megarec.data.sources.synthetic import Shape, prepare_synthetic
from megarec.distributed.rank_pool import RankPool
from megarec.run.state import TrainState
from megarec.training.faults.policy import FaultPolicy, RankHealth, cause_of
from tests.checkpoint.runs import TOWER_MODULE, TOWERS, write_run
from tests.training.faulty import fp16_steps, plant_all

GOOD = RankHealth(0.5, 1.0, 1.0, 0.0, 0.0)
NAN = float("nan")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("faults") / "data"
    prepare_synthetic(Shape(examples=1_000, seed=2), path)
    return path


KINDS = {
    "example": ("loss", "numeric features: 1 numbers are not finite; worst numeric_1: 1 not finite"),
    "row": ("loss", "embeddings of feature single_0 are not finite"),
    "gradient": ("gradient", "rank 1: gradient of"),
    "embeddings": ("gradient", "rank 1: gradient of the embeddings is not finite in"),
    "tower": ("gradient", "(tower modules) is not finite"),
}
FLAT = ["example", "row", "gradient", "embeddings"]
TOWER = {
    "parallel": {"exchange": "tower", "ranks_per_host": 1, "towers": TOWERS},
    "tower_module": TOWER_MODULE,
}


def check(pool: RankPool, path: Path, kinds: list[str], overrides: list[str]) -> None:
    for rank, (seen, differing) in enumerate(pool.run(plant_all, path, overrides, kinds)):
        for kind in kinds:
            cause, text = KINDS[kind]
            assert seen[kind].cause == cause, (rank, kind, seen[kind].description)
            assert text in seen[kind].description
            assert kind == "row" or ("rank 1: " in seen[kind].description and "rank 0: " not in seen[kind].description)
            assert seen[kind].changed == [], (rank, kind)
        assert differing == [], "the good step after the bad ones must be that of a run without them"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_bad_step_changes_nothing(
    stage: int, rank_pool: Callable[[int], RankPool], data: Path, tmp_path: Path
) -> None:
    path = write_run(tmp_path, data, deepspeed={"zero_optimization": {"stage": stage}})
    check(rank_pool(2), path, FLAT, [])


@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.slow), 2, 3])
def test_a_bad_step_changes_nothing_in_bf16(
    stage: int, rank_pool: Callable[[int], RankPool], data: Path, tmp_path: Path
) -> None:
    section = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": True}}
    check(rank_pool(2), write_run(tmp_path, data, deepspeed=section), FLAT, [])


@pytest.mark.parametrize("stage", [0, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2)), 3])
def test_a_bad_step_changes_nothing_with_tower_modules_and_accumulation(
    stage: int, rank_pool: Callable[[int], RankPool], data: Path, tmp_path: Path
) -> None:
    section = {"zero_optimization": {"stage": stage}, "gradient_accumulation_steps": 2}
    check(rank_pool(2), write_run(tmp_path, data, **TOWER, deepspeed=section), [*FLAT, "tower"], [])


@pytest.mark.parametrize("stage", [0, 2])
def test_a_bad_step_changes_nothing_under_tensor_parallelism(
    stage: int, rank_pool: Callable[[int], RankPool], data: Path, tmp_path: Path
) -> None:
    """The other rank of the pair computes with what rank 1 sends, so that it may be named too."""
    path = write_run(tmp_path, data, parallel={"tensor": 2}, deepspeed={"zero_optimization": {"stage": stage}})
    for seen, differing in rank_pool(4).run(plant_all, path, [], FLAT):
        for kind in FLAT:
            cause, text = KINDS[kind]
            assert (seen[kind].cause, seen[kind].changed) == (cause, []), (kind, seen[kind])
            assert text in seen[kind].description
        assert differing == []


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_bad_step_changes_nothing_with_offloaded_states(
    stage: int, rank_pool: Callable[[int], RankPool], data: Path, tmp_path: Path
) -> None:
    section = {"zero_optimization": {"stage": stage, "offload_optimizer": {"device": "cpu"}}}
    check(rank_pool(2), write_run(tmp_path, data, deepspeed=section), FLAT, [])


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_an_overflow_of_fp16_shrinks_the_scale_and_a_fault_does_not(
    stage: int, rank_pool: Callable[[int], RankPool], data: Path, tmp_path: Path
) -> None:
    fp16 = {"enabled": True, "initial_scale_power": 8, "hysteresis": 1}
    path = write_run(tmp_path, data, deepspeed={"zero_optimization": {"stage": stage}, "fp16": fp16})
    (seen,) = rank_pool(1).run(fp16_steps, path, ["gradient", "embeddings", "example"])
    assert seen == [("overflow", 2.0, 0, 1), ("overflow", 2.0, 0, 2), ("loss", 1.0, 0, 3)]


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("fp16", [{"loss_scale": 8}, {"initial_scale_power": 0, "min_loss_scale": 1, "hysteresis": 1}])
def test_where_the_scale_cannot_shrink_bad_gradients_of_fp16_are_a_fault(
    stage: int, fp16: dict[str, Any], rank_pool: Callable[[int], RankPool], data: Path, tmp_path: Path
) -> None:
    section = {"zero_optimization": {"stage": stage}, "fp16": {"enabled": True, **fp16}}
    (seen,) = rank_pool(1).run(fp16_steps, write_run(tmp_path, data, deepspeed=section), ["gradient", "embeddings"])
    assert [(cause, scale, moved) for cause, scale, moved, _ in seen] == [("gradient", 1.0, 0), ("gradient", 1.0, 0)]


def test_the_loss_comes_before_gradients_and_fp16_overflows_are_no_faults() -> None:
    assert cause_of([GOOD, GOOD], scale_can_shrink=False) is None
    bad_gradient = RankHealth(0.5, 1.0, NAN, 0.0, 0.0)
    assert cause_of([GOOD, bad_gradient], scale_can_shrink=False) == "gradient"
    assert cause_of([GOOD, bad_gradient], scale_can_shrink=True) == "overflow"
    assert cause_of([RankHealth(NAN, NAN, NAN, 0.0, 0.0), bad_gradient], scale_can_shrink=True) == "loss"


def policy(**config: Any) -> tuple[FaultPolicy, TrainState]:
    position = TrainState()
    return FaultPolicy(FaultsConfig(**config), position), position


def test_a_good_step_resets_the_count_of_faults_in_a_row() -> None:
    faults, position = policy(max_in_a_row=2, then="stop")
    assert faults.skipped("loss") == "go on"
    faults.applied(0.5)
    assert faults.skipped("gradient") == "go on"
    assert faults.skipped("overflow") == "go on"
    assert faults.skipped("loss") == "stop"
    assert position.skipped == {"loss": 2, "gradient": 1, "overflow": 1} and position.skipped_steps == 4


def test_a_rollback_leaves_out_what_was_faulty_and_then_all_that_led_there() -> None:
    faults, position = policy(max_in_a_row=1, then="rollback", max_rollbacks=2)
    position.step = 7
    assert faults.skipped("loss") == "rollback"
    faults.rolled_back(TrainState(step=4))
    assert (position.step, position.left_out, position.rollbacks) == (4, [7], 1)
    position.step = 8
    assert faults.skipped("loss") == "rollback"
    faults.rolled_back(TrainState(step=4))
    assert (position.step, position.left_out, position.rollbacks) == (4, [4, 5, 6, 7, 8], 2)
    assert faults.skipped("loss") == "stop"


def test_a_spike_is_far_above_the_median_of_a_full_window() -> None:
    faults, position = policy(spike="skip", spike_window=5, spike_deviations=4.0)
    for loss in (0.5, 0.6, 0.4, 0.55):
        assert not faults.spikes(99.0), "the window is not full"
        faults.applied(loss)
    faults.applied(0.45)
    # median 0.5, absolute deviations 0, 0.1, 0.1, 0.05, 0.05: their median 0.05
    assert faults.spike_bound() == pytest.approx(0.7)
    assert not faults.spikes(0.69) and faults.spikes(0.71)
    assert faults.skipped("spike") == "go on"
    for _ in range(5):
        faults.applied(0.5)
    assert faults.spike_bound() == pytest.approx(0.5 + 4.0 * 0.005), "at least 1 % of the median"
    assert len(position.losses) == 5
