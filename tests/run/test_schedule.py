import math

import pytest

from megarec.config.sections import ScheduleConfig
from megarec.run.schedule import Patience, Schedule


def factors(**config: object) -> list[float]:
    schedule = Schedule(ScheduleConfig(**config), total_steps=10, steps_per_epoch=2)  # type: ignore[arg-type]
    return [schedule.factor(step) for step in range(10)]


def test_warm_up_rises_linearly_to_one_then_holds() -> None:
    assert factors(warmup=0.4) == pytest.approx([0.25, 0.5, 0.75, 1.0] + [1.0] * 6)


def test_linear_decay_ends_at_its_final_factor() -> None:
    assert factors(decay="linear", final=0.1) == pytest.approx([1.0 - 0.1 * step for step in range(10)])


def test_cosine_decay_after_warm_up() -> None:
    expected = [0.5, 1.0] + [0.5 * (1 + math.cos(math.pi * step / 7)) for step in range(8)]
    assert factors(warmup=0.2, decay="cosine") == pytest.approx(expected)


def test_step_decay_drops_every_two_epochs() -> None:
    assert factors(decay="step", step_every=2, step_factor=0.5) == [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25]


def test_a_plateau_drop_scales_what_is_left() -> None:
    schedule = Schedule(ScheduleConfig(plateau_factor=0.3), total_steps=10, steps_per_epoch=2, plateau_drops=2)
    assert schedule.factor(3) == pytest.approx(0.09)


def test_patience_counts_from_the_best() -> None:
    patience = Patience()
    assert [patience.update(loss) for loss in (0.7, 0.6, 0.6, 0.65, 0.5)] == [True, True, False, False, True]
    assert (patience.best, patience.since_best) == (0.5, 0)


def test_no_score_is_never_the_best() -> None:
    patience = Patience()
    assert [patience.update(score) for score in (math.nan, math.inf, -math.inf, 0.6)] == [False, False, False, True]
    assert (patience.best, patience.since_best) == (0.6, 0)
