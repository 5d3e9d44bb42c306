"""Runs of several labels: a label left out of a step, whole runs with their metrics, the loss by its definition."""

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from megarec.commands import importance
from megarec.commands.evaluate import _parser, evaluate
from megarec.config.load import load_config
from megarec.config.sections import FaultsConfig
from megarec.data.batch import Batch
from megarec.data.sources.synthetic import Shape, prepare_synthetic
from megarec.dense.objective import label_losses
from megarec.distributed.rank_pool import RankPool
from megarec.errors import UserError
from megarec.evaluation.report import as_json, as_lines
from megarec.run.state import TrainState
from megarec.training import trainer
from megarec.training.faults.policy import FaultPolicy
from tests.checkpoint.runs import TOWERS, build, write_run
from tests.logged import logged_lines
from tests.training.faulty import changed, everything, judged, step_of

LABELS = ["label", "label_1"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("several_labels")
    prepare_synthetic(Shape(examples=1_000, seed=2, labels=2), directory / "data")
    return write_run(
        directory,
        directory / "data",
        model={"tasks": {"name": "mmoe", "experts": 2, "expert": [8]}},
        data={"label": LABELS, "weighted": True},
        train={"label_weights": {"label_1": 0.5}, "log_every": 3},
        deepspeed={"gradient_clipping": 0.1},
    )


def without_a_label(batch: Batch) -> Batch:
    """The second label is missing in every row."""
    labels = batch.labels.clone()
    labels[:, 1] = torch.nan
    return dataclasses.replace(batch, labels=labels, buffer=None)


def steps_without_a_label(path: Path, overrides: list[str]) -> tuple[list[str], list[str], list[str], list[str]]:
    """Three steps, the second without the second label: because its logits are NaN on rank 1, and because no row has
    it. What differs in the end, which labels the steps left out, and what of the second's weights moved in step two."""
    ends, left_out, moved = [], [], []
    for faulty in (True, False):
        run, logged = build(path, overrides), logged_lines()
        judge = judged(run)
        tower = run.dense.module.tasks.towers[1]  # type: ignore[union-attr,index]
        planted = {"now": False}

        def poison(module: Any, inputs: Any, output: Tensor, planted: dict[str, bool] = planted) -> Tensor:
            return output * torch.nan if planted["now"] else output

        if faulty and run.topology.rank == 1:
            tower.register_forward_hook(poison)
        for step, batch in enumerate(list(run.train.batches(epoch=0))[:3]):
            planted["now"] = step == 1
            before = everything(run)
            assert step_of(run, judge, batch if faulty or step != 1 else without_a_label(batch)) is None
            if step == 1 and faulty:
                moved = changed(before, everything(run))
                left_out = [*judge.left_out, *(line for line in logged if "MADE WITHOUT" in line)]
        ends.append(everything(run))
    return changed(*ends), left_out[:1], left_out[1:], moved


CASES = [
    ["deepspeed.zero_optimization.stage=0"],
    ["deepspeed.zero_optimization.stage=2", "deepspeed.bf16.enabled=true"],
    ["deepspeed.zero_optimization.stage=3", "parallel.tensor=2"],
    ["deepspeed.zero_optimization.stage=1", "parallel.exchange=tower", "parallel.ranks_per_host=1",
     f"parallel.towers={json.dumps(TOWERS)}",
     'model.tasks={"name": "ple", "levels": 2, "experts": 2, "expert": [8]}'],
]  # fmt: skip


@pytest.mark.parametrize(
    "overrides", [pytest.param(CASES[0], marks=pytest.mark.slow), *CASES[1:]], ids=lambda case: " ".join(case)[:60]
)
def test_a_step_without_a_label_is_that_of_rows_without_it(
    path: Path, overrides: list[str], rank_pool: Callable[[int], RankPool]
) -> None:
    """To the last bit, weights and optimizer states, on both ranks, whichever of them had the fault."""
    for rank, (differ, left_out, logged, moved) in enumerate(rank_pool(2).run(steps_without_a_label, path, overrides)):
        assert differ == [] and left_out == ["label_1"], f"rank {rank}"
        assert any("single_" in name for name in moved), "the step was made"
        assert "label label_1: its loss is not finite on ranks 1" in logged[0] and len(logged) == 1


def test_a_label_that_stays_faulty_ends_the_run_as_any_fault_does() -> None:
    state = TrainState()
    policy = FaultPolicy(FaultsConfig(max_in_a_row=2), state)
    assert policy.applied(0.5, ["b"]) == "go on" and policy.in_a_row == 1
    assert policy.applied(0.5) == "go on" and policy.in_a_row == 0
    assert [policy.applied(0.5, ["b"]), policy.applied(0.5, ["a", "b"])] == ["go on", "stop"]
    assert state.faulty_labels == {"b": 3, "a": 1} and state.skipped_steps == 0
    assert TrainState.from_json(state.to_json(), Path("x")).faulty_labels == state.faulty_labels


def test_the_loss_is_its_definition_and_a_missing_label_counts_for_nothing() -> None:
    torch.manual_seed(1)
    logits = torch.randn(50, 3, dtype=torch.float64, requires_grad=True)
    labels, weights = torch.randint(0, 2, (50, 3)).double(), torch.rand(50).double()
    labels[torch.rand(50, 3) < 0.3] = torch.nan
    with torch.no_grad():
        logits[0, 0], labels[0, 0] = torch.nan, torch.nan  # nobody asks for it
    found = label_losses(logits, labels, weights)
    probabilities = torch.sigmoid(logits.detach())
    wanted = [
        -sum(
            float(w * torch.log(p if y == 1 else 1 - p))
            for y, p, w in zip(labels[:, k], probabilities[:, k], weights, strict=True)
            if y in (0, 1)
        )
        / 50
        for k in range(3)
    ]
    assert found.tolist() == pytest.approx(wanted)
    found.sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()
    assert (logits.grad[labels.isnan()] == 0).all()


def whole_run(path: Path, output: str, overrides: list[str]) -> dict[str, Any]:
    config = load_config(path, [f"train.output_dir={output}", *overrides])
    return trainer.train(config, resume=False, started=time.time())


def test_a_run_names_the_metrics_of_each_label_everywhere(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logged = logged_lines()
    run = tmp_path / "run"
    metrics = whole_run(path, str(run), ["train.best_label=label_1", "deepspeed.csv_monitor.enabled=true"])
    written = json.loads((run / "metrics.json").read_text())
    assert written["test"] == metrics["test"] and list(metrics["test"]["labels"]) == LABELS
    assert metrics["test"]["auc"] == metrics["test"]["labels"]["label_1"]["auc"]
    assert metrics["test"]["labels"]["label"]["examples"] == 100 > metrics["test"]["labels"]["label_1"]["examples"]
    assert metrics["train"]["faulty_steps_by_label"] == {}
    assert any("label_1: AUC" in line for line in logged) and any("label: loss" in line for line in logged)
    for split in ("train", "valid", "test"):
        assert list(run.rglob(f"*{split}*labels*label_1*auc*.csv")), split

    table, html = tmp_path / "p.parquet", tmp_path / "p.html"
    asked = ["--run", str(run), "--data", str(path.parent / "data"), "--bootstrap", "20", "--calibrate"]
    asked += ["--slice", "single_0", "--predictions", str(table), "--html", str(html), "--compare", str(run)]
    _, report = evaluate(_parser().parse_args(asked))
    found = as_json(report)
    for label in LABELS:
        own = metrics["test"]["labels"][label]
        assert found["labels"][label]["auc"] == pytest.approx(own["auc"], abs=1e-9)
        assert found["labels"][label]["compared"]["metrics"]["auc"]["difference"] == 0
        assert f"label {label}:" in as_lines(report) and f"Label {label}" in html.read_text()
    assert found["auc"] == found["labels"]["label_1"]["auc"]
    monkeypatch.setattr(sys, "argv", ["importance", str(run), "--repeats", "1"])
    importance.main()
    printed = capsys.readouterr().out.splitlines()
    rows = metrics["test"]["labels"]["label_1"]["examples"]
    assert {"label label, 100 examples:", f"label label_1, {rows} examples:"} <= set(printed)
    assert f"AUC {found['auc']:.4f}  LogLoss {found['logloss']:.4f}" in printed
    columns = pq.read_table(table)
    assert columns.column_names == [f"{label}:{what}" for label in LABELS for what in ("label", "logit", "prediction")]
    assert columns["label_1:label"].null_count == 100 - metrics["test"]["labels"]["label_1"]["examples"]


def test_a_window_of_several_labels_survives_a_checkpoint(path: Path, tmp_path: Path) -> None:
    """With missing labels in it: the log line after a resume is of the same predictions."""
    config = load_config(path, [f"train.output_dir={tmp_path / 'run'}", "train.max_steps=4", "train.log_every=100"])
    trainer.train(config, resume=False, started=time.time())
    logged = logged_lines()
    longer = load_config(path, [f"train.output_dir={tmp_path / 'run'}", "train.max_steps=5", "train.log_every=100"])
    trainer.train(longer, resume=True, started=time.time())
    whole = load_config(path, [f"train.output_dir={tmp_path / 'whole'}", "train.max_steps=5", "train.log_every=5"])
    trainer.train(whole, resume=False, started=time.time())
    assert not any("WAS NOT SAVED" in line for line in logged)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (['data.label="label"'], "model.tasks is for several labels"),
        (['data.label=["label", "label_2"]'], "did you mean"),
        (['data.label=["label", "label"]', "train.label_weights={}"], "names 'label' 2 times"),
        (["train.best_label=buy"], "train.best_label names 'buy', which data.label does not"),
        (["model.tasks.levels=2"], "model.tasks.levels does not apply to model.tasks.name='mmoe'"),
    ],
)
def test_mistakes_are_one_line(path: Path, overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        whole_run(path, str(tmp_path / "run"), overrides)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_one_label_that_rows_may_lack_trains_on_those_that_have_it(path: Path, tmp_path: Path) -> None:
    one = ["data.label=label_1", "model.tasks={}", "train.label_weights={}"]
    metrics = whole_run(path, str(tmp_path / "run"), one)
    assert "labels" not in metrics["test"] and np.isfinite(metrics["test"]["auc"])
    assert 0 < metrics["test"]["examples"] < 100
