"""The GEMM peak of an accelerator, with a clock that is pretended, and peaks by data sheet."""

from types import SimpleNamespace
from typing import cast

import pytest
import torch

from megarec.run.build import Run
from megarec.training import profiling, step_log
from megarec.training.profiling import data_sheet_tflops, measure_gemm_tflops


class Event:
    """The first product after a start takes long, as on a device that has to load its libraries; the others 2 ms."""

    recorded = 0

    def __init__(self, device: torch.device, enable_timing: bool) -> None:
        assert enable_timing
        self.at = 0

    def record(self) -> None:
        Event.recorded += 1
        self.at = Event.recorded

    def synchronize(self) -> None: ...

    def elapsed_time(self, stop: "Event") -> float:
        return 700.0 if self.at == 1 else 2.0


def test_an_accelerator_is_measured_by_its_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(profiling, "GEMM_SIZE", 64)
    draw = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *size, generator, device: draw(*size))
    monkeypatch.setattr(torch, "Generator", lambda device, plain=torch.Generator: plain())
    measured = measure_gemm_tflops(torch.bfloat16, torch.device("cuda"))
    assert measured == pytest.approx(2 * 64**3 / 2e-3 / 1e12)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989), ("NVIDIA H200 NVL", 835), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312), ("Tesla V100-SXM2-16GB", 125), ("NVIDIA L4", 121), ("NVIDIA L40S", 362),
        ("NVIDIA L40", None), ("NVIDIA A10G", None), ("NVIDIA GB200", 2500), ("NVIDIA GeForce RTX 4090", None),
    ],
)  # fmt: skip
def test_peaks_by_data_sheet(monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert data_sheet_tflops(torch.bfloat16, torch.device("cuda")) == peak
    assert data_sheet_tflops(torch.float32, torch.device("cuda")) is None
    assert data_sheet_tflops(torch.bfloat16, torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("device", "given", "peak"), [("cpu", None, 0.5), ("cpu", 2.0, 2.0), ("cuda", None, 989.0), ("cuda", 700.0, 700.0)]
)
def test_the_peak_for_the_mfu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, device: str, given: float | None, peak: float
) -> None:
    monkeypatch.setattr(step_log, "measure_gemm_tflops", lambda dtype, device: 0.5)
    monkeypatch.setattr(step_log, "data_sheet_tflops", lambda dtype, device: 989.0)
    run = SimpleNamespace(
        config=SimpleNamespace(train=SimpleNamespace(peak_tflops=given)),
        dense=SimpleNamespace(dtype=torch.bfloat16),
        device=torch.device(device),
    )
    with caplog.at_level("INFO"):
        assert step_log._peak_tflops(cast(Run, run)) == peak
    assert ("a GEMM reaches" in caplog.text) == (device == "cuda")
