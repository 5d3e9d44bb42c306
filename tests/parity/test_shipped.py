"""Every shipped config keeps the promise for 100 steps; on made-up data with the features of the real ones."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from megarec.config.load import load_config
from megarec.data.schema import read_schema
from megarec.data.sources.synthetic import prepare_like
from megarec.distributed.rank_pool import RankPool
from megarec.parity.cases import Case
from megarec.parity.reference import reference_losses
from megarec.parity.run import compare

CONFIGS = Path(__file__).parents[2] / "ds_configs"
STEPS = 100


@dataclass(frozen=True)
class Shipped:
    """A config that is shipped, at a size that a test can train.

    Attributes:
        schema: of its data, in ds_configs/schemas.
        smaller: overrides of sizes; its optimizers, initialisation and regularisation stay.
    """

    config: str
    schema: str
    smaller: tuple[str, ...]


QUICKSTART = Shipped(
    "movielens-100k.json",
    "movielens-100k.json",
    ("data.batch_size=128",),
)
SILU = "model.activation=silu"  # as published these have ReLUs, which switch: such runs warn at their start
SHIPPED = [
    QUICKSTART,
    Shipped("movielens-1m.json", "movielens-1m.json", ("data.batch_size=512",)),
    Shipped("dlrm-criteo-terabyte.json", "criteo-terabyte.json", ("data.batch_size=64", SILU)),
    Shipped("ladder/small/movielens-1m-0.0025gflop.json", "movielens-1m.json", ("data.batch_size=128", SILU)),
]


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Shipped], tuple[Path, list[str], list[float]]]:
    """Of a config: its path, the overrides of this test and the losses of one process."""
    known: dict[Shipped, tuple[Path, list[str], list[float]]] = {}

    def curve(shipped: Shipped) -> tuple[Path, list[str], list[float]]:
        if shipped not in known:
            directory, path = tmp_path_factory.mktemp("shipped"), CONFIGS / shipped.config
            schema = read_schema(CONFIGS / "schemas" / shipped.schema)
            prepare_like(schema, directory / "data", examples=10_000, seed=1, max_rows=2_000)
            overrides = [
                f"data.path={directory / 'data'}",
                f"train.output_dir={directory / 'run'}",
                "deepspeed.tensorboard.enabled=false",
                *shipped.smaller,
            ]
            known[shipped] = path, overrides, reference_losses(load_config(path, overrides), STEPS)
        return known[shipped]

    return curve


def deviation(shipped: Shipped, ranks: int, stage: int, curves: Callable, rank_pool: Callable) -> float:  # type: ignore[type-arg]
    path, overrides, reference = curves(shipped)
    assert reference[0] - min(reference) > 0.01, "the losses must fall for the comparison to mean anything"
    case = Case(ranks, tuple(overrides), (f"deepspeed.zero_optimization.stage={stage}",))
    return compare(case, path, rank_pool(ranks), reference).relative_deviation


@pytest.mark.parametrize(("ranks", "stage"), [(1, 2), (2, 0), (2, 3), (4, 2)])
def test_the_quickstart_is_the_same_on_any_topology(
    ranks: int, stage: int, curves: Callable, rank_pool: Callable[[int], RankPool]
) -> None:
    assert deviation(QUICKSTART, ranks, stage, curves, rank_pool) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("shipped", SHIPPED, ids=lambda shipped: shipped.config)
def test_every_shipped_config_is_the_same_on_any_topology(
    shipped: Shipped, ranks: int, stage: int, curves: Callable, rank_pool: Callable[[int], RankPool]
) -> None:
    assert deviation(shipped, ranks, stage, curves, rank_pool) <= 1e-5
