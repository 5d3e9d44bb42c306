"""Small runs of every model, raw rows for them, and what the trainer's own model says of these rows."""

import csv
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from megarec.checkpoint.offline import locate
from megarec.data.loader import EvalLoader
from megarec.data.preparation.prepare import MaxBad, prepare_table
from megarec.data.schema import load_schema
from megarec.data.store import open_split
from megarec.distributed.rank_pool import RankPool
from megarec.serving.predictor import load_checkpoint
from tests.checkpoint.runs import TOWER_MODULE, TOWERS, leg, write_run

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
    "dnn, BatchNorm": {"model": {"name": "dnn", "norm": "batch"}},
    "wukong, fp16 weights": {"model": WUKONG, "embedding": {"weights": "fp16"}},
}
OF_TABLE = "wukong, columns of every type"  # its rows are those of `prepare_columns`, the others' are made up
RUNS |= {OF_TABLE: {"model": WUKONG, "embedding": {"features": {"seen": {"embeddings": 2}}}}}
COLUMNS = {
    "text": {"type": "categorical", "min_count": 2},
    "whole": {"type": "categorical", "dtype": "integer"},
    "hex": {"type": "categorical", "dtype": "hexadecimal"},
    "hashed": {"type": "categorical", "hash": 50},
    "many": {"type": "multi_valued", "dtype": "integer", "table": "whole", "separator": " "},
    "seen": {"type": "sequence", "max_length": 3, "newest": "last", "pooling": "mean"},
    "how": {"type": "weights", "of": "seen"},
    "age": {"type": "bucketised", "buckets": 4},
    "height": {"type": "numeric", "standardise": True, "missing": 1.5},
    "spent": {"type": "numeric", "log": True, "missing": 0},
    "vector": {"type": "vector", "length": 2, "separator": ";", "missing": 0},
    "when": {"type": "calendar", "format": "%Y-%m-%d %H:%M"},
    "label": {"type": "label"},
}


def write_columns(path: Path, rows: int) -> None:
    """A CSV with all of COLUMNS, a tenth of the values missing."""
    random = np.random.default_rng(5)

    def listed(values: Any, separator: str) -> str:
        return separator.join(map(str, values))

    with path.open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(COLUMNS)
        for _ in range(rows):
            seen = int(random.integers(5))
            values = [
                f"t{random.integers(30)}",
                random.integers(-5, 20),
                f"{random.integers(1 << 40):x}",
                f"h{random.integers(200)}",
                listed(random.integers(-5, 20, random.integers(4)), " "),
                listed((f"s{n}" for n in random.integers(25, size=seen)), "|"),
                listed(random.random(seen).round(3), "|"),
                round(float(random.normal(40, 10)), 1),
                round(float(random.normal()), 4),
                round(float(random.exponential(100)), 2),
                listed(random.random(2).round(3), ";"),
                f"2026-0{random.integers(1, 10)}-1{random.integers(10)} {random.integers(24)}:{random.integers(60)}",
            ]
            missing = random.random(len(values)) < 0.1
            missing[5] = missing[6] = False  # as many weights as values
            lines.writerow([*("" if gone else value for gone, value in zip(missing, values, strict=True)), seen % 2])


def prepare_columns(directory: Path) -> Path:
    """A data set prepared from three files of COLUMNS."""
    directory.mkdir()
    (directory / "spec.json").write_text(json.dumps({"name": "columns", "columns": COLUMNS}))
    for split, rows in (("train", 320), ("valid", 80), ("test", 100)):
        write_columns(directory / f"{split}.csv", rows)
    splits = {split: [directory / f"{split}.csv"] for split in ("train", "valid", "test")}
    prepare_table(directory / "spec.json", splits, directory / "data", workers=1, max_bad=MaxBad())
    return directory / "data"


def train(name: str, data: Path, directory: Path, pool: RankPool) -> Path:
    """The checkpoint of a run that took three steps, small ones: logits stay those of real models."""
    path = write_run(directory, data)
    run = json.loads(path.read_text())
    run["dense"]["learning_rate"], run["embedding"]["learning_rate"] = 0.001, 0.02
    sections = RUNS[name] | {"model": SIZES | RUNS[name]["model"]}
    run |= {key: run.get(key, {}) | section if key != "model" else section for key, section in sections.items()}
    path.write_text(json.dumps(run))
    pool.run(partial(leg, load=False, save=True), path, [], 0, 3)
    return locate(path.parent / "out" / "checkpoints/latest")


def raw_rows(data: Path, split: str = "test") -> list[dict[str, Any]]:
    """Rows of made-up data: these keep their values; of COLUMNS those of the file."""
    if (file := data.parent / f"{split}.csv").is_file():
        with file.open(newline="") as opened:
            return list(csv.DictReader(opened))
    return pq.read_table(data / split).to_pylist()


def trainer_logits(checkpoint: Path, data: Path, tables: str = "fp32") -> np.ndarray:
    """What the run's own evaluation computes for the test split.

    Args:
        tables: fp16: with every embedding rounded to the nearest float16.
    """
    schema = load_schema(data)
    store = open_split(data, "test", schema, "error")
    rows = EvalLoader(store, schema, batch_size=64, rank=0, world_size=1, seed=1, prefetch=1, pin_memory=False)
    model = load_checkpoint(checkpoint)
    if tables == "fp16":
        with torch.no_grad():
            for name, (_, tensor) in model._sparse.state().items():
                if name.endswith("/weight"):
                    tensor.copy_(tensor.half())
    return np.concatenate([model.predict(batch)[: batch.valid].numpy() for batch in rows.batches()])
