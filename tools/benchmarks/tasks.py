"""Two labels in one MMoE beside two single-task models, on made-up data whose probabilities are known.

Both labels are drawn with known probabilities from planted interactions (data/sources/planted.py); the second one's
logit is `correlation` x the first one's and an independent rest. All models see the same examples; rates, weight decay
and epochs are each one's own, chosen on validation (docs/results/tasks.md).

    excess     of a label: what a model loses above the true probabilities in expectation over the labels, the mean of
               KL(true || predicted) over the rows of the test split; of a model: the mean over both labels
    compute    training FLOP/example of the model of both labels over the sum of the two single-task models'
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
from numpy.typing import NDArray

from megarec.config.load import load_config
from megarec.data.schema import CategoricalFeature, Schema, made_up, save_schema
from megarec.data.sources.planted import Planted, Shape, log_loss
from megarec.data.writing import SplitWriter, write_dataset
from megarec.evaluation.opened import open_model
from megarec.training.trainer import train

LABELS = ("a", "b")
SEEDS = (11, 12, 13)  # not that of the choice
BATCH = 512
SHAPE = Shape(examples=200_000, features=10, rows=8, order=3, groups=6, seed=11)
CORRELATION = 0.7
ROWS = {"train": 80_000, "valid": 20_000, "test": 100_000}


@dataclass(frozen=True)
class Setting:
    """A model, and what training it takes.

    Attributes:
        rate, embedding_rate: of AdamW and of the tables' rowwise Adagrad; both fall linearly to 0.
    """

    model: dict[str, Any]
    rate: float
    embedding_rate: float
    weight_decay: float
    epochs: int


DNN = {"name": "dnn", "dim": 8}
SINGLE = Setting(DNN | {"head": [128, 128]}, 0.012, 0.1, 0.75, 20)  # chosen for each label: the same
BOTH = {
    "mmoe": Setting(
        DNN | {"head": [16], "tasks": {"name": "mmoe", "experts": 2, "expert": [88, 72]}}, 0.008, 0.1, 0.6, 20
    ),
}
AIMS = {"compute": "at most 0.6", "excess": "at most 1.03"}


def run() -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="megarec-tasks-") as name:
        directory = Path(name)
        true = prepare(directory / "data")
        for seed in SEEDS:
            own = list(rows_of(directory, seed, true))
            print("\n".join(map(str, own)), file=sys.stderr, flush=True)
            rows += own
    ratios: dict[str, float] = {}
    for model in BOTH:
        of_seed = [
            {r["model"]: r for r in rows if r["seed"] == seed and r["model"] in (model, "two single")} for seed in SEEDS
        ]
        for key, ratio in (("mflop", "compute"), ("excess", "excess")):
            means = (statistics.mean(own[which][key] for own in of_seed) for which in (model, "two single"))
            ratios[f"{model}: {ratio}"] = next(means) / next(means)
        ratios[f"{model}: excess, deviation over seeds"] = statistics.stdev(
            own[model]["excess"] / own["two single"]["excess"] for own in of_seed
        )
    aims = {f"{model}: {ratio}": aim for model in BOTH for ratio, aim in AIMS.items()}
    return {"name": "tasks", "rows": rows, "ratios": ratios, "aims": aims}


def rows_of(directory: Path, seed: int, true: NDArray[np.float64]) -> Iterator[dict[str, Any]]:
    """The single-task models, then those of both labels."""
    found = [trained(directory, seed, [label], SINGLE, true[:, [k]]) for k, label in enumerate(LABELS)]
    yield row("two single", seed, [own for above, _ in found for own in above], sum(gflop for _, gflop in found))
    for model, setting in BOTH.items():
        yield row(model, seed, *trained(directory, seed, list(LABELS), setting, true))


def row(model: str, seed: int, above: list[float], gflop: float) -> dict[str, Any]:
    by_label = {f"excess_{label}": value for label, value in zip(LABELS, above, strict=True)}
    return {"model": model, "seed": seed, "mflop": 1e3 * gflop, **by_label, "excess": statistics.mean(above)}


def trained(
    directory: Path, seed: int, labels: list[str], setting: Setting, true: NDArray[np.float64]
) -> tuple[list[float], float]:
    """The excess of each label, and training GFLOP/example, of a run whose last weights are kept.

    Args:
        true: logits [rows of the test split, labels].
    """
    steps = setting.epochs * (ROWS["train"] // BATCH)
    output = directory / "run"
    config = {
        "model": setting.model,
        "data": {
            "path": str(directory / "data"), "batch_size": BATCH, "label": labels if len(labels) > 1 else labels[0],
        },
        "embedding": {"learning_rate": setting.embedding_rate},
        "dense": {"learning_rate": setting.rate, "weight_decay": setting.weight_decay},
        "schedule": {"decay": "linear"},
        "train": {
            "seed": seed, "epochs": setting.epochs, "evaluate_every": steps, "log_every": steps,
            "output_dir": str(output),
        },
    }  # fmt: skip
    path = directory / "run.json"
    path.write_text(json.dumps(config))
    with contextlib.redirect_stdout(sys.stderr):
        metrics = train(load_config(path), resume=False, started=time.time())
        logits, _ = open_model(output, None, "test", None).score(None)
    found: NDArray[np.float64] = logits.reshape(len(logits), -1).astype(np.float64)
    probabilities = 1 / (1 + np.exp(-true))
    above = log_loss(found, probabilities) - log_loss(true, probabilities)
    return above.mean(axis=0).tolist(), metrics["train"]["gflop_per_example"]


def prepare(output: Path) -> NDArray[np.float64]:
    """Write the data; returns the true logits of the test split, [rows, labels]."""
    first, rest = Planted(SHAPE), Planted(dataclasses.replace(SHAPE, seed=SHAPE.seed + 1))
    names = [f"f{index:02d}" for index in range(SHAPE.features)]
    true: dict[str, NDArray[np.float64]] = {}

    def write(directory: Path) -> Schema:
        for number, (split, count) in enumerate(ROWS.items()):
            random = np.random.default_rng([SHAPE.seed, number])
            ids = random.integers(0, SHAPE.rows, (count, SHAPE.features))
            a = first.logits(ids)
            b = CORRELATION * a + np.sqrt(1 - CORRELATION**2) * rest.logits(ids)
            true[split] = np.stack([a, b], axis=1)
            drawn = random.random((count, 2)) < 1 / (1 + np.exp(-true[split]))
            labels = {label: pa.array(y.astype(np.int8)) for label, y in zip(LABELS, drawn.T, strict=True)}
            with SplitWriter(directory / split) as writer:
                writer.write(pa.table({name: pa.array(ids[:, place]) for place, name in enumerate(names)} | labels))
        categorical = tuple(CategoricalFeature(name=name, rows=SHAPE.rows) for name in names)
        schema = Schema(
            name="two planted labels",
            label=LABELS[0],
            labels=LABELS,
            categorical=categorical,
            identity=made_up(categorical, (), SHAPE.seed, "two labels"),
            rows=ROWS,
            source=f"synthetic (made up, seed {SHAPE.seed}): two labels of planted interactions",
        )
        save_schema(schema, directory)
        return schema

    write_dataset(output, write)
    return true["test"]
