"""`bench.py placements`: draws are legal and the same every time, picks are judged, bytes are counted."""

import pytest
import torch

from megarec.planning.hardware import load_hardware
from tools.benchmarks import placements
from tools.benchmarks.placements import Cost


@pytest.mark.parametrize("seed", [0, 1])
def test_placements_are_legal_and_all_different(seed: int) -> None:
    own = placements.draw(seed, 10)
    assert own.placements == placements.draw(seed, 10).placements and len(set(own.placements)) == 10
    assert own.placements != placements.draw(seed + 2, 10).placements
    for shards in own.placements:
        assert {shard.rank for shard in shards} == {0, 1}
        for table in own.spec.layout.tables:
            held = torch.zeros(table.rows, table.columns, dtype=torch.int8)
            mine = [shard for shard in shards if shard.table == table.name]
            for shard in mine:
                held[shard.slices] += 1
            copies = 2 if sum(shard.rows * shard.columns == held.numel() for shard in mine) == 2 else 1
            assert bool((held == copies).all())


def test_a_pick_is_held_to_the_best() -> None:
    row = placements.judge([1.0, 2.0, 3.0], [2.0, 1.0, 4.0])
    assert row["pick_over_best"] == 2 and row["median_over_best"] == 2
    assert row["share_within_5_percent"] == pytest.approx(1 / 3) and row["rank_correlation"] == pytest.approx(0.5)
    parts = [
        [Cost([[(a, b), (0.0, 0.0)]] * 4, {}) for a, b in own] for own in ([(0.3, 0.1), (0.1, 0.4)], [(0.2, 0.3)] * 2)
    ]
    by_rank = parts
    time, cpu = (placements.measured_row(name, clock, by_rank, [1.0, 2.0]) for clock, name in enumerate(("t", "c")))
    assert time["best_ms"] == pytest.approx(200) and time["pick_over_best"] == pytest.approx(1.5)
    assert cpu["best_ms"] == pytest.approx(300) and time["noise"] == 0 and time["again_over_best"] == 1
    found = placements.ratios([time, {**time, "pick_over_best": 1.04}])
    assert found["picked, t"] == 0.5 and found["pick over best, worst, t"] == pytest.approx(1.5)


def test_tables_of_one_kind() -> None:
    """Measured CPU of the rank that has most of a part; of predictions messages count half."""
    hardware, own = load_hardware(placements.MACHINE), placements.draw(placements.SHOWN, 1)
    kinds = placements.of_one_kind(own)
    assert list(kinds) == ["table", "column", "row", "replicated"]
    assert all({shard.rank for shard in shards} == {0, 1} for shards in kinds.values())
    taken = [[(9.0, 1e-3 * rank), (9.0, 2e-3), (9.0, 3e-3), (9.0, 4e-3)] for rank in (1, 2)]
    rows = placements.kind_rows(own, [[Cost([one, one], {})] * 4 for one in taken], hardware)
    assert [row["kind"] for row in rows] == list(kinds)
    assert rows[0]["ids_ms"] == pytest.approx(2) and rows[0]["update_ms"] == pytest.approx(4)
    assert rows[2]["ids_predicted_ms"] > 2 * rows[0]["ids_predicted_ms"], "ids sorted by owner"
    assert rows[1]["update_predicted_ms"] > 2 * rows[0]["update_predicted_ms"], "both ranks sort all ids, in torch"
    seconds, cpu = (placements.predict(own, hardware, share) for share in (1.0, placements.MESSAGE_CPU))
    assert cpu[0] < seconds[0] < 2 * cpu[0]


def test_bytes_of_the_slowest_rank() -> None:
    """Of one message: the slower rank's; of rows: those that a batch really asks for."""
    hardware, own = load_hardware(placements.MACHINE), placements.draw(1, 2)
    assert hardware.host_link_gb_s is not None
    by_rank = [[Cost([], {"a": 1000, "b": 5})] * 2, [Cost([], {"a": 10, "b": 7})] * 2]
    more = [[Cost([], {"a": 5000, "b": 5})] * 2, by_rank[1]]
    few, many = (placements.counted_costs(own, 1, ranks, hardware) for ranks in (by_rank, more))
    for one, other in zip(few, many, strict=True):
        assert other - one == pytest.approx(4000 / (1e9 * hardware.host_link_gb_s.value), rel=1e-6)
    assert min(few) > 0 and few[0] != few[1]
