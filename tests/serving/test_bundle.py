"""Every model leaves the trainer: raw rows scored by numpy and onnxruntime have the trainer's logits."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from megarec.checkpoint.offline import locate
from megarec.data.loader import EvalLoader
from megarec.data.schema import load_schema
from megarec.data.sources.synthetic import Shape, prepare_synthetic
from megarec.data.store import open_split
from megarec.distributed.rank_pool import RankPool
from megarec.serving.export.bundle import export_bundle
from megarec.serving.predictor import load_checkpoint
from megarec.serving.scorer import Scorer
from tests.checkpoint.runs import TOWER_MODULE, TOWERS, leg, write_run

pytest.importorskip("onnxruntime", reason="the extra 'export' is not installed")
pytest.importorskip("onnxscript", reason="the extra 'export' is not installed")

Pools = Callable[[int], RankPool]
SIZES = {"dim": 8, "numeric_embeddings": 2, "numeric_mlp": [8]}
WUKONG = {"name": "wukong", "layers": 2, "num_fm": 2, "num_lcb": 2, "rank": 4, "mlp": [16], "head": [8], "dropout": 0.1}
TOWER = {"parallel": {"towers": TOWERS}}
RUNS: dict[str, dict[str, Any]] = {
    "wukong": {"model": WUKONG},
    "wukong, attentive": {"model": WUKONG | {"projection": "attentive", "attentive": {"compressed": 2, "mlp": [8]}}},
    "wukong, full": {"model": WUKONG | {"fm": "full"}},
    **{
        name: {"model": {"name": name}}
        for name in ["dlrm", "dcn", "lr", "fm", "dnn", "deepfm", "xdeepfm", "autoint", "masknet", "finalmlp", "afn"]
    },
    "wukong, wukong towers": {"model": WUKONG, "tower_module": TOWER_MODULE, **TOWER},
    "dlrm, dlrm towers": {"model": {"name": "dlrm"}, "tower_module": {"name": "dlrm", "compression": 2}, **TOWER},
    "dcn, dcn towers": {"model": {"name": "dcn"}, "tower_module": {"name": "dcn", "compression": 2}, **TOWER},
    "dcn, towers without modules": {"model": {"name": "dcn"}, **TOWER},
    "wukong, several and small embeddings": {
        "model": WUKONG,
        "embedding": {"features": {"single_1": {"embeddings": 2}, "single_2": {"width": 4}, "single_3": {"width": 4}}},
    },
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data"
    prepare_synthetic(Shape(examples=400, numeric=3, seed=3), path)
    return path


@pytest.fixture(scope="module")
def trained(rank_pool: Pools, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint of a run that took three steps."""
    known: dict[str, Path] = {}

    def train(name: str) -> Path:
        if name not in known:
            path = write_run(tmp_path_factory.mktemp("run"), data)
            run = json.loads(path.read_text())
            sections = RUNS[name] | {"model": SIZES | RUNS[name]["model"]}
            run |= {key: run.get(key, {}) | section if key != "model" else section for key, section in sections.items()}
            path.write_text(json.dumps(run))
            rank_pool(1).run(partial(leg, load=False, save=True), path, [], 0, 3)
            known[name] = locate(path.parent / "out" / "checkpoints/latest")
        return known[name]

    return train


def raw_rows(data: Path, split: str = "test") -> list[dict[str, Any]]:
    return pq.read_table(data / split).to_pylist()


def trainer_logits(checkpoint: Path, data: Path) -> np.ndarray:
    """What the run's own evaluation computes for the test split."""
    schema = load_schema(data)
    store = open_split(data, "test", schema, "error")
    rows = EvalLoader(store, schema, batch_size=64, rank=0, world_size=1, seed=1, prefetch=1, pin_memory=False)
    model = load_checkpoint(checkpoint)
    return np.concatenate([model.predict(batch)[: batch.valid].numpy() for batch in rows.batches()])


def batches(rows: list[dict[str, Any]], sizes: tuple[int, ...]) -> Iterator[list[dict[str, Any]]]:
    for size in sizes:
        yield [rows[place % len(rows)] for place in range(size)]


@pytest.mark.parametrize("name", RUNS)
def test_raw_rows_have_the_logits_of_the_trainer(
    name: str, trained: Callable[[str], Path], data: Path, tmp_path: Path
) -> None:
    checkpoint = trained(name)
    export_bundle(checkpoint, tmp_path / "out")
    scorer, expected, rows = Scorer(tmp_path / "out"), trainer_logits(checkpoint, data), raw_rows(data)
    assert expected.std() > 1e-3
    for batch in batches(rows, (1, 7, len(rows), 9_000)):
        found = scorer.score(batch)
        wanted = expected[np.arange(len(batch)) % len(rows)]
        assert not found.errors and np.abs(found.logits - wanted).max() <= 1e-5
        assert found.probabilities == pytest.approx(1 / (1 + np.exp(-wanted.astype(np.float64))), abs=1e-5)
