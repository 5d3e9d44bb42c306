"""Runs by the recipe of public benchmarks: BatchNorm, averaged weights, drops on a plateau, an end at the second."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megarec.checkpoint.format import read_index
from megarec.checkpoint.offline import AVERAGES, export, locate
from megarec.config.load import load_config
from megarec.data.loader import EvalLoader
from megarec.data.schema import load_schema
from megarec.data.sources.synthetic import Shape, prepare_synthetic
from megarec.data.store import open_split
from megarec.distributed.rank_pool import RankPool
from megarec.errors import UserError
from megarec.run.metrics import Predictions
from megarec.serving.predictor import Predictor, load_checkpoint, load_model
from megarec.training.trainer import train
from tests.logged import logged_lines

Pools = Callable[[int], RankPool]
RECIPE: dict[str, dict[str, Any]] = {
    "model": {"name": "dnn", "dim": 8, "head": [16, 8], "norm": "batch", "dropout": 0.1},
    "embedding": {
        "learning_rate": 0.1,
        "l2": {"weight": 0.01, "rows": "all", "coupled": False},
        "tables": {"single_1": {"l2": {"weight": 1e-4, "rows": "all"}}},
    },
    "dense": {"learning_rate": 0.03, "optimizer": "adam", "weight_decay": 1e-4},
    "schedule": {"plateau_patience": 1, "plateau_factor": 0.1},
    "train": {"epochs": 30, "early_stopping": 2, "best_by": "auc", "label_smoothing": 0.05, "ema": {"decay": 0.9}},
    "deepspeed": {"zero_optimization": {"stage": 2}},
}
Outcome = tuple[dict[str, Any], list[str]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "data"
    prepare_synthetic(Shape(examples=1_000, seed=2), path)  # 800 train, 100 valid, 100 test
    return path


def written(directory: Path, data: Path, name: str) -> Path:
    run = RECIPE | {"data": {"path": str(data), "batch_size": 100}}
    run["train"] = RECIPE["train"] | {"output_dir": str(directory / name)}
    path = directory / f"{name}.json"
    path.write_text(json.dumps(run))
    return path


def run_on_a_rank(path: Path, overrides: list[str], resume: bool) -> Outcome:
    logged = logged_lines()
    return train(load_config(path, overrides), resume=resume, started=time.time()), logged


def auc_of(model: Predictor, data: Path) -> float:
    """AUC of the test split."""
    schema = load_schema(data)
    store = open_split(data, "test", schema, "error")
    rows = EvalLoader(store, schema, batch_size=64, rank=0, world_size=1, seed=1, prefetch=1, pin_memory=False)
    predictions = Predictions()
    for batch in rows.batches():
        predictions.add(model.predict(batch), batch.labels, batch.valid)
    return predictions.gather(None).auc


@pytest.fixture(scope="module")
def whole(rank_pool: Pools, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    directory = tmp_path_factory.mktemp("whole")
    return directory / "whole", rank_pool(2).run(run_on_a_rank, written(directory, data, "whole"), [], False)[0]


def test_the_rate_drops_at_the_first_plateau_and_the_run_ends_at_the_second(whole: tuple[Path, Outcome]) -> None:
    _, (metrics, logged) = whole
    validations = [line for line in logged if line.startswith("valid at step")][:-1]  # the last one is the best again
    assert not validations[-1].endswith("(best)") and not validations[-2].endswith("(best)")
    assert validations[-3].endswith("(best)")
    drops = [line for line in logged if line == "validation does not improve: learning rates x 0.1"]
    assert len(drops) == sum(not line.endswith("(best)") for line in validations)
    assert "stopping early: 2 validations without improvement" in logged
    assert metrics["step"] == 8 * (len(validations) - 2) < 30 * 8


@pytest.mark.parametrize("before_end", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_resumed_run_is_the_same_to_the_last_bit(
    whole: tuple[Path, Outcome], before_end: int, rank_pool: Pools, data: Path, tmp_path: Path
) -> None:
    """Stopped behind the first drop, and behind the validation before it."""
    metrics, _ = whole[1]
    stop = metrics["step"] + 8 * (2 - before_end)
    path, pool = written(tmp_path, data, "parts"), rank_pool(2)
    pool.run(run_on_a_rank, path, [f"train.max_steps={stop}"], False)
    again = pool.run(run_on_a_rank, path, [], True)[0][0]
    assert {key: again[key] for key in ("test", "valid", "step")} == {
        key: metrics[key] for key in ("test", "valid", "step")
    }


def test_another_topology_resumes_to_the_same_metrics(
    whole: tuple[Path, Outcome], rank_pool: Pools, data: Path, tmp_path: Path
) -> None:
    metrics, _ = whole[1]
    path = written(tmp_path, data, "parts")
    rank_pool(2).run(run_on_a_rank, path, ["train.max_steps=8"], False)
    others = ["parallel.tensor=2", "deepspeed.zero_optimization.stage=3", "parallel.ranks_per_host=2"]
    again = rank_pool(4).run(run_on_a_rank, path, others, True)[0][0]
    assert again["step"] == metrics["step"]
    assert again["test"]["logloss"] == pytest.approx(metrics["test"]["logloss"], rel=1e-4)


def test_checkpoint_and_export_score_with_the_averages(whole: tuple[Path, Outcome], data: Path, tmp_path: Path) -> None:
    directory, (metrics, _) = whole
    best = locate(directory)
    index = read_index(best)
    averaged = {name for name in index.tensors if name.startswith(AVERAGES)}
    assert {AVERAGES + "table/single_0/weight", AVERAGES + "dense/over_arch.head.norms.0.running_var"} <= averaged
    assert auc_of(load_checkpoint(best), data) == pytest.approx(metrics["test"]["auc"], abs=1e-9)
    export(best, tmp_path / "out")
    assert auc_of(load_model(tmp_path / "out"), data) == pytest.approx(metrics["test"]["auc"], abs=1e-9)


def test_statistics_of_micro_batches_are_refused(data: Path, tmp_path: Path) -> None:
    path = written(tmp_path, data, "refused")
    with pytest.raises(UserError, match="gradient_accumulation_steps=2: its statistics are those of the whole"):
        load_config(path, ["deepspeed.gradient_accumulation_steps=2"])
