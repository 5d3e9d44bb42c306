"""For every test: pools of gloo ranks, and which test process runs it when."""

import multiprocessing
import multiprocessing.forkserver
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from megarec.distributed.rank_pool import PRELOADED, RankPool
from tests.processes import warm_environment

# No deadline: a busy machine is not a defect. The same examples every time where a failure must be one's own doing.
settings.register_profile("megarec", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("megarec")

# Tests compute on CPUs, on a machine with GPUs as well: their ranks and scripts are forks, which cannot use one.
os.environ["DS_ACCELERATOR"] = "cpu"
# So are Triton's kernels: it decides when it is imported, which torch does as well.
os.environ["TRITON_INTERPRET"] = "1"

# Test processes and their ranks share a few cores. Threads that spin while they wait for each other take them all: a
# small model trained here on two threads took thirty times the CPU time of one. Those of child processes must sleep.
torch.set_num_threads(1)
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
PRELOADED.append("tests.preloaded")  # of this process's pools and scripts

# A file stays in one test process, with its fixtures, the longest files first: what a process would do twice and what
# it would wait for at the end both cost time. The cases of the parity matrix share little, so they fill up the end.
LONGEST = [
    "tests/docs/test_shell_blocks.py",
    "tests/test_installed.py",
    "tests/hosts/test_multihost.py",
    "tests/training/test_fault_runs.py",
    "tests/scaling/test_sweep.py",
    "tests/serving/test_every_model.py",
    "tests/training/test_fault_launch.py",
]
ONE_BY_ONE = "tests/parity/test_parity.py"


def pytest_configure(config: pytest.Config) -> None:
    """Start the process from which pools and scripts are forked, before any test.

    It imports tests.preloaded from the current directory, and ranks inherit its environment: tests change both.
    """
    if "PYTEST_XDIST_WORKER" in os.environ or not config.getoption("numprocesses", None):
        multiprocessing.set_forkserver_preload(PRELOADED)
        multiprocessing.forkserver.ensure_running()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {file: place - len(LONGEST) for place, file in enumerate(LONGEST)} | {ONE_BY_ONE: 1}
    items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], 0))


@pytest.hookimpl(optionalhook=True)  # without xdist there is nothing to schedule
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler.loadscope import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return nodeid if file == ONE_BY_ONE else file

    if config.getvalue("dist") != "loadfile":
        return None
    config.option.loadscopereorder = False
    return ByFile(config, log)


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[Callable[[int], RankPool]]:
    """`rank_pool(world_size)`: new ranks every time; those of the call before end."""
    pools: list[RankPool] = []

    def pool(world_size: int) -> RankPool:
        while pools:
            pools.pop().close()
        pools.append(RankPool(world_size))
        return pools[-1]

    yield pool
    while pools:
        pools.pop().close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """`small_disk(options)`: a file system in memory that a test can fill, with mount's options; needs root."""
    disk = tmp_path / "small disk"

    def mount(options: str) -> Path:
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"mount: {done.stderr.strip()}")
        return disk

    yield mount
    if disk.is_mount():
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.fixture(scope="module")
def warm_venv(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An environment whose Python programs have everything imported (tests/processes.py)."""
    with warm_environment(tmp_path_factory.mktemp("warm")) as venv:
        yield venv
