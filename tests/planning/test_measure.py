"""A measured machine is a JSON that the planner reads; how fast it is, is not tested."""

from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from megarec.distributed.rank_pool import RankPool
from megarec.distributed.topology import build_topology
from megarec.errors import UserError
from megarec.planning import measure
from megarec.planning.hardware import load_hardware


def figures(directory: Path) -> dict[str, float]:
    """On a rank of two hosts of two: the figures of the links, and of the whole job a file."""
    measure.COPIED, measure.ROWS, measure.EXAMPLES, measure.LARGE, measure.REPETITIONS = 4096, 100, 16, 4096, 1
    measure.measure(directory / "m.json")
    return measure._link_figures(torch.device("cpu"), build_topology(2, tensor=1))


def test_ranks_measure_together(rank_pool: Callable[[int], RankPool], tmp_path: Path) -> None:
    (found, *_) = rank_pool(4).run(figures, tmp_path)
    assert set(found) == {
        "host_link_us", "host_link_gb_s", "network_us", "network_gb_s", "ring_us_per_host", "ring_share",
    }  # fmt: skip
    assert all(value > 0 for value in found.values())
    hardware = load_hardware(str(tmp_path / "m.json"))
    assert hardware.ranks_per_host.value == 4 and hardware.network_gb_s is None
    assert hardware.host_link_gb_s is not None and "measured" in hardware.host_link_gb_s.source


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
    topology = build_topology(1, tensor=1)
    made = measure._as_json({"network_us": 3.0, "network_gb_s": 1.0}, torch.device("cpu"), topology)
    assert made["network_us"]["value"] == {"1": 3.0} and made["network_incast"]["value"] == 0
    assert measure._slowest("network_us", [1.0, 2.0]) == 2.0 and measure._slowest("memory_tb_s", [1.0, 2.0]) == 1.0
    assert measure._slowest("network_gb_s", [1.0, 2.0]) == pytest.approx(1.0)
