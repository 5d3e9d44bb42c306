"""Every shipped config keeps the promise for 100 steps, or says at its start that it cannot.

On made-up data with the features of the real ones. What warns is trained without the cause of its warning.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from megarec.config.load import load_config
from megarec.data.schema import CategoricalFeature, Schema, load_schema, read_schema
from megarec.data.sources.synthetic import prepare_like, split_rows
from megarec.distributed.rank_pool import RankPool
from megarec.parity.cases import Case
from megarec.parity.reference import reference_losses
from megarec.parity.run import compare
from megarec.run.rounding import rounding_warning
from megarec.run.spec import resolve

CONFIGS = Path(__file__).parents[2] / "ds_configs"
STEPS = 100


@dataclass(frozen=True)
class Shipped:
    """A config that is shipped, at a size that a test can train.

    Attributes:
        schema: of its data, in ds_configs/schemas; None: planted.
        smaller: overrides of sizes; its optimizers, initialisation and regularisation stay.
        warns: of what the run says at its start, the words; None: nothing, for it keeps the promise.
        without: overrides that take the cause of the warning away.
    """

    config: str
    schema: str | None
    smaller: tuple[str, ...]
    warns: tuple[str, ...] | None = None
    without: tuple[str, ...] = ()


BATCH_128 = ("data.batch_size=128",)
QUICKSTART = Shipped("movielens-100k.json", "movielens-100k.json", BATCH_128)
RELU, SILU = "one of ten million ReLUs", ("model.activation=silu",)
LONE_L2 = "embedding.dropout and l2 leave elements a gradient"  # the smaller the batch, the larger it is
SMOOTH = (*SILU, "embedding.eps=1e-3")
FP32 = ("deepspeed.bf16.enabled=false", "embedding.weights=fp32", 'parallel.messages=["fp32", "fp32"]')
SMALL_WUKONG = (
    *("data.batch_size=64", "parallel.tensor=1", "parallel.ranks_per_host=null"),  # for hosts of eight
    "deepspeed.zero_optimization.zero_hpz_partition_size=1",
    *("model.dim=8", "model.layers=2", "model.num_fm=8", "model.num_lcb=8", "model.rank=8", "model.mlp=[32, 32, 32]"),
    *("model.head=[32]", "model.numeric_mlp=[32]", "model.numeric_embeddings=4"),
)
SHIPPED = [
    QUICKSTART,
    Shipped("movielens-1m.json", "movielens-1m.json", ("data.batch_size=512",)),
    Shipped("movielens-1m-din.json", "movielens-1m-rated.json", ("data.batch_size=512",)),
    Shipped("dlrm-criteo-terabyte.json", "criteo-terabyte.json", ("data.batch_size=64",), (RELU,), SILU),
    *(
        Shipped(f"{name}.json", f"{name}.json", SMALL_WUKONG, (RELU,), SILU)
        for name in ("criteo-kaggle", "criteo-terabyte")
    ),
    *(
        Shipped(f"ladder/small/movielens-1m-{size}gflop.json", "movielens-1m.json", BATCH_128, (RELU,), SMOOTH)
        for size in ("0.0025", "0.005", "0.01", "0.02", "0.04")
    ),
    *(
        Shipped(
            f"ladder/wukong-{size}gflop.json",
            "wukong-ladder.json",
            SMALL_WUKONG,
            ("bfloat16 in the dense model", "embedding.weights='fp16'", "parallel.messages=['fp16', 'bf16']"),
            (*SILU, *FP32),
        )
        for size in ("0.53", "1.25", "2.12", "5.6", "22.23", "61", "108")
    ),
    Shipped(
        "mlperf-dlrm-dcnv2.json",
        "criteo-terabyte-multihot.json",
        ("data.batch_size=64",),
        ("float16 in the dense model", "parallel.messages=['fp16', 'fp16']"),
        (*SILU, "deepspeed.fp16.enabled=false", 'parallel.messages=["fp32", "fp32"]'),
    ),
    *(
        Shipped(f"recipes/ten-{name}.json", None, ("data.batch_size=64", "model.head=[64, 64]"), (RELU,), SILU)
        for name in ("dnn", "dcnv2", "wukong")
    ),
    Shipped("studies/movielens-100k-base.json", "movielens-100k.json", BATCH_128, (RELU, LONE_L2), SMOOTH),
    Shipped("studies/movielens-1m-base.json", "movielens-1m.json", ("data.batch_size=512",), (RELU,), SILU),
    Shipped("studies/planted-base.json", None, ("data.batch_size=64",), (RELU,), SILU),
    Shipped("studies/towers-base.json", None, ("data.batch_size=64",), (RELU,), SILU),
]  # fmt: skip


def schema_of(shipped: Shipped) -> Schema:
    if shipped.schema is None:  # what `tools/prepare_data.py planted` writes by default
        features = tuple(CategoricalFeature(name=f"f{index:02d}", rows=16) for index in range(24))
        return Schema(name="planted", categorical=features, rows=split_rows(500_000))
    return read_schema(CONFIGS / "schemas" / shipped.schema)


def fewer_features(schema: Schema) -> Schema:
    """The ladder's 691 features and 64 numbers are more than a test can train: every thirtieth."""
    if len(schema.categorical) < 100:
        return schema
    return schema.model_copy(update={"categorical": schema.categorical[::30], "numeric": schema.numeric[::30]})


