"""Plans: what a sweep costs, and what a budget leaves out."""

from pathlib import Path

import pytest

from megarec.scaling.budget import Budget, Pace, Plan, plan_sweep
from megarec.scaling.grid import Trial, read_grid
from tests.scaling.studies import WUKONG, write_study

RATES = [{"dense.learning_rate": 0.01}, {"dense.learning_rate": 0.001}]


@pytest.fixture
def trials(tmp_path: Path) -> list[Trial]:
    models = {
        "wukong-2": {"model": {**WUKONG, "layers": 2}},
        "lr": {"model": {"name": "lr", "dim": 4}},
        "wukong-1": {"model": WUKONG},
    }
    return read_grid(write_study(tmp_path, models=models, learning_rates=RATES, seeds=[1, 2, 3]))


def test_runs_gflop_and_hours_of_a_plan(trials: list[Trial]) -> None:
    plan = plan_sweep(trials, Pace.stated(0.001), 2, Budget())
    assert [line.model for line in plan.lines] == ["lr", "wukong-1", "wukong-2"]  # cheapest first
    assert [line.runs for line in plan.lines] == [4, 4, 4]  # 2 rates with the first seed, 2 more seeds
    one = next(trial for trial in trials if trial.model == "wukong-1")
    assert plan.lines[1].gflop == pytest.approx(4 * 800 * one.cost.flop / 1e9)
    # 800 examples trained, 100 predicted after the epoch, 200 at the end, at a third of the cost.
    assert plan.lines[1].seconds == pytest.approx(4 * 900 * one.cost.flop / 1e9 / 0.001)
    assert plan.hours == pytest.approx(sum(line.seconds for line in plan.lines) / 2 / 3600)
    assert Plan.of_json(plan.as_json()) == plan


def test_a_gflop_budget_leaves_out_the_dearest_models_whole(trials: list[Trial]) -> None:
    whole = plan_sweep(trials, Pace.stated(1), 1, Budget())
    enough = plan_sweep(trials, Pace.stated(1), 1, Budget(gflop=whole.gflop * 1.001))
    assert len(enough.kept) == 3
    limit = whole.lines[0].gflop + 0.9 * whole.lines[1].gflop
    plan = plan_sweep(trials, Pace.stated(1), 1, Budget(gflop=limit))
    assert [line.model for line in plan.kept] == ["lr"] and plan.gflop <= limit
    assert plan.lines[1].left_out and "GFLOP, of the budget's" in plan.lines[1].left_out
    assert plan.lines[2].left_out == "costs more than a model that is left out"


def test_an_hours_budget_counts_what_runs_at_once(trials: list[Trial]) -> None:
    alone = plan_sweep(trials, Pace.stated(0.001), 1, Budget())
    assert not plan_sweep(trials, Pace.stated(0.001), 1, Budget(hours=alone.hours * 0.001)).kept
    assert len(plan_sweep(trials, Pace.stated(0.001), 1, Budget(hours=alone.hours * 0.6)).kept) < 3
    assert len(plan_sweep(trials, Pace.stated(0.001), 2, Budget(hours=alone.hours * 0.6)).kept) == 3


def test_a_measured_pace_is_a_line_through_what_ran() -> None:
    def train(gflop: float) -> dict[str, float]:
        return {"examples_per_second": 1 / (0.001 + 0.02 * gflop), "first_step_seconds": 9.0}

    pace = Pace.measured([(gflop, train(gflop)) for gflop in (0.1, 0.5, 2.0)], "a test")
    assert (pace.start, pace.per_example, pace.per_gflop) == pytest.approx((9, 0.001, 0.02))
    alone = Pace.measured([(0.5, train(0.5))], "a test")
    assert (alone.per_example, alone.per_gflop) == pytest.approx((0, 0.022))
