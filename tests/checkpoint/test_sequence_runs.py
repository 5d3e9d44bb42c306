"""Runs whose model reads sequences: saved on one topology and resumed on another, streamed, scored."""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from megarec.distributed.rank_pool import RankPool
from megarec.errors import UserError
from megarec.serving.predictor import load_checkpoint
from tests.checkpoint.runs import MODEL, TOWERS, build, leg, write_run

Pools = Callable[[int], RankPool]

SEQUENCES = [
    {"features": ["multi_0"], "target": ["single_0"], "block": "din", "max_length": 3, "mlp": [8], "tables": "target"},
    {"features": ["multi_1"], "target": ["single_3"], "block": "hstu", "max_length": 4, "heads": 2},
]
TWO_HOSTS = ["parallel.exchange=tower", "parallel.ranks_per_host=1", "parallel.overlap=true"]
MIXED = 'embedding.tables={"single_0": {"placement": "row"}, "multi_1": {"placement": "column"}}'


@pytest.fixture(scope="module")
def path(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = {**MODEL, "sequences": SEQUENCES}
    return write_run(tmp_path_factory.mktemp("sequences"), data, model=model, parallel={"towers": TOWERS})


def test_resumed_on_any_topology(path: Path, rank_pool: Pools, tmp_path: Path) -> None:
    here = [f"train.output_dir={tmp_path}"]
    (straight,) = rank_pool(1).run(partial(leg, load=False, save=False), path, here, 0, 5)
    first = rank_pool(2).run(partial(leg, load=False, save=True), path, [*here, *TWO_HOSTS], 0, 2)[0]
    second = rank_pool(2).run(partial(leg, load=True, save=True), path, [*here, MIXED], 2, 4)[0]
    (third,) = rank_pool(1).run(partial(leg, load=True, save=False), path, [*here, "data.stream_rows=800"], 4, 5)
    losses = [*first.losses, *second.losses]
    assert losses == pytest.approx(straight.losses[:4], rel=1e-5)
    assert max(straight.losses) - min(straight.losses) > 0.001
    assert len(third.losses) == 1, "rows of a stream come in another order"


def logits_of(path: Path, overrides: list[str], directory: Path) -> list[list[float]]:
    """By batch of the test split, by the checkpoint's model without an engine."""
    predictor, run = load_checkpoint(directory), build(path, overrides)
    return [predictor.predict(batch).tolist() for batch in run.test.batches()]


def test_a_checkpoint_scores(path: Path, rank_pool: Pools, tmp_path: Path) -> None:
    here, directory = [f"train.output_dir={tmp_path}"], tmp_path / "checkpoints" / "step-000000002"
    (seen,) = rank_pool(1).run(partial(leg, load=False, save=True, logits=True), path, here, 0, 2)
    (scored,) = rank_pool(1).run(logits_of, path, here, directory)
    for mine, its in zip(scored, seen.logits, strict=True):
        assert mine == pytest.approx(its, rel=1e-5, abs=1e-6)


def first_batch(path: Path, overrides: list[str]) -> str:
    """What reading it ends with."""
    run = build(path, overrides)
    with pytest.raises(UserError) as refused:
        next(run.train.batches(epoch=0))
    return str(refused.value)


def test_lists_of_a_sequence_that_are_not_equally_long_end_a_run_where_they_are_read(
    path: Path, rank_pool: Pools
) -> None:
    both = json.dumps([{"features": ["multi_0", "multi_1"], "target": ["single_0"], "block": "hstu"}])
    (message,) = rank_pool(1).run(first_batch, path, [f"model.sequences={both}"])
    assert re.match(r"row \d+ \(from 0\) has \d values of multi_0 and \d of multi_1: .*equally long", message), message