def test_every_run_that_is_shipped_is_here() -> None:
    runs = [path for path in CONFIGS.rglob("*.json") if "model" in json.loads(path.read_bytes())]
    assert sorted(str(path.relative_to(CONFIGS)) for path in runs) == sorted(shipped.config for shipped in SHIPPED)


@pytest.mark.parametrize("shipped", SHIPPED, ids=lambda shipped: shipped.config)
def test_a_run_that_cannot_keep_the_promise_says_so(shipped: Shipped) -> None:
    config, schema = load_config(CONFIGS / shipped.config), schema_of(shipped)
    steps = config.train.epochs * schema.rows["train"] // config.data.batch_size
    warning = rounding_warning(config, resolve(config, schema), steps)
    assert (warning is None) == (shipped.warns is None)
    assert all(words in (warning or "") for words in shipped.warns or ())


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Shipped], tuple[Path, list[str], list[float]]]:
    """Of a config: its path, the overrides of this test and the losses of one process."""
    known: dict[Shipped, tuple[Path, list[str], list[float]]] = {}

    def curve(shipped: Shipped) -> tuple[Path, list[str], list[float]]:
        if shipped not in known:
            directory, path = tmp_path_factory.mktemp("shipped"), CONFIGS / shipped.config
            prepare_like(
                fewer_features(schema_of(shipped)), directory / "data", examples=10_000, seed=1, max_rows=2_000
            )
            overrides = [
                f"data.path={directory / 'data'}",
                f"train.output_dir={directory / 'run'}",
                "deepspeed.tensorboard.enabled=false",
                *shipped.smaller,
                *shipped.without,
            ]
            known[shipped] = path, overrides, reference_losses(load_config(path, overrides), STEPS)
        return known[shipped]

    return curve


def deviation(shipped: Shipped, ranks: int, stage: int, curves: Callable, rank_pool: Callable) -> float:  # type: ignore[type-arg]
    path, overrides, reference = curves(shipped)
    assert reference[0] - min(reference) > 0.01, "the losses must fall for the comparison to mean anything"
    case = Case(ranks, tuple(overrides), (f"deepspeed.zero_optimization.stage={stage}",))
    config = load_config(path, list(case.numbers))
    assert rounding_warning(config, resolve(config, load_schema(Path(config.data.path))), STEPS) is None
    return compare(case, path, rank_pool(ranks), reference).relative_deviation


@pytest.mark.parametrize(
    ("ranks", "stage"), [(1, 2), *(pytest.param(2, stage, marks=pytest.mark.slow) for stage in (0, 3)), (4, 2)]
)
def test_the_quickstart_is_the_same_on_any_topology(
    ranks: int, stage: int, curves: Callable, rank_pool: Callable[[int], RankPool]
) -> None:
    assert deviation(QUICKSTART, ranks, stage, curves, rank_pool) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("shipped", SHIPPED, ids=lambda shipped: shipped.config)
def test_every_shipped_config_is_the_same_on_any_topology(
    shipped: Shipped,
    ranks: int,
    stage: int,
    curves: Callable,
    rank_pool: Callable[[int], RankPool],
    record_property: Callable[[str, object], None],
) -> None:
    found = deviation(shipped, ranks, stage, curves, rank_pool)
    record_property("deviation", f"{found:.1e}")  # --junitxml keeps it
    assert found <= 1e-5
