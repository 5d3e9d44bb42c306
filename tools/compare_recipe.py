"""FuxiCTR's recipe in plain torch beside its translation, over some seeds: do they agree within the noise of seeds?

python tools/compare_recipe.py                                          # ten categorical fields, made up
python tools/compare_recipe.py --data data/movielens-1m --seeds 5 --json

The recipes (DNN and DCNv2 with BatchNorm, dropout, L2 on all rows of the tables, rates that drop on a plateau) are
YAMLs as FuxiCTR has them; tools/import_recipe.py's own code turns them into runs, `prepare_data.py table` prepares
the made-up CSV. The plain side is tools/benchmarks/recipe_plain.py, which shares nothing with megarec but the ids.
"""

import argparse
import csv
import json
import logging
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import yaml
from scipy import stats

from megarec.config.load import load_config
from megarec.errors import ArgumentParser, UserError, exits_cleanly
from megarec.recipes.fuxictr import read_experiment, translate
from megarec.recipes.fuxictr_data import read_data_set
from tools.benchmarks import recipe_plain

ROOT = Path(__file__).resolve().parent.parent
COMMON: dict[str, Any] = {
    "dataset_id": "made_up",
    "loss": "binary_crossentropy",
    "optimizer": "adam",
    "learning_rate": 1e-3,
    "embedding_dim": 10,
    "net_dropout": 0.2,
    "batch_norm": True,
    "epochs": 100,
    "early_stop_patience": 2,
    "monitor": "AUC",
    "monitor_mode": "max",
}
EXPERIMENTS: dict[str, dict[str, Any]] = {
    "DNN": {"model": "DNN", "hidden_units": [128, 128]},
    "DCNv2": {
        "model": "DCNv2",
        "model_structure": "parallel",
        "num_cross_layers": 3,
        "parallel_dnn_hidden_units": [128, 128],
    },
}
FIELDS = {  # ten, of the sizes of a public set
    "user": 950,
    "item": 4_000,
    "daytime": 7,
    "weekday": 7,
    "isweekend": 2,
    "place": 3,
    "cost": 2,
    "weather": 9,
    "country": 80,
    "city": 230,
}
ROWS = 60_000
FACTORS = 6
METRICS = ("auc", "logloss")


def write_made_up(path: Path, seed: int = 1) -> None:
    """A CSV of ten categorical fields and a label: biases and products of hidden factors behind a logistic function."""
    rng = np.random.default_rng(seed)
    logit, factors, ids = np.full(ROWS, -1.0), {}, {}
    for name, size in FIELDS.items():
        popularity = 1 / (1 + np.arange(size)) ** 0.8
        ids[name] = rng.choice(size, ROWS, p=popularity / popularity.sum())
        factors[name] = rng.normal(0, 1, (size, FACTORS))
        logit += 0.5 * rng.normal(0, 1, size)[ids[name]]
    for one, other, strength in (("user", "item", 0.9), ("item", "country", 0.4), ("user", "daytime", 0.3)):
        logit += strength * (factors[one][ids[one]] * factors[other][ids[other]]).sum(1) / math.sqrt(FACTORS) * 2
    label = rng.random(ROWS) < 1 / (1 + np.exp(-logit))
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*FIELDS, "label"])
        writer.writerows(zip(*(values.tolist() for values in ids.values()), label.astype(int).tolist(), strict=True))


def write_yamls(directory: Path, weight: float, batch_size: int = 1024) -> None:
    """model_config.yaml and dataset_config.yaml, as a user of FuxiCTR has them."""
    models = {
        name: COMMON | {"embedding_regularizer": weight, "batch_size": batch_size} | own
        for name, own in EXPERIMENTS.items()
    }
    (directory / "model_config.yaml").write_text(yaml.safe_dump(models))
    columns = [{"name": list(FIELDS), "active": True, "dtype": "str", "type": "categorical"}]
    data = {"data_format": "csv", "feature_cols": columns, "label_col": {"name": "label", "dtype": "float"}}
    (directory / "dataset_config.yaml").write_text(yaml.safe_dump({"made_up": data}))


