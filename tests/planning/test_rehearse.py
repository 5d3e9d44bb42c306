"""A rehearsal's collectives are those of the real job, its FLOPs those that are counted, and mistakes are told."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megarec.config.load import load_config
from megarec.parallel.pool import RankPool
from megarec.parity.run import write_base
from megarec.planning.collectives import CollectiveRecorder, GroupNames
from megarec.training.build import build_run
from megarec.training.clock import Clock
from megarec.training.engine import start_process
from megarec.training.step import train_step

ROOT = Path(__file__).parents[2]
TOPOLOGY = ["parallel.ranks_per_host=2", "parallel.tensor=2", "deepspeed.zero_optimization.stage=3"]
DENSE_GROUPS = {"data", "tensor"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("rehearse"))


def rehearse(base: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    overrides = [part for override in TOPOLOGY for part in ("--set", override)]
    command = [sys.executable, str(ROOT / "tools/rehearse.py"), "--config", str(base), *overrides, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


def real_collectives(path: Path, overrides: list[str], steps: int) -> list[dict[str, Any]]:
    """Runs on every rank of the real job: the collectives of its last step."""
    config = load_config(path, overrides)
    device = start_process(config)
    run = build_run(config, device)
    recorder = CollectiveRecorder(GroupNames(run.topology), lambda messages: None)
    found: list[dict[str, Any]] = []
    with recorder:
        for batch in list(run.train.batches(epoch=0))[:steps]:
            train_step(
                run.engine,
                run.sparse,
                batch.to(device),
                world_size=run.topology.world_size,
                l2=config.embedding.l2,
                clock=Clock(device),
            )
            found = recorder.take()
    return found


def of_dense_side(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those whose size does not depend on the ids of the batch."""
    return sorted((row for row in rows if row["group"] in DENSE_GROUPS), key=str)


def test_collectives_and_flops_are_those_of_the_real_job(base: Path, rank_pool: Callable[[int], RankPool]) -> None:
    run = rehearse(base, "--hosts", "2", "--ranks-per-host", "2", "--rank", "1", "--json")
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["flop"]["executed"] == pytest.approx(result["flop"]["counted"], rel=0.03)
    states = "model_states"
    assert result["peak_bytes"][states] == pytest.approx(result["predicted_bytes"][states], rel=0.05)
    real = rank_pool(4).run(real_collectives, base, TOPOLOGY, 3)[1]
    assert of_dense_side(real)
    assert of_dense_side(result["collectives"]) == of_dense_side(real)
    sparse = {(row["group"], row["op"], row["dtype"], row["calls"]) for row in real if row["group"] == "world"}
    assert sparse == {
        (row["group"], row["op"], row["dtype"], row["calls"])
        for row in result["collectives"]
        if row["group"] == "world"
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--hosts", "2", "--ranks-per-host", "2", "--rank", "4"], "--rank 4"),
        (["--hosts", "0", "--ranks-per-host", "2"], "--hosts 0"),
        (["--hosts", "3", "--ranks-per-host", "2"], "data.batch_size=64 does not divide"),
        (["--hosts", "2", "--ranks-per-host", "1"], "make them equal"),
    ],
)
def test_mistakes_exit_2_with_one_line(base: Path, arguments: list[str], words: str) -> None:
    run = rehearse(base, *arguments)
    assert run.returncode == 2
    assert words in run.stderr and len(run.stderr.strip().splitlines()) == 1
