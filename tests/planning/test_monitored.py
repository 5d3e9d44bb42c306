"""What a run's monitor is told is what the planner predicts: memory, traffic, and the time of a step on its machine."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from megarec.config.load import load_config
from megarec.data.schema import schema_of
from megarec.distributed.topology import Topology
from megarec.planning.hardware import load_hardware
from megarec.planning.monitored import machine_of, monitored_points, timed_parts
from megarec.planning.planner import Plan, plan_run
from megarec.run.build import Run
from megarec.run.spec import resolve

CONFIG = Path(__file__).resolve().parents[2] / "ds_configs/mlperf-dlrm-dcnv2.json"
TIME = "workload/time_ms/"


def a_run(*overrides: str, device: str = "cpu", rank: int = 0) -> Run:
    common = ["data.batch_size=512", "deepspeed.fp16.enabled=false", "embedding.placement=auto"]
    config = load_config(CONFIG, [*common, *overrides])
    run: Any = SimpleNamespace(
        config=config,
        spec=resolve(config, schema_of(config.data)),
        topology=Topology(rank, 2, 2, config.parallel.tensor),
        device=torch.device(device),
    )
    return cast(Run, run)


def a_plan(run: Run, kind: str) -> Plan:
    return plan_run(run.config, run.spec, load_hardware(kind), 1, 2)


def test_bytes() -> None:
    points = monitored_points(a_run(rank=1))
    assert points["workload/memory_mib/tables_predicted"] > 50_000
    assert points["workload/traffic_mib_per_step/world_predicted"] > 0
    assert points["workload/traffic_mib_per_step/cross_host_predicted"] == 0
    assert not any(tag.startswith(TIME) for tag in points)


@pytest.mark.parametrize("stage", [0, 1])
def test_on_a_cpu_the_parts_make_a_step(stage: int) -> None:
    run = a_run(f"deepspeed.zero_optimization.stage={stage}")
    points = monitored_points(run, load_hardware("epyc-2-cores"))
    told = {tag.removeprefix(TIME).removesuffix("_predicted"): ms for tag, ms in points.items() if tag.startswith(TIME)}
    busy = a_plan(run, "epyc-2-cores").timeline.busy
    assert set(told) == {"step", "ids", "exchange", "dense", "forward", "optimizer"}
    parts = told["ids"] + told["exchange"] + told["dense"] + told["optimizer"]
    assert told["step"] == pytest.approx(parts) == pytest.approx(1e3 * sum(busy.values()))
    assert 3 * told["forward"] == pytest.approx(1e3 * busy["dense compute"])
    gradients = 0.0 if stage == 0 else busy["dense gradients"] * 2 / 3  # stage 0 waits for them when it steps
    assert told["dense"] == pytest.approx(1e3 * (busy["dense compute"] + gradients), rel=1e-4)
    assert points["workload/examples_per_second_predicted"] == pytest.approx(512 / (1e-3 * told["step"]))


def test_on_an_accelerator_a_part_is_timed_by_itself() -> None:
    plan = a_plan(a_run("data.batch_size=65536"), "h100")
    found, pieces = timed_parts(plan), {piece.name: piece.seconds for piece in plan.pieces}
    assert set(found) == {"step", "ids", "exchange", "dense", "forward", "check", "optimizer"}
    names = ["lookup", "embeddings", "gradients of embeddings", "update"]
    assert found["exchange"] == pytest.approx(sum(pieces[name] for name in names)), "starts are hidden behind work"
    assert found["forward"] == pytest.approx(max(pieces["forward"], pieces["start forward"]))
    assert plan.seconds < sum(found.values()) - found["forward"], "a step overlaps its parts"


def test_the_machine_of_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    def kind(name: str) -> str | None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
        found = machine_of(torch.device("cuda"))
        return found.name if found is not None else None

    assert machine_of(torch.device("cpu")) is None
    assert [kind(f"NVIDIA {name}") for name in ("H100 80GB HBM3", "H100 PCIe", "H200", "A100-SXM4-80GB", "L40S")] == [
        load_hardware(name).name for name in ("h100", "h100-pcie", "h200", "a100", "l40s")
    ]
    assert kind("NVIDIA GB200") == load_hardware("gb200").name and kind("NVIDIA B200") == load_hardware("b200").name
    assert kind("NVIDIA H200 NVL") is None and kind("NVIDIA A100-PCIE-40GB") is None, "other links"


def test_a_machine_that_does_not_fit_is_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        points = monitored_points(a_run(), load_hardware("h100"))
    assert points and not any(tag.startswith(TIME) for tag in points)
    assert [record.getMessage() for record in caplog.records] == [
        "TensorBoard has no predicted time of a step: hardware H100 computes on cuda, and the run on cpu"
    ]
