"""--resume with other settings than the checkpoint's: refused by name, logged in a line, or without effect."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from megarec.checkpoint import settings
from megarec.checkpoint.format import Index
from megarec.config.load import load_config
from megarec.config.sections import RunConfig
from megarec.distributed.rank_pool import RankPool
from megarec.errors import UserError
from megarec.run.build import Run
from tests.checkpoint.runs import build, leg, store, write_run

REFUSED = {
    "model.activation=silu": "model.activation is 'relu' there, 'silu' in this run, and its weights were trained for",
    "model.num_fm=3": "model.num_fm: 2 there",
    "model.bias=false": "model.bias: True there, False here",
    'model={"name": "dnn", "dim": 8, "head": [8]}': "model.name: 'wukong' there, 'dnn' here",
    "dense.optimizer=sgd": "the dense optimizer was AdamW, this run's is SGD",
    "embedding.optimizer=adagrad": "embedding.optimizer: 'rowwise_adagrad' there, 'adagrad' here",
    "embedding.optimizer=sgd": "embedding.optimizer: 'rowwise_adagrad' there, 'sgd' here",
    'data.features=["single_0", "single_1"]': "trained on other data",
}
SAID = {
    "train.seed=9": "train.seed is 9 now, 1 until step 2; examples come in another order from here",
    "data.stream_rows=160": "data.stream_rows is 160 now, None until step 2; examples come in another order from here",
    "data.batch_size=160": "data.batch_size is 160 now, 80 until step 2; the place in the data counts steps: it was "
    "epoch 0.20, and is 0.40",
    "dense.learning_rate=0.5": "dense.learning_rate is 0.5 now, 0.01 until step 2",
    "embedding.learning_rate=0.5": "embedding.learning_rate is 0.5 now, 0.1 until step 2",
    "embedding.l2=0.1": "embedding.l2 is 0.1 now, 0.0 until step 2",
    'embedding.l2={"weight": 0.1, "rows": "all"}': "embedding.l2 is {'weight': 0.1, 'rows': 'all', 'coupled': True} "
    "now, 0.0 until step 2",
    'embedding.tables={"single_0": {"l2": 0.1}}': "embedding.tables.single_0 is {'l2': 0.1} now, None until step 2",
    "model.dropout=0.2": "model.dropout is 0.2 now, 0.1 until step 2",
    "schedule.decay=linear": "schedule.decay is 'linear' now, 'constant' until step 2",
    "train.epochs=7": "train.epochs is 7 now, 1 until step 2",
    "deepspeed.gradient_clipping=1.0": "deepspeed.gradient_clipping is 1.0 now, None until step 2",
    "deepspeed.bf16.enabled=true": "deepspeed.bf16 is {'enabled': True} now, None until step 2",
}
ALL_THE_SAME = (
    "parallel.timeout_seconds=20",
    "train.log_every=3",
    "train.checkpoint_every=4",
    "deepspeed.zero_optimization.stage=1",
    "deepspeed.gradient_accumulation_steps=2",
    "embedding.placement=column",
    "embedding.backend=torch",
    'embedding.tables={"single_0": {"placement": "column", "initial_std": 0.3}}',
    "dense.recompute=full",
    "model.num_lcb=[2]",
)


def resumed(path: Path, overrides: list[str]) -> dict[str, tuple[str, list[str]]]:
    """By override, the error and the logged changes."""
    found = {}
    for override in overrides:
        checkpoints, error = store(build(path, [override])), ""
        try:
            assert checkpoints.resume() is not None
        except UserError as problem:
            error = str(problem)
        found[override] = error, checkpoints.changed
    return found


def test_what_changes_with_a_resume_is_refused_or_logged(
    rank_pool: Callable[[int], RankPool], data: Path, tmp_path: Path
) -> None:
    path = write_run(tmp_path, data)
    pool = rank_pool(1)
    pool.run(partial(leg, load=False, save=True), path, [], 0, 2)
    found = pool.run(resumed, path, [*REFUSED, *SAID, *ALL_THE_SAME])[0]
    for override, expected in REFUSED.items():
        error, _ = found[override]
        assert expected in error and "\n" not in error and "step-000000002" in error, (override, error)
    for override, expected in SAID.items():
        error, lines = found[override]
        assert error == "" and len(lines) == 1, (override, error, lines)
        assert lines[0].startswith(f"CHANGED BY --resume: {expected}"), lines
    assert {override: found[override] for override in ALL_THE_SAME} == dict.fromkeys(ALL_THE_SAME, ("", []))


@pytest.mark.parametrize("known", settings.SPOKEN_OF)
def test_what_is_spoken_of_is_a_key(known: str) -> None:
    section, _, key = known.partition(".")
    fields = RunConfig.model_fields[section].annotation
    assert section in ("model", "deepspeed") or not key or key in getattr(fields, "model_fields", {})


def test_settings_of_another_version_are_compared_where_both_know_them(data: Path, tmp_path: Path) -> None:
    """A number that is out of range today, a key that is gone, keys that there were not yet, a section of no kind."""
    config = load_config(write_run(tmp_path, data))
    there = config.model_dump(mode="json")
    there["train"] = {"epochs": 10**9, "seed": 7, "no_such_key": 1}
    there["dense"] |= {"learning_rate": 0.5}
    del there["model"]["activation"], there["schedule"]
    there["parallel"] = "flat"
    index = SimpleNamespace(config=there, step=3)
    settings.check_model(tmp_path, cast(Index, index), config)
    run = SimpleNamespace(config=config)
    lines = settings.changed_settings(cast(Run, run), cast(Index, index))
    changes = [line.partition(": ")[2].partition(";")[0] for line in lines]
    assert changes == [
        "dense.learning_rate is 0.01 now, 0.5 until step 3",
        f"train.epochs is {config.train.epochs} now, 1000000000 until step 3",
        "train.seed is 1 now, 7 until step 3",
    ]
    there["model"]["activation"] = "silu"
    with pytest.raises(UserError, match=r"model\.activation is 'silu' there, 'relu' in this run"):
        settings.check_model(tmp_path, cast(Index, index), config)
