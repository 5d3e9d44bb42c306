"""The page on the way of a batch is the way that a batch takes."""

import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest

import megarec
from megarec.data.sources.synthetic import Shape, prepare_synthetic
from megarec.distributed.rank_pool import RankPool
from tests.checkpoint.runs import build, write_run

PACKAGE = Path(megarec.__file__).parent
PAGE = PACKAGE.parent / "docs/architecture.md"
USED_BY_ALL = {
    "data/batch.py",
    "data/cache.py",
    "data/schema.py",
    "sparse/tables/base.py",
    "distributed/collectives.py",
}
TRAINING_ONLY = {"training/trainer.py"}  # its loop; the test predicts


def files_of_a_batch(path: Path) -> set[str]:
    """Files of the package whose functions run while one batch goes from the disk to its logits, on every thread."""
    from megarec.training.step import predict

    run, seen = build(path, []), set[str]()

    def follow(frame: FrameType, event: str, _: object) -> None:
        file = Path(frame.f_code.co_filename)
        if event == "call" and file.is_relative_to(PACKAGE):
            seen.add(file.relative_to(PACKAGE).as_posix())

    threading.setprofile(follow)
    sys.setprofile(follow)
    try:
        batch = next(iter(run.test.batches()))
        predict(run.dense, run.sparse, batch.to(run.device))
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    return seen


def listed() -> list[set[str]]:
    """Row by row of the page's table: the file, or the files to choose one from."""
    rows = re.findall(r"^\| \d+ \| ([^|]*) \|", PAGE.read_text(), re.MULTILINE)
    found = []
    for row in rows:
        first, *others = re.findall(r"`([^`]+\.py)`", row)
        folder = first.rpartition("/")[0]
        found.append({first, *(f"{folder}/{name}" for name in others)})
    return found


@pytest.mark.parametrize("backend", ["fbgemm", "torch"])
def test_a_batch_passes_the_twelve_files_of_the_page(
    backend: str, rank_pool: Callable[[int], RankPool], tmp_path: Path
) -> None:
    prepare_synthetic(Shape(examples=1_000), tmp_path / "data")
    path = write_run(tmp_path, tmp_path / "data", embedding={"backend": backend})
    (seen,) = rank_pool(1).run(files_of_a_batch, path)
    rows = listed()
    assert len(rows) == 12
    visited = {file for file in seen - USED_BY_ALL if not file.startswith("models/")} | {"models/recommender.py"}
    missing = [row for row in rows if not row & (visited | TRAINING_ONLY)]
    assert not missing, "listed, but the batch does not pass there"
    assert visited - set.union(*rows) == set(), "passed, but not listed"
