"""TensorBoard on a disk that is full: it ends with a loud line, the run goes on."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from megarec.training.console import Console, SafeSummaryWriter


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """64 KiB."""
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mount: {done.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", "--lazy", tmp_path], check=True)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread
def test_a_full_disk_ends_tensorboard_and_not_the_run(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monitor = Console(0, SafeSummaryWriter(SummaryWriter(str(small_disk))), 10)
    monitor.scalars(1, {"train/loss": 0.5})
    monitor.close()
    (small_disk / "filler").write_bytes(b"x" * (64 * 1024 - 8 * 1024))
    for step in range(2_000):
        monitor.scalars(step, {"train/loss": 0.5})
    monitor.close()
    monitor.scalars(2_001, {"train/loss": 0.5})
    assert capsys.readouterr().err == "WARNING: TENSORBOARD ENDS HERE, THE RUN GOES ON: No space left on device\n"
