"""A plan is a pure function; its parts agree with each other."""

import json
from pathlib import Path

import pytest

from megarec.config.load import load_config
from megarec.data.schema import schema_of
from megarec.errors import UserError
from megarec.planning.hardware import Figure, load_hardware
from megarec.planning.planner import Plan, plan_run
from megarec.run.spec import resolve

CONFIG = Path(__file__).resolve().parents[2] / "ds_configs/mlperf-dlrm-dcnv2.json"


def plan(kind: str, hosts: int, ranks: int, *overrides: str, **figures: float) -> Plan:
    hardware = load_hardware(kind)
    changed = {name: Figure(value=value, source="made up") for name, value in figures.items()}
    config = load_config(CONFIG, ["data.batch_size=65536", *overrides])
    return plan_run(config, resolve(config, schema_of(config.data)), hardware.model_copy(update=changed), hosts, ranks)


def test_parts_of_a_plan_agree() -> None:
    found = plan("h100", 2, 8)
    assert found.fits and found.memory["total"] < found.available == 80_000_000_000
    assert found.seconds == pytest.approx(sum(found.timeline.exposed.values()))
    assert found.examples_per_second == pytest.approx(65_536 / found.seconds)
    names = [piece.name for piece in found.pieces]
    assert len(set(names)) == len(names)
    assert all(set(piece.after) <= set(names[:place]) for place, piece in enumerate(found.pieces))
    sent = {(row.what, row.link): row.bytes for row in found.traffic}
    messages = found.work.messages
    assert sum(size for (_, link), size in sent.items() if link == "network") >= sum(
        message.cross_host_bytes for message in messages
    )
    assert plan("h100", 2, 8).timeline == found.timeline


def test_a_slower_part_of_a_machine_makes_a_longer_step() -> None:
    base = plan("h100", 2, 4).seconds
    for figure, value in (
        ("network_gb_s", 5.0), ("gemm_tflops", 100.0), ("memory_tb_s", 0.5), ("host_link_gb_s", 5.0),
    ):  # fmt: skip
        assert plan("h100", 2, 4, **{figure: value}).seconds > 1.05 * base, figure
    assert not plan("a40", 1, 2).fits, "209 GB of tables on two cards of 48"


def test_heads_of_several_labels_count() -> None:
    """Operations, parameters and the question which losses are finite; each label after the first adds as much."""
    found = {}
    for labels in (1, 2, 3):
        names = [f"label{i}" for i in range(labels)]
        overrides = ["data.batch_size=65536"]
        if labels > 1:
            overrides += [f"data.label={json.dumps(names)}", 'model.tasks={"name": "ple", "expert": [64]}']
        config = load_config(CONFIG, overrides)
        schema = schema_of(load_config(CONFIG, overrides[:1]).data)
        tasks = {"label": names[0], "labels": tuple(names), "tasks": tuple(names) if labels > 1 else ()}
        spec = resolve(config, schema.model_copy(update=tasks))
        found[labels] = plan_run(config, spec, load_hardware("h100"), 1, 8)
        assert found[labels].work.flop == 8_192 * spec.cost.flop
        assert sum(op.flop for op in found[labels].work.dense) == pytest.approx(found[labels].work.flop, rel=1e-3)
        assert found[labels].memory["parameters"] == pytest.approx(2 * spec.cost.dense_parameters, abs=32)  # padded
    one, two, three = (found[labels].timeline.busy for labels in (1, 2, 3))
    assert one["dense compute"] < two["dense compute"] < three["dense compute"]
    answer = next(piece.seconds for piece in found[1].pieces if piece.name == "answer")
    assert two["check"] == pytest.approx(three["check"]) == pytest.approx(one["check"] + answer)


def test_hosts_of_one_scale_up_domain_cross_no_network() -> None:
    joined, apart = plan("gb200", 2, 4), plan("gb200", 2, 4, scale_up_ranks=4)
    assert joined.seconds == pytest.approx(plan("gb200", 1, 8).seconds, rel=0.01)
    assert apart.seconds > 1.2 * joined.seconds


@pytest.mark.parametrize(
    ("hosts", "ranks", "overrides", "said"),
    [
        (1, 9, (), "a host of H100 has 8"),
        (0, 8, (), "--hosts 0: expected at least 1"),
        (1, 8, ("parallel.ranks_per_host=4",), "make them equal"),
        (3, 8, (), "65536"),
    ],
)
def test_what_cannot_be(hosts: int, ranks: int, overrides: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        plan("h100", hosts, ranks, *overrides)
