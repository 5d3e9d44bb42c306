"""What a save copies, beside an accelerator: streams and page-locked memory by stand-ins."""

from types import SimpleNamespace

import pytest
import torch

from megarec.checkpoint.snapshot import HostBuffer, Snapshot
from megarec.slices import TensorSlice
from tests.streams import Stream


class OnDevice(torch.Tensor):
    """Says that it lies on a GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda:0")


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What streams and CUDA's page-locking are asked for, in order."""
    found: list[str] = []

    def register(pointer: int, size: int, flags: int) -> int:
        found.append(f"lock {size}")
        return 0

    cudart = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=lambda pointer: found.append("unlock"))
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(torch, "Stream", lambda device: Stream(found, "copies"))
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda: Stream(found, "main"))
    return found


def piece(name: str, tensor: torch.Tensor) -> TensorSlice:
    return TensorSlice(name, tuple(tensor.shape), (0,) * tensor.dim(), tensor)


def test_a_copy_beside_the_next_step_which_waits_for_it_on_the_device(events: list[str]) -> None:
    weight = torch.arange(6.0).as_subclass(OnDevice)
    snapshot = Snapshot()
    snapshot.take([piece("weight", weight)])
    assert events == [
        "lock 24",
        "main records",
        "copies waits for main",
        "enter copies",
        "leave copies",
        "copies records",
    ]
    snapshot.hold()
    snapshot.hold()  # the steps after it have nothing to wait for
    assert events[6:] == ["main waits for copies"]
    assert snapshot.not_finite() is None
    assert events[7:] == ["host waits for copies"]
    assert bytes(snapshot.data()) == torch.arange(6.0).numpy().tobytes()


def test_a_larger_save_gives_its_page_locked_memory_back(events: list[str]) -> None:
    snapshot = Snapshot()
    for size in (3, 3, 5):
        snapshot.take([piece("weight", torch.ones(size).as_subclass(OnDevice))])
    assert [what for what in events if "lock" in what] == ["lock 12", "unlock", "lock 20"]
    assert (
        events.count("host waits for copies") == 2
    )  # of a save that nobody wrote: its buffer is free before it is used


def test_memory_that_cannot_be_locked_is_used_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pending = [2]  # CUDA's runtime keeps the last error, and the kernel that meets it fails
    asked = SimpleNamespace(cudaHostRegister=lambda *_: pending[0])

    def kernel(*_: object, device: str) -> None:
        if pending.pop():
            raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "cudart", lambda: asked)
    monkeypatch.setattr(torch, "ones", kernel)
    buffer = HostBuffer()
    buffer.grow(2**20, locked=True)
    assert buffer.bytes.numel() == 2**20
    assert "cannot be page-locked (CUDA error 2)" in caplog.text and not pending
    buffer.grow(2**21, locked=False)  # nothing to unlock


def test_on_a_cpu_nothing_is_held(events: list[str]) -> None:
    snapshot = Snapshot()
    weight = torch.ones(3)
    snapshot.take([piece("weight", weight)])
    weight.zero_()  # the copy exists already
    snapshot.hold()
    assert snapshot.not_finite() is None and events == []
    assert bytes(snapshot.data()) == torch.ones(3).numpy().tobytes()