def prepare(directory: Path) -> Path:
    """The made-up CSV through `prepare_data.py table`, by the spec that the translation wrote."""
    write_made_up(directory / "rows.csv")
    spec, target = directory / "spec.json", directory / "data"
    spec.write_text(json.dumps(read_data_set(directory / "dataset_config.yaml", "made_up").spec))
    tool = [sys.executable, str(ROOT / "tools/prepare_data.py"), "table"]
    options = ["--schema", str(spec), "--data", str(directory / "rows.csv"), "--split", "random"]
    shares = ["--fractions", "0.7", "0.2", "0.1", "--output", str(target)]
    subprocess.run([*tool, *options, *shares], check=True, stdout=sys.stderr)
    return target


def translated(directory: Path, name: str, data: Path, table: recipe_plain.Table) -> Path:
    """The run's JSON of one experiment."""
    experiment = read_experiment(directory / "model_config.yaml", name)
    recipe = translate(experiment, table.features, 0, str(data), str(directory / f"run-{name}"))
    recipe.run["data"]["features"] = list(table.features)
    recipe.run["deepspeed"] |= {"tensorboard": {"enabled": False}}
    path = directory / f"{name}.json"
    path.write_text(json.dumps(recipe.run, indent=2))
    return path


def ours(path: Path, seed: int) -> dict[str, float]:
    """Test metrics of the translated run."""
    from megarec.training.trainer import train

    logging.getLogger("megarec").setLevel(logging.ERROR)
    metrics = train(load_config(path, [f"train.seed={seed}"]), resume=False, started=time.time())
    return {key: metrics["test"][key] for key in METRICS}


def summary(name: str, mine: list[dict[str, float]], plain: list[dict[str, float]]) -> list[dict[str, Any]]:
    """By metric: means, deviations, the difference with its 95 % interval (Welch)."""
    rows = []
    for metric in METRICS:
        a, b = [run[metric] for run in mine], [run[metric] for run in plain]
        found = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95) if len(a) > 1 else (math.nan,) * 2
        rows.append(
            {
                "model": name,
                "metric": metric,
                "ours": statistics.fmean(a),
                "ours_std": statistics.stdev(a) if len(a) > 1 else math.nan,
                "plain": statistics.fmean(b),
                "plain_std": statistics.stdev(b) if len(b) > 1 else math.nan,
                "difference": statistics.fmean(a) - statistics.fmean(b),
                "low": float(found[0]),
                "high": float(found[1]),
            }
        )
    return rows


@exits_cleanly
def main() -> None:
    arguments = _parser().parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        write_yamls(directory, arguments.l2, arguments.batch_size)
        data = prepare(directory) if arguments.data is None else arguments.data.resolve()
        if not (data / "schema.json").is_file():
            raise UserError(f"{data}: holds no schema.json; expected a data set that prepare_data.py wrote")
        table = recipe_plain.read(data)
        rows: list[dict[str, Any]] = []
        for name in arguments.models:
            recipe = yaml.safe_load((directory / "model_config.yaml").read_text())[name]
            path, mine, plain = translated(directory, name, data, table), [], []
            for seed in range(1, arguments.seeds + 1):
                mine.append(ours(path, seed))
                plain.append(recipe_plain.train(recipe, table, seed))
                print(f"{name} seed {seed}: ours {mine[-1]}  plain {plain[-1]}", file=sys.stderr, flush=True)
            rows += summary(name, mine, plain)
    if arguments.json:
        print(json.dumps({"name": "recipes", "data": str(arguments.data or "made up"), "rows": rows}))
        return
    for row in rows:
        print(
            f"{row['model']:6} {row['metric']:8} ours {row['ours']:.5f} ± {row['ours_std']:.5f}  "
            f"plain {row['plain']:.5f} ± {row['plain_std']:.5f}  "
            f"difference {row['difference']:+.5f} ({row['low']:+.5f} to {row['high']:+.5f})"
        )


def _parser() -> ArgumentParser:
    parser = ArgumentParser(description="FuxiCTR's recipes in plain torch beside their translation.")
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", help="a prepared data set (default: ten fields, made up)")
    add("--models", nargs="+", choices=list(EXPERIMENTS), default=list(EXPERIMENTS), help="default: both")
    add("--l2", type=float, default=0.05, metavar="WEIGHT", help="embedding_regularizer (default: 0.05)")
    add("--batch-size", type=_positive, default=1024, metavar="N", help="default: 1024")
    add("--seeds", type=_positive, default=5, help="runs of each (default: 5)")
    add("--json", action="store_true", help="one JSON object on standard output")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1_000_000:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 1 to 1000000")
    return int(text)


if __name__ == "__main__":
    main()
