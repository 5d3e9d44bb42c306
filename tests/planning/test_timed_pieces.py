"""When the pieces of a step run, and which of them a step waits for."""

import pytest

from megarec.planning.pieces import Piece, timeline


def test_pieces_of_one_stream_follow_one_another() -> None:
    found = timeline(
        [Piece("a", "x", "compute", 2.0), Piece("b", "y", "compute", 3.0), Piece("c", "x", "compute", 1.0)]
    )
    assert found.seconds == 6 and found.exposed == found.busy == {"x": 3, "y": 3}
    assert [(run.start, run.end) for run in found.runs] == [(0, 2), (2, 5), (5, 6)]


def test_what_travels_beside_work_is_hidden_as_far_as_it_fits() -> None:
    def step(gradients: float) -> list[Piece]:
        return [
            Piece("forward", "dense", "compute", 1.0),
            Piece("backward", "dense", "compute", 2.0),
            Piece("sum", "gradients", "gradients", gradients, ("forward",)),
            Piece("update", "update", "compute", 0.5, ("sum",)),
        ]

    assert timeline(step(1.5)).exposed == {"dense": 3, "gradients": 0, "update": 0.5}
    late = timeline(step(2.75))
    assert late.exposed == pytest.approx({"dense": 1, "gradients": 2.75, "update": 0.5})
    assert late.seconds == pytest.approx(4.25) and late.busy["dense"] == 3


def test_a_step_begins_while_the_one_before_ends() -> None:
    """Ids of the next batch leave late in a step, and the next lookup waits for them."""
    step = [
        Piece("lookup", "lookup", "compute", 1.0, after_last=("ids",)),
        Piece("dense", "dense", "compute", 3.0),
        Piece("ids", "ids", "ids", 2.5, ("dense",)),
        Piece("update", "update", "compute", 1.0),
    ]
    found = timeline(step)
    assert found.seconds == pytest.approx(6.5)
    assert found.exposed == pytest.approx({"lookup": 1, "dense": 3, "ids": 2.5, "update": 0})
    assert sum(found.exposed.values()) == pytest.approx(found.seconds)


def test_the_host_runs_ahead_of_the_device() -> None:
    """Starts are hidden behind work, unless the host has to wait for the device first."""
    ahead = [
        Piece("start a", "launches", "host", 0.1),
        Piece("a", "work", "compute", 1.0),
        Piece("start b", "launches", "host", 0.4),
        Piece("b", "work", "compute", 1.0, ("start b",)),
    ]
    assert timeline(ahead).exposed == pytest.approx({"launches": 0, "work": 2})
    waits = [*ahead[:2], Piece("answer", "launches", "host", 0.0, ("a",)), *ahead[2:]]
    assert timeline(waits).exposed == pytest.approx({"launches": 0.4, "work": 2})
