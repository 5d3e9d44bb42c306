"""Two labels in one MMoE beside two single-task models, on made-up data whose Bayes LogLoss is known.

Both labels are drawn with known probabilities from planted interactions (data/sources/planted.py); the second one's
logit is `correlation` x the first one's and an independent rest. Excess is LogLoss on the test split above what the
true probabilities lose on the labels that were drawn, the mean over both labels. All models see the same examples.

    compute    training FLOP/example of the model of both labels over the sum of the two single-task models'
    excess     its excess over the single-task models'
"""

import contextlib
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from megarec.config.load import load_config
from megarec.data.schema import CategoricalFeature, Schema, made_up, save_schema
from megarec.data.sources.planted import Planted, Shape, log_loss
from megarec.data.sources.synthetic import split_rows
from megarec.data.writing import SplitWriter, write_dataset
from megarec.training.trainer import train

LABELS = ("a", "b")
SEEDS = (1, 2, 3)
EPOCHS, BATCH, DIM = 3, 512, 8


@dataclass(frozen=True)
class Case:
    """Data and models.

    Attributes:
        single: the model of one label.
        models: those of both.
    """

    name: str
    shape: Shape
    correlation: float
    single: dict[str, Any]
    models: dict[str, dict[str, Any]]


DNN = {"name": "dnn", "dim": DIM}
DCN = {"name": "dcn", "dim": DIM, "layers": 2, "rank": None}
CASES = (
    Case(
        "400,000 rows",
        Shape(examples=400_000, features=10, rows=8, order=3, groups=6, seed=11),
        0.7,
        DNN | {"head": [128, 128]},
        {
            "mmoe": DNN | {"head": [16], "tasks": {"name": "mmoe", "experts": 2, "expert": [96, 64]}},
            "shared": DNN | {"head": [96, 80], "tasks": {"name": "shared"}},
        },
    ),
    Case(
        "100,000 rows",
        Shape(examples=100_000, features=10, rows=8, order=2, groups=6, seed=11),
        0.8,
        DCN | {"head": [64]},
        {"mmoe": DCN | {"head": [], "tasks": {"name": "mmoe", "experts": 2, "expert": [40, 24]}}},
    ),
)
AIMS = {"compute": "at most 0.6", "excess": "at most 1.03"}


def run() -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for case in CASES:
        with tempfile.TemporaryDirectory(prefix="megarec-tasks-") as name:
            directory = Path(name)
            optimum = prepare(directory / "data", case)
            for seed in SEEDS:
                own = list(rows_of(directory, case, seed, optimum))
                print("\n".join(map(str, own)), file=sys.stderr, flush=True)
                rows += own
    ratios: dict[str, float] = {}
    for case in CASES:
        for key, ratio in (("mflop", "compute"), ("excess", "excess")):
            mean = {
                model: statistics.mean(r[key] for r in rows if (r["case"], r["model"]) == (case.name, model))
                for model in ("two single", *case.models)
            }
            ratios |= {f"{case.name}, {model}: {ratio}": mean[model] / mean["two single"] for model in case.models}
    return {"name": "tasks", "rows": rows, "ratios": ratios, "aims": {key: AIMS[key.split(": ")[1]] for key in ratios}}


def rows_of(directory: Path, case: Case, seed: int, optimum: list[float]) -> Iterator[dict[str, Any]]:
    """The single-task models, then those of both labels."""
    singles = [trained(directory, seed, label, case.single) for label in LABELS]
    flop = sum(metrics["train"]["gflop_per_example"] for metrics in singles)
    yield {"case": case.name} | row("two single", seed, [m["test"]["logloss"] for m in singles], optimum, flop)
    for model, sizes in case.models.items():
        metrics = trained(directory, seed, list(LABELS), sizes)
        losses = [metrics["test"]["labels"][label]["logloss"] for label in LABELS]
        yield {"case": case.name} | row(model, seed, losses, optimum, metrics["train"]["gflop_per_example"])


def row(model: str, seed: int, losses: list[float], optimum: list[float], gflop: float) -> dict[str, Any]:
    above = [loss - least for loss, least in zip(losses, optimum, strict=True)]
    by_label = {f"excess_{label}": value for label, value in zip(LABELS, above, strict=True)}
    return {"model": model, "seed": seed, "mflop": 1e3 * gflop, **by_label, "excess": statistics.mean(above)}


def trained(directory: Path, seed: int, label: str | list[str], model: dict[str, Any]) -> dict[str, Any]:
    """metrics.json of a run."""
    config = {
        "model": model,
        "data": {"path": str(directory / "data"), "batch_size": BATCH, "label": label},
        "embedding": {"learning_rate": 0.1},
        "dense": {"learning_rate": 2e-3},
        "schedule": {"decay": "linear"},
        "train": {"seed": seed, "epochs": EPOCHS, "log_every": 10_000, "output_dir": str(directory / "run")},
    }
    path = directory / "run.json"
    path.write_text(json.dumps(config))
    with contextlib.redirect_stdout(sys.stderr):
        return train(load_config(path), resume=False, started=time.time())


def prepare(output: Path, case: Case) -> list[float]:
    """Write the data; returns the Bayes LogLoss of each label on the labels of the test split."""
    shape = case.shape
    first, rest = Planted(shape), Planted(dataclasses.replace(shape, seed=shape.seed + 1))
    names = [f"f{index:02d}" for index in range(shape.features)]
    lost: dict[str, list[float]] = {}

    def write(directory: Path) -> Schema:
        rows = split_rows(shape.examples)
        for number, (split, count) in enumerate(rows.items()):
            random = np.random.default_rng([shape.seed, number])
            ids = random.integers(0, shape.rows, (count, shape.features))
            a = first.logits(ids)
            b = case.correlation * a + np.sqrt(1 - case.correlation**2) * rest.logits(ids)
            drawn = [(random.random(count) < 1 / (1 + np.exp(-x))).astype(np.float64) for x in (a, b)]
            lost[split] = [float(log_loss(x, y).mean()) for x, y in zip((a, b), drawn, strict=True)]
            labels = {label: pa.array(y.astype(np.int8)) for label, y in zip(LABELS, drawn, strict=True)}
            with SplitWriter(directory / split) as writer:
                writer.write(pa.table({name: pa.array(ids[:, place]) for place, name in enumerate(names)} | labels))
        categorical = tuple(CategoricalFeature(name=name, rows=shape.rows) for name in names)
        schema = Schema(
            name="two planted labels",
            label=LABELS[0],
            labels=LABELS,
            categorical=categorical,
            identity=made_up(categorical, (), shape.seed, "two labels"),
            rows=rows,
            source=f"synthetic (made up, seed {shape.seed}): two labels of planted interactions",
        )
        save_schema(schema, directory)
        return schema

    write_dataset(output, write)
    return lost["test"]
