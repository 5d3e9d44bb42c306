"""A measured machine is a JSON that the planner reads; how fast it is, is not tested."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from megarec.distributed.rank_pool import RankPool
from megarec.distributed.topology import build_topology
from megarec.errors import UserError
from megarec.planning import measure, measure_links, measure_tables
from megarec.planning.clock import Clock
from megarec.planning.hardware import Hardware, Ramp, load_hardware
from megarec.planning.links import message_seconds, ring_seconds
from megarec.planning.op_counts import Op, Shape
from megarec.planning.traffic import Message

LINK_KEYS = {"network_us", "network_gb_s", "network_ramp", "network_incast", "ring_us_per_host", "ring_share"}
HOST_KEYS = {"host_link_us", "host_link_gb_s", "host_ramp", "host_ring_us", "host_ring_gb_s"}


def figures(directory: Path) -> dict[str, Any]:
    """On a rank of two hosts of two: the figures of the links, and of the whole job a file."""
    measure.COPIED, measure.ROWS, measure.EXAMPLES, measure.REPETITIONS = 4096, 100, 16, 1
    measure_tables.EXAMPLES, measure_tables.REPETITIONS = 64, 1
    measure_tables.SHAPES, measure_tables.COPIES = ((10, 8, 1), (100, 8, 4)), ((8, 8),)
    measure_tables.PLACED = ((8, 2, 8),)
    measure.ROWS_OF_A_PRODUCT, measure.SIDES, measure_links.SIZES = 8, (4, 16), (64, 1024, 8192)  # type: ignore[assignment]
    cores = patch.object(measure.os, "cpu_count", return_value=4)  # one for each rank
    with cores, patch.object(measure, "measure_gemm_tflops", return_value=1.0):
        measure.measure(directory / "m.json")
    device, topology = torch.device("cpu"), build_topology(2, tensor=1)
    taken = measure_links.collective_seconds(measure_links.timer(device, topology, 1), device, topology)
    return measure_links.link_figures(taken, topology, "x")


def test_ranks_measure_together(rank_pool: Callable[[int], RankPool], tmp_path: Path) -> None:
    (found, *_) = rank_pool(4).run(figures, tmp_path)
    assert set(found) == LINK_KEYS | HOST_KEYS
    single = [entry["value"] for entry in found.values() if isinstance(entry["value"], float)]
    assert len(single) == 8 and min(single) >= 0
    hardware = load_hardware(str(tmp_path / "m.json"))
    assert hardware.ranks_per_host.value == 4 and hardware.network_gb_s is None
    assert set(hardware.table_kinds) >= {"ids", "split", "torch lookup", "torch update", "copy", "assemble", "scatter"}
    assert hardware.host_ramp is not None and set(hardware.host_ramp.value) == {"256", "2048"}
    assert hardware.host_ring_gb_s is not None and "all_gather of 64, 1024, 8192" in hardware.host_ring_gb_s.source
    assert hardware.fp32_ramp is not None and hardware.fp32_ramp.value["16"] == 1
    assert hardware.gemm_ramp is not None and "GFLOP/s" in hardware.gemm_ramp.source


def test_figures_follow_from_times() -> None:
    """Two ranks: a delay of 100 us, half of 16 MiB at 2 GB/s, all else at half of that; an all-reduce is two passes."""
    topology = dataclasses.replace(build_topology(1, tensor=1), world_size=2, ranks_per_host=2)
    taken = {}
    for size in measure_links.SIZES:
        rate = 0.0 if size == 64 else 1e-3 * size / 2 / (2.0 if size == measure_links.SIZES[-1] else 1.0)
        taken |= {f"host {op}_us {size}": 100 + rate for op in ("all_to_all", "all_gather")}
        taken[f"host all_reduce_us {size}"] = 2 * (150 + 2 * rate)
    found = {key: entry["value"] for key, entry in measure_links.link_figures(taken, topology, "x").items()}
    assert found["host_link_us"] == 100 and found["host_link_gb_s"] == pytest.approx(2)
    assert found["host_ramp"] == {"8192": 0.5, "131072": 0.5, "1048576": 0.5, "8388608": 1.0}
    assert found["host_ring_us"] == 150 and found["host_ring_gb_s"] == pytest.approx(1)
    machine = load_hardware("epyc-2-cores").model_copy(
        update={key: Hardware.model_fields[key].annotation.__args__[0](value=value, source="x")  # type: ignore[union-attr]
                for key, value in found.items()}
    )  # fmt: skip
    small = Message("world", "all_to_all x", "float32", "forward", 131072, 0, 0)
    assert message_seconds(small, topology, machine) == pytest.approx(100e-6 + 131072 / 1e9)
    assert ring_seconds(1e6, 1, 2, machine) == pytest.approx(150e-6 + 1e-3)


def test_small_products_are_slower() -> None:
    shares = Ramp(value={"64": 0.25, "256": 1.0}, source="x")
    machine = load_hardware("epyc-2-cores").model_copy(update={"fp32_ramp": shares})
    ops = [Op("mm", "gemm", 10**9, {}, {}, Shape(1, 512, side, 512)) for side in (64, 512)]
    small, large = (Clock(machine).on_device([op], 4) for op in ops)
    assert small == pytest.approx(4 * large)


def refused(path: Path) -> str:
    """On a rank."""
    with patch.object(measure, "_rank_figures", side_effect=AssertionError("measured first")):
        try:
            measure.measure(path)
        except UserError as error:
            return str(error)
    return ""


def test_a_file_that_cannot_be_written_is_said_first_and_by_all_ranks(
    rank_pool: Callable[[int], RankPool], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dir.json").mkdir()
    for name, said in (("m.txt", "a JSON file"), ("file/m.json", "cannot be made"), ("dir.json", "is a directory")):
        for message in rank_pool(2).run(refused, tmp_path / name):
            assert said in message and message.startswith(f"--measure {tmp_path / name}: ")


def test_what_is_written_of_several_hosts() -> None:
    topology = dataclasses.replace(build_topology(1, tensor=1), world_size=4, ranks_per_host=2)
    taken = {f"network {op}_us {size}": 3.0 for op in ("all_to_all", "all_gather", "all_reduce")
             for size in measure_links.SIZES}  # fmt: skip
    products = {f"{name} {side}": 1.0 for name in measure.TYPES for side in measure.SIDES}
    made = measure._as_json({**products, **taken}, torch.device("cpu"), topology)
    assert made["network_us"]["value"] == {"2": 3.0} and made["network_incast"]["value"] == 0
    assert measure._slowest("network all_to_all_us 64", [1.0, 2.0]) == 2.0
    assert measure._slowest("memory_tb_s", [1.0, 2.0]) == 1.0
