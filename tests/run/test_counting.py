"""Counts of shipped configs to the last integer, against sums written out here and published figures."""

import json
import subprocess
from pathlib import Path

import pytest

from megarec.config.load import load_config
from megarec.data.schema import schema_of
from megarec.run.cost import Cost
from megarec.run.spec import resolve
from megarec.scaling.ladder import DLRM_CRITEO, published
from tests.processes import python

ROOT = Path(__file__).parents[2]
CRITEO = ROOT / "ds_configs/dlrm-criteo-terabyte.json"
ROWS = 204_184_588  # 26 features, at most 40 million rows each
BOTTOM = 13 * 512 + 512 * 256 + 256 * 128
DCN = {"name": "dcn", "dim": 128, "numeric_mlp": [512, 256]}


def counted(*overrides: str) -> Cost:
    config = load_config(CRITEO, list(overrides))
    return resolve(config, schema_of(config.data)).cost


def test_dlrm_on_criteo_terabyte() -> None:
    cost = counted()
    top = 479 * 512 + 512 * 512 + 512
    assert cost.sparse_parameters == ROWS * 128 == 26_135_627_264
    assert cost.dense_parameters == BOTTOM + 512 + top + 512 + 512 + 1 == 679_937
    assert cost.parameters == DLRM_CRITEO.parameters == 26_136_307_201
    assert cost.mac == BOTTOM + 27 * 27 * 128 + top
    assert cost.flop == 6 * cost.mac - 2 * 13 * 512 == 4_616_960  # published: 4.62 MFLOP


def test_biases_in_the_bottom_mlps_last_layers_are_not_in_the_published_counts() -> None:
    assert counted("model.numeric_bias=null").parameters - DLRM_CRITEO.parameters == 256 + 128
    # DCNv2 of the same table of the paper, 26,179,364,097: two full-rank cross layers, MLP 4 x 2048
    published_dcn = DCN | {"numeric_bias": [True, False, False], "layers": 2, "rank": None, "head": [2048] * 4}
    assert counted("model=" + json.dumps(published_dcn)).parameters == 26_179_364_097


def test_tower_modules_and_a_narrower_over_arch_behind_them() -> None:
    """Compression 4: two towers of 13 features, each with one map 128 -> 32; the dense model sees 27 vectors of 32."""
    cost = counted("parallel.towers=2", 'tower_module={"name": "dlrm", "compression": 4}')
    bottom, top = 13 * 512 + 512 * 256 + 256 * 32, (32 + 27 * 26 // 2) * 512 + 512 * 512 + 512
    assert cost.sparse_parameters == ROWS * 128
    assert [part.parameters for part in cost.layers["towers"].values()] == [128 * 32 + 32] * 2
    assert cost.mac == 26 * 128 * 32 + bottom + 27 * 27 * 32 + top
    assert cost.flop == 6 * cost.mac - 2 * 13 * 512
    assert "towers.1" in cost.parts


def test_dlrm_of_mlperf() -> None:
    cost = counted("model.head=[1024, 1024, 512, 256]", "data.schema=schemas/criteo-terabyte-uncapped.json")
    assert cost.sparse_parameters == 177_944_275 * 128 == 22_776_867_200
    assert cost.mac == 2_458_496
    assert cost.flop == 14_737_664  # 14.738 MFLOP


def test_dcnv2_of_mlperf() -> None:
    cost = counted("model=" + json.dumps(DCN | {"layers": 3, "rank": 512, "head": [1024, 1024, 512, 256]}))
    assert cost.sparse_parameters == ROWS * 128
    assert cost.mac == 16_030_464
    assert 6 * cost.mac == 96_182_784  # 96.18 MFLOP with the gradient of the numeric features, which nothing needs
    assert cost.flop == 96_182_784 - 2 * 13 * 512


def test_what_is_published_of_a_config() -> None:
    assert published(CRITEO) == DLRM_CRITEO
    largest = published(Path("somewhere/wukong-108gflop.json"))
    assert largest is not None and largest.flop == 108e9 and largest.parameters is None
    assert published(Path("wukong-109gflop.json")) is None
    assert published(ROOT / "ds_configs/movielens-100k.json") is None


def flops(*arguments: str, real: bool = False) -> "subprocess.CompletedProcess[str]":
    return python(ROOT / "tools/flops.py", *arguments, cwd=ROOT, real=real)


def test_one_json_object_alone() -> None:
    done = flops("--config", str(CRITEO), "--json", real=True)
    result = json.loads(done.stdout)
    cost = counted()
    assert result["parameters"] == {
        "sparse": cost.sparse_parameters,
        "dense": cost.dense_parameters,
        "total": cost.parameters,
    }
    assert result["training_flop_per_example"] == cost.flop
    assert sum(part["training_flop"] for part in result["parts"].values()) == cost.flop
    assert sum(part["parameters"] for layer in result["layers"].values() for part in layer.values()) == cost.parameters
    assert result["published"]["parameters"] == DLRM_CRITEO.parameters


def test_the_ladder_stands_beside_the_published_column() -> None:
    rows = json.loads(flops("--ladder", "--json").stdout)
    flop = {name: row["training_flop_per_example"] / 1e9 for name, row in rows.items()}
    printed = [row["published_flop_per_example"] / 1e9 for row in rows.values()]
    assert printed == [0.53, 1.25, 2.12, 5.6, 22.23, 61, 108]
    # spec: by the formula with static Y, head 2048, and the embedding-side MLPs
    assert list(flop.values()) == pytest.approx([0.496, 1.027, 1.575, 5.278, 23.38, 58.50, 117.28], rel=6e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one of --config C.json and --ladder"),
        (["--ladder", "--set", "model.dim=8"], "--set goes with --config"),
        (["--config", "absent.json"], "absent.json: cannot be read"),
        (["--config", str(CRITEO), "--set", "data.schema=absent.json"], "data.schema="),
        (["--config", str(CRITEO), "--set", "data.schema=null", "--set", "data.path=absent"], "data.path='absent'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(arguments: list[str], message: str) -> None:
    done = flops(*arguments)
    assert done.returncode == 2 and message in done.stderr
    assert done.stdout == "" and done.stderr.count("\n") == 1
