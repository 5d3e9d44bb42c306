"""A machine with an accelerator, pretended: what is refused, what is chosen."""

import os
from pathlib import Path

import pytest
import torch

from megarec.config.load import load_config
from megarec.distributed import process
from megarec.distributed.rank_pool import RankPool
from megarec.distributed.topology import ONE_RANK
from megarec.errors import UserError
from megarec.parity.run import write_base
from megarec.run.build import overlaps

VARIABLES = (
    "CUBLAS_WORKSPACE_CONFIG", "PYTORCH_CUDA_ALLOC_CONF", "TORCH_NCCL_DUMP_ON_TIMEOUT", "TORCH_FR_BUFFER_SIZE",
    "TORCH_FR_DUMP_TEMP_FILE",
)  # fmt: skip


def test_a_driver_without_a_device_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    driver = tmp_path / "nvidiactl"
    monkeypatch.setattr(process, "DRIVERS", (tmp_path / "kfd", driver))
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    process.check_accelerator()  # no driver: a machine without an accelerator
    driver.touch()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(UserError, match=r"CUDA_VISIBLE_DEVICES='7'.*set DS_ACCELERATOR=cpu to train on the CPU"):
        process.check_accelerator()
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    process.check_accelerator()
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    process.check_accelerator()


def test_what_cuda_and_nccl_read_is_set_before_they_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    try:
        process.prepare_cuda(False, tmp_path)
        assert not torch.are_deterministic_algorithms_enabled() and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
        process.prepare_cuda(True, tmp_path)
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert os.environ["TORCH_FR_DUMP_TEMP_FILE"] == f"{tmp_path}/nccl-rank-"
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
        for name in VARIABLES:
            os.environ.pop(name, None)


def device_of_rank() -> str:
    return f"{os.environ['DS_ACCELERATOR']} {process.rank_device()}"


def test_ranks_of_a_pool_compute_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are forks of a process that has asked torch for accelerators: none of them could use one."""
    monkeypatch.delenv("DS_ACCELERATOR")
    with RankPool(1) as pool:
        assert pool.run(device_of_rank) == ["cpu cpu"]
    assert "DS_ACCELERATOR" not in os.environ


def test_ids_travel_ahead_on_an_accelerator(tmp_path: Path) -> None:
    path = write_base(tmp_path)
    for device, chosen in (("cpu", False), ("cuda", True)):
        assert overlaps(load_config(path, []), ONE_RANK, torch.device(device)) is chosen
        assert overlaps(load_config(path, ["parallel.overlap=false"]), ONE_RANK, torch.device(device)) is False
