"""Runs of every model, trained when a test first asks for one."""

from collections.abc import Callable
from pathlib import Path

import pytest

from megarec.data.sources.synthetic import Shape, prepare_synthetic
from megarec.distributed.rank_pool import RankPool
from tests.serving.trained_runs import OF_TABLE, prepare_columns, train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data"
    prepare_synthetic(Shape(examples=400, numeric=3, seed=3), path)
    return path


@pytest.fixture(scope="module")
def columns(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set with columns of every type."""
    return prepare_columns(tmp_path_factory.mktemp("columns") / "own")


@pytest.fixture(scope="module")
def trained(
    rank_pool: Callable[[int], RankPool], data: Path, columns: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The checkpoint of a run, by its name in RUNS."""
    known: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in known:
            own = columns if name == OF_TABLE else data
            known[name] = train(name, own, tmp_path_factory.mktemp("run"), rank_pool(1))
        return known[name]

    return of
