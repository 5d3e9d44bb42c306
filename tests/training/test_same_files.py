"""Two runs alike write the same files, byte for byte: nothing in a checkpoint comes from the clock or from chance."""

import hashlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megarec.checkpoint.publish import point
from megarec.config.load import load_config
from megarec.data.sources.synthetic import Shape, prepare_synthetic
from megarec.distributed.process import seed_generators
from megarec.distributed.rank_pool import RankPool
from megarec.training.trainer import train
from tests.checkpoint.runs import TOWER_MODULE, TOWERS, write_run

TOWER_RUN = {"exchange": "tower", "ranks_per_host": 1, "towers": TOWERS}


def train_on_a_rank(path: Path, resume: bool) -> None:
    torch.rand(int(time.time_ns() % 1_000))  # what ran before in a process
    train(load_config(path), resume=resume, started=time.time())


def contents(checkpoints: Path) -> dict[str, str]:
    """The checksum of every file, by its path below the directory of checkpoints."""
    files = (path for path in checkpoints.rglob("*") if path.is_file())
    return {str(path.relative_to(checkpoints)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_equal_runs_write_the_same_checkpoints(rank_pool: Callable[[int], RankPool], tmp_path: Path) -> None:
    prepare_synthetic(Shape(examples=1_000, seed=2), tmp_path / "data")
    wishes = {"max_steps": 8, "checkpoint_every": 2, "log_every": 3, "output_dir": str(tmp_path / "out")}
    path = write_run(tmp_path, tmp_path / "data", train=wishes, tower_module=TOWER_MODULE, parallel=TOWER_RUN)
    pool = rank_pool(2)
    pool.run(train_on_a_rank, path, False)
    pool.run(train_on_a_rank, path, False)
    checkpoints = tmp_path / "out/checkpoints"
    first = contents(tmp_path / "out/previous/checkpoints")
    assert first == contents(checkpoints) and "step-000000008/index.json" in first

    shutil.rmtree(checkpoints / "step-000000008")  # as if it had been killed before
    point(checkpoints, "latest", "step-000000006")
    pool.run(train_on_a_rank, path, True)
    assert contents(checkpoints) == first


def test_seed_and_rank_decide_what_torch_draws() -> None:
    def drawn(seed: int, rank: int) -> float:
        seed_generators(seed, rank)
        return float(torch.rand(()))

    with torch.random.fork_rng():
        assert drawn(1, 0) == drawn(1, 0)
        assert len({drawn(seed, rank) for seed in (0, 1, 2**63 - 1) for rank in (0, 1)}) == 6
