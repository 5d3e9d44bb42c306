"""The shipped ladder: every file loads, counts what the docs say, and divides over 128 and 256 ranks in hosts of 8."""

import csv
from pathlib import Path

import pytest

from megarec.config.deepspeed import micro_batch_size
from megarec.config.load import load_config
from megarec.config.models import WukongConfig
from megarec.data.schema import read_schema, schema_of
from megarec.models.wukong import layer_sizes
from megarec.run.spec import resolve
from megarec.scaling.ladder import LADDER as PUBLISHED
from megarec.scaling.stand_in import as_json, ladder_schema

ROOT = Path(__file__).parents[2]
DOCS = "".join((ROOT / "docs" / page).read_text(encoding="utf-8") for page in ("ladder.md", "results/ladder.md"))
# published GFLOP/example -> our count, dense parameters, l, n_F = n_L, k, width of the MLP's three layers
ROWS = {
    "0.53": (0.496, 74_300_577, 2, 8, 24, 2048),
    "1.25": (1.027, 152_258_937, 4, 32, 24, 2048),
    "2.12": (1.575, 240_412_281, 8, 32, 24, 2048),
    "5.6": (5.278, 836_946_785, 8, 48, 48, 4096),
    "22.23": (23.381, 3_780_726_977, 8, 96, 96, 8192),
    "61": (58.502, 9_634_336_961, 8, 96, 96, 16384),
    "108": (117.281, 19_191_573_377, 8, 192, 192, 16384),
}
SMALL = {"0.0025": 0.002206, "0.005": 0.004694, "0.01": 0.009671, "0.02": 0.02088, "0.04": 0.04204}


def by_hand(n: int, layers: int, embeddings: int, rank: int, width: int) -> int:
    """Multiply-accumulates of Wukong with an MLP of three layers, d = 160, head 2048."""
    macs = 0
    for _ in range(layers):
        outputs = 2 * embeddings
        macs += 2 * n * rank * 160 + n * rank * width + 2 * width**2 + width * embeddings * 160
        macs += n * embeddings * 160 + (n * outputs * 160 if n != outputs else 0)
        n = outputs
    return macs + n * 160 * 2048 + 2048


@pytest.mark.parametrize("name", ROWS)
def test_a_row_counts_what_the_docs_say(name: str) -> None:
    path = ROOT / f"ds_configs/ladder/wukong-{name}gflop.json"
    config = load_config(path)
    assert config.train.output_dir == f"runs/{path.stem}"
    gflop, dense, *sizes = ROWS[name]
    cost = resolve(config, schema_of(config.data)).cost
    numeric = 6 * 2048 * 32 * 160 + 4 * 64 * 2048  # nothing needs the gradient of the numeric features
    assert cost.flop == 6 * by_hand(723, *sizes) + numeric
    assert cost.flop / 1e9 == pytest.approx(gflop, abs=5e-4)
    assert cost.dense_parameters == dense
    assert cost.sparse_parameters == pytest.approx(627e9, rel=1e-3)
    layers, embeddings, rank, width = sizes
    line = f"| {name} | {layers} | {embeddings} | {rank} | 3 x {width} | {gflop:.3f} | "
    assert line in DOCS


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("ranks", [128, 256])
def test_a_row_divides_over_hosts_of_8(name: str, ranks: int) -> None:
    config = load_config(ROOT / f"ds_configs/ladder/wukong-{name}gflop.json")
    assert config.data.batch_size == 262_144
    assert micro_batch_size(config, ranks) == 262_144 // ranks
    tensor = config.parallel.tensor
    assert tensor == (8 if name in ("22.23", "61", "108") else 1) and 8 % tensor == 0
    assert config.deepspeed["zero_optimization"]["stage"] == 3 and config.deepspeed["bf16"]["enabled"]
    assert ranks // tensor % config.deepspeed["zero_optimization"].get("zero_hpz_partition_size", 1) == 0
    assert isinstance(config.model, WukongConfig)
    for layer in layer_sizes(723, config.model):
        assert all(width % tensor == 0 for width in [*layer.mlp, layer.num_fm * 160])
    assert all(width % tensor == 0 for width in [*config.model.head, *config.model.numeric_mlp])


@pytest.mark.parametrize("name", SMALL)
def test_a_small_row_counts_what_the_docs_say(name: str) -> None:
    path = ROOT / f"ds_configs/ladder/small/movielens-1m-{name}gflop.json"
    config = load_config(path)
    assert config.train.output_dir == f"runs/{path.stem}"
    spec = resolve(config, schema_of(config.data))
    model = spec.sizes
    assert spec.cost.flop / 1e9 == pytest.approx(SMALL[name], rel=5e-4)
    assert isinstance(model, WukongConfig)
    sizes = f"{model.layers} | {model.num_fm} | {model.rank} | 3 x {model.mlp[0]}"
    assert model.num_fm == model.num_lcb and f"| {name} | {sizes} | {SMALL[name]:.4f} | " in DOCS


def test_no_row_without_a_test() -> None:
    folder = ROOT / "ds_configs/ladder"
    assert {path.name for path in folder.glob("*.json")} == {f"wukong-{name}gflop.json" for name in ROWS}
    assert {path.name for path in folder.glob("small/*")} == {f"movielens-1m-{name}gflop.json" for name in SMALL}


def test_the_shipped_schema_is_what_the_generator_writes() -> None:
    path = ROOT / "ds_configs/schemas/wukong-ladder.json"
    command = "python -m megarec.scaling.stand_in > ds_configs/schemas/wukong-ladder.json"
    assert path.read_text(encoding="utf-8") == as_json(ladder_schema()), f"run: {command}"
    assert read_schema(path) == ladder_schema()
    assert "does not disclose" in ladder_schema().source


def test_published_ladder() -> None:
    with PUBLISHED.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["model", "train_gflop_per_example", "relative_logloss_percent"]
    wukong = {
        row["train_gflop_per_example"]: row["relative_logloss_percent"] for row in rows if row["model"] == "wukong"
    }
    assert list(wukong) == list(ROWS)
    assert [float(loss) for loss in wukong.values()] == [-0.35, -0.45, -0.53, -0.60, -0.67, -0.70, -0.76]
    others = {(row["model"], row["train_gflop_per_example"]): row["relative_logloss_percent"] for row in rows[7:]}
    assert others == {
        ("dlrm", "1.37"): "",
        ("dlrm", "3.85"): "",
        ("dlrm", "7.29"): "",
        ("dlrm", "14.61"): "",
        ("dlrm", "31"): "-0.37",
        ("dlrm", "71.2"): "-0.36",
        ("dcnv2", "43.88"): "-0.43",
    }
