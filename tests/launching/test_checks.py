import os
from pathlib import Path
from typing import Any

import pytest

from megarec.launching import probe
from megarec.launching.hosts import Host
from megarec.launching.preflight import check_clock, check_gpus, check_interface, check_output, compare_hosts

HERE: dict[str, Any] = {
    "directory": True,
    "python": "3.11.9",
    "code": "a" * 64,
    "packages": {"torch": "2.13.0", "fbgemm-gpu": None},
    "files": {"run.json": "1"},
    "interfaces": {"lo": "127.0.0.1", "eth0": "10.0.0.2"},
}


def test_equal_hosts_pass() -> None:
    assert compare_hosts("b", HERE, HERE) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"directory": False}, "directory: the working directory is not there"),
        ({"python": "3.12.1"}, "python: 3.12.1; expected 3.11.9; run 'bash launch/environment.sh' there"),
        ({"code": None}, "code: no megarec package; expected the files of this machine (aaaaaaaaaaaa); git pull"),
        ({"code": "b" * 64}, "code: another version (bbbbbbbbbbbb); expected the files of this machine"),
        (
            {"packages": {"torch": "2.12.0"}},
            "packages: torch 2.12.0; expected 2.13.0; run 'bash launch/environment.sh'",
        ),
        ({"packages": {}}, "packages: torch missing; expected 2.13.0"),
        ({"packages": {"torch": "2.13.0", "fbgemm-gpu": "1.8"}}, "packages: fbgemm-gpu 1.8; expected none, as here"),
        ({"files": {"run.json": "2"}}, "files: run.json has other content; expected the same content as here"),
        ({"files": {"run.json": None}}, "files: run.json cannot be read; expected the same content as here"),
    ],
)
def test_a_difference_is_one_line_with_host_and_remedy(change: dict[str, Any], expected: str) -> None:
    (failure,) = compare_hosts("b", HERE | change, HERE)
    assert str(failure).startswith(f"b: {expected}")
    assert "\n" not in str(failure)


def test_clocks_may_differ_by_what_the_reading_took() -> None:
    assert check_clock("b", [(100.0, 100.9, 100.2)]) == []
    assert check_clock("b", [(100.0, 104.0, 110.0)]) == []  # a slow answer proves nothing
    (ahead,) = check_clock("b", [(100.0, 104.0, 110.0), (200.0, 203.1, 200.2)])
    assert str(ahead).startswith("b: clock: 3.0 s ahead of this machine; expected at most 1 s; set it")
    (behind,) = check_clock("b", [(100.0, 98.0, 100.1)])
    assert "2.0 s behind" in str(behind) or "2.1 s behind" in str(behind)


def test_disk() -> None:
    assert check_output("b", {"path": "/runs", "free": 2 << 30, "writable": True}, "/runs/x") == []
    (full,) = check_output("b", {"path": "/runs", "free": 5 << 20, "writable": True}, "/runs/x")
    assert "disk: 5 MiB free at /runs; expected at least 1,024 MiB for train.output_dir" in str(full)
    (closed,) = check_output("b", {"path": "/runs", "free": 2 << 30, "writable": False}, "/runs/x")
    assert "/runs cannot be written" in str(closed)


def test_interfaces() -> None:
    route = {"address": "10.0.0.2", "interface": "eth0"}
    assert check_interface("b", route, "10.0.0.1", None, HERE) == []
    (wished,) = check_interface("b", route, "10.0.0.1", "ib0", HERE)
    assert "GLOO_SOCKET_IFNAME=ib0, but there are eth0, lo" in str(wished)
    (unrouted,) = check_interface("b", {"error": "Network is unreachable"}, "10.0.0.1", None, HERE)
    assert "no route to 10.0.0.1 (Network is unreachable)" in str(unrouted)


H200 = "NVIDIA H200, 580.65.06, 143771, 4, 0\n"


def gpus_of(monkeypatch: pytest.MonkeyPatch, directory: Path, output: str, code: int = 0) -> dict[str, Any]:
    """What the probe makes of an nvidia-smi that says this."""
    program = directory / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{output}END\nexit {code}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    return {"gpus": probe.gpus(), "shared_memory": 1 << 36, "infiniband": ["mlx5_0"]}


@pytest.mark.parametrize(
    ("output", "change", "failure"),
    [
        (2 * H200, {}, None),
        (3 * H200, {}, None),
        (H200, {}, "1 GPUs; expected at least slots=2; lower slots in the hostfile"),
        (2 * H200.replace("H200", "H100"), {}, "name NVIDIA H100; expected NVIDIA H200, as the first host"),
        (2 * H200.replace("580.65.06", "570.1"), {}, "driver_version 570.1; expected 580.65.06"),
        (H200 + H200.replace(" 4,", " 120000,"), {}, "GPU 1 has 120000 of 143771 MiB in use; expected a free one"),
        (H200.replace(" 0\n", " 7\n") + H200, {}, "GPU 0 has 7 uncorrected memory errors"),
        (2 * H200.replace(" 0\n", " [N/A]\n"), {}, None),
        (2 * H200, {"shared_memory": 64 << 20}, "/dev/shm of 64 MiB; expected 1,024 MiB for NCCL"),
        (2 * H200, {"infiniband": []}, "0 InfiniBand devices; expected 1 InfiniBand devices, as the first host"),
        ("", {}, "0 GPUs; expected at least slots=2"),
    ],
)
def test_gpus(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, output: str, change: dict[str, Any], failure: str | None
) -> None:
    first = gpus_of(monkeypatch, tmp_path, 2 * H200)
    found = gpus_of(monkeypatch, tmp_path, output) | change
    failures = [str(line) for line in check_gpus(Host("b", 2, 2), found, first)]
    assert len(failures) == (failure is not None)
    assert all(line.startswith(f"b: gpus: {failure}") for line in failures)


def test_a_driver_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = gpus_of(monkeypatch, tmp_path, 2 * H200)
    found = gpus_of(monkeypatch, tmp_path, "Unable to determine the device handle\n", code=15)
    (failure,) = check_gpus(Host("b", 2, 2), found, first)
    assert str(failure).startswith("b: gpus: nvidia-smi: Unable to determine the device handle; expected a driver")


def test_hosts_without_gpus_have_none_to_check() -> None:
    none: dict[str, Any] = {"gpus": {"found": []}, "shared_memory": 1, "infiniband": []}
    assert check_gpus(Host("b", 2, 2), none, none) == []
