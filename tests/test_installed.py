"""An installed wheel, outside of the checkout: prepare, train on two ranks, export, load the export, predict."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megarec.distributed.rendezvous import free_port

ROOT = Path(__file__).parents[1]
PROGRAMS = Path(sys.executable).parent
PREDICT = """
import json, sys
from pathlib import Path
import megarec, torch
assert Path(megarec.__file__).is_relative_to(sys.argv[1]), megarec.__file__
model = megarec.load_model("exported")
from megarec.data.loader import EvalLoader
from megarec.data.store import open_split
rows = open_split(Path("data"), "test", model.schema, "error")
loader = EvalLoader(rows, model.schema, batch_size=100, rank=0, world_size=1, seed=1, prefetch=0, pin_memory=False)
batch = next(iter(loader.batches()))
print(json.dumps(torch.sigmoid(model.predict(batch)).tolist()))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `pip install` has put the package, without its requirements: they are those of this environment."""
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, ROOT]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return target


def run(installed: Path, work: Path, *words: object) -> str:
    path = f"{installed / 'bin'}:{PROGRAMS}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(installed), "DS_ACCELERATOR": "cpu"}
    ran = subprocess.run([str(w) for w in words], cwd=work, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_data_and_examples_are_inside(installed: Path) -> None:
    assert "wukong-108gflop" in json.loads(run(installed, installed, "megarec", "flops", "--ladder", "--json"))
    for file in ("py.typed", "scaling/published_ladder.csv", "ds_configs/movielens-100k.json"):
        assert (installed / "megarec" / file).exists(), file
    assert not (installed / "megarec/benchmarks").exists() and not (installed / "tools").exists()


def test_from_raw_data_to_a_prediction(installed: Path, tmp_path: Path) -> None:
    run(installed, tmp_path, "megarec", "prepare", "synthetic", "--examples", 2000, "--output", "data")
    example = json.loads((installed / "megarec/ds_configs/movielens-100k.json").read_text())
    config = {
        "model": {**example["model"], "dim": 16},
        "data": {"path": "data", "batch_size": 256},
        "train": {"epochs": 1, "output_dir": "run"},
        "deepspeed": {},
    }
    (tmp_path / "run.json").write_text(json.dumps(config))
    run(
        installed, tmp_path, "deepspeed", "--log_level", "error", "--num_gpus", 2, "--master_port", free_port(),
        "--module", "megarec.train", "--config", "run.json",
    )  # fmt: skip
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    more = ["--resume", "--set", "train.epochs=2"]
    run(installed, tmp_path, "megarec", "launch", "one-host", "--num_gpus", 2, "--config", "run.json", *more)
    assert json.loads((tmp_path / "run/metrics.json").read_text())["train"]["steps"] == 2 * metrics["train"]["steps"]
    assert 0 < json.loads((tmp_path / "run/metrics.json").read_text())["test"]["auc"] < 1
    run(installed, tmp_path, "megarec", "checkpoint", "export", "run/checkpoints/best", "exported")
    predicted = json.loads(run(installed, tmp_path, PROGRAMS / "python", "-c", PREDICT, installed))
    assert len(predicted) == 100 and all(0 < p < 1 for p in predicted)
