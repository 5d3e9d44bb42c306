"""Files of Criteo's format go end to end: prepared by one command, trained by the configs that are shipped for them."""

import gzip
import json
import os
from pathlib import Path

import pytest

from megarec.data.sources.criteo import write_made_up
from megarec.distributed.rendezvous import free_port
from tests.processes import python

ROOT = Path(__file__).parents[3]
SMALL = (
    "data.batch_size=128",
    "model.dim=8",
    "model.mlp=[32]",
    "model.head=[32]",
    "model.numeric_mlp=[32]",
    "train.max_steps=20",
)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up files: Kaggle's one, and three days, one of them compressed, as Terabyte's are."""
    directory = tmp_path_factory.mktemp("raw")
    write_made_up(directory / "train.txt", 5000, seed=1, most_values=300)
    for day, rows in enumerate((2600, 400, 400)):
        write_made_up(directory / f"day_{day}", rows, seed=2 + day, most_values=300)
    packed = directory / "day_1"
    (directory / "day_1.gz").write_bytes(gzip.compress(packed.read_bytes()))
    packed.unlink()
    return directory


@pytest.mark.parametrize(
    ("config", "files", "rows"),
    [
        ("criteo-kaggle", "--data train.txt", 5000),
        ("criteo-terabyte", "--train day_0 --valid day_1.gz --test day_2", 3400),
    ],
)
def test_from_raw_files_to_a_trained_run(config: str, files: str, rows: int, raw: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "run"
    words = [word if word.startswith("--") else raw / word for word in files.split()]
    done = python(ROOT / "tools/prepare_data.py", "criteo", "--min-count", 2, "--output", data, *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert sum(json.loads((data / "schema.json").read_text())["rows"].values()) == rows
    overrides = [*SMALL, f"data.path={data}", f"train.output_dir={out}"]
    done = python(
        *(ROOT / "launch/train.py", "--config", ROOT / f"ds_configs/{config}.json"),
        *(word for override in overrides for word in ("--set", override)),
        env=os.environ | {"MASTER_PORT": str(free_port())},
    )
    assert done.returncode == 0, done.stderr
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["test"]["auc"] > 0.5
