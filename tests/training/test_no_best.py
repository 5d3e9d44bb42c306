"""Validations without a score: nothing is called the best, and log, metrics.json and exit code say so."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megarec.checkpoint.pointers import pointed
from megarec.config.load import load_config
from megarec.data.schema import load_schema
from megarec.data.sources.synthetic import Shape, prepare_synthetic
from megarec.distributed.rank_pool import RankPool
from megarec.errors import DONE, STOPPED, RunEnded, UserError
from megarec.training import trainer
from tests.checkpoint.runs import write_run
from tests.logged import logged_lines

Change = Callable[[list[Any]], list[Any]]


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("no-best") / "data"
    prepare_synthetic(Shape(examples=1_000, seed=2), path)
    return path


def changed(clean: Path, target: Path, split: str, column: str, change: Change) -> Path:
    """A copy of prepared data with one column of a split changed."""
    shutil.copytree(clean, target, ignore=shutil.ignore_patterns(".arrow*"))
    path = target / split / "000.parquet"
    table = pq.read_table(path)
    position = table.column_names.index(column)
    values = pa.array(change(table.column(column).to_pylist()), table.schema.field(column).type)
    pq.write_table(table.set_column(position, table.schema.field(column), values), path)
    return target


def huge(values: list[Any]) -> list[Any]:
    return [3.4e38, *values[1:]]


def run_it(path: Path) -> tuple[int, str, list[str]]:
    logged = logged_lines()
    try:
        trainer.train(load_config(path), resume=False, started=time.time())
    except RunEnded as ended:
        return ended.code, str(ended), logged
    except UserError as error:
        return 2, str(error), logged
    return DONE, "", logged


def written(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "out/metrics.json").read_text())
    return found


@pytest.mark.parametrize("best_by", ["auc", "logloss"])
def test_a_validation_row_that_overflows(
    best_by: str, rank_pool: Callable[[int], RankPool], clean: Path, tmp_path: Path
) -> None:
    data = changed(clean, tmp_path / "data", "valid", load_schema(clean).numeric[0], huge)
    path = write_run(tmp_path, data, train={"best_by": best_by, "max_steps": 4, "evaluate_every": 2})
    for code, reason, _ in rank_pool(2).run(run_it, path):
        assert code == STOPPED and "\n" not in reason
        assert f"no validation had a finite {best_by} (the last: 1 of 100 logits are NaN or infinite)" in reason
        assert "what is tested is step 4, the last" in reason
    *_, logged = rank_pool(2).run(run_it, path)[0]
    assert not any("(best)" in line for line in logged)
    assert (
        f"WARNING: VALIDATION AT STEP 2 HAS NO {best_by.upper()}, SO IT CANNOT BE THE BEST: 1 of 100 logits"
        in " ".join(logged)
    )
    found = written(tmp_path)
    assert found["stopped"] == reason and found["best_by"] is None and found["step"] == 4
    assert found["valid"]["auc"] is None and found["valid"]["not_finite"] == 1 and found["test"]["auc"] > 0
    assert pointed(tmp_path / "out/checkpoints", "best") is None


def test_a_test_row_that_overflows(rank_pool: Callable[[int], RankPool], clean: Path, tmp_path: Path) -> None:
    data = changed(clean, tmp_path / "data", "test", load_schema(clean).numeric[0], huge)
    code, reason, _ = rank_pool(1).run(run_it, write_run(tmp_path, data, train={"max_steps": 2}))[0]
    assert code == STOPPED and "1 of 100 logits of the split test are NaN or infinite" in reason
    assert written(tmp_path)["test"]["logloss"] is None and written(tmp_path)["best_by"] == "logloss"


def test_a_validation_split_of_one_class(rank_pool: Callable[[int], RankPool], clean: Path, tmp_path: Path) -> None:
    data = changed(clean, tmp_path / "data", "valid", load_schema(clean).label, lambda values: [1] * len(values))
    path = write_run(tmp_path, data, train={"best_by": "auc", "max_steps": 2})
    for code, reason, _ in rank_pool(2).run(run_it, path):
        assert code == 2 and "\n" not in reason
        assert "all 100 labels of the split valid" in reason and "use train.best_by='logloss'" in reason
    path = write_run(tmp_path, data, train={"best_by": "logloss", "max_steps": 2})
    assert rank_pool(2).run(run_it, path)[0][0] == DONE
    found = written(tmp_path)
    assert found["best_by"] == "logloss" and found["valid"]["auc"] is None and found["valid"]["logloss"] > 0
