"""Whole runs on two gloo ranks, on synthetic data."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megarec.checkpoint.format import sealed
from megarec.config.load import load_config
from megarec.config.models import WukongConfig
from megarec.data.schema import load_schema
from megarec.data.sources.synthetic import Shape, prepare_synthetic
from megarec.distributed.rank_pool import RankPool
from megarec.errors import UserError
from megarec.run.spec import resolve
from megarec.training import step_log, trainer
from megarec.training.trainer import train
from tests.logged import logged_lines

MODEL = {"layers": 1, "num_fm": 2, "num_lcb": 2, "rank": 4, "mlp": [16], "dim": 8, "head": [8], "dropout": 0.1}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "data"
    prepare_synthetic(Shape(examples=1_000, seed=2), path)  # 800 train, 100 valid, 100 test
    return path


@pytest.fixture
def pool(rank_pool: Callable[[int], RankPool]) -> RankPool:
    return rank_pool(2)


def write_config(directory: Path, data: Path, **train_section: Any) -> Path:
    path = directory / "run.json"
    run = {
        "model": MODEL,
        "data": {"path": str(data), "batch_size": 100},
        "embedding": {"learning_rate": 0.1},
        "dense": {"learning_rate": 0.01},
        "train": {"epochs": 2, "log_every": 1, "output_dir": str(directory / "out"), **train_section},
        "deepspeed": {"zero_optimization": {"stage": 2}, "tensorboard": {"enabled": True}},
    }
    path.write_text(json.dumps(run))
    return path


def train_on_a_rank(path: Path, overrides: list[str], resume: bool) -> dict[str, Any]:
    return train(load_config(path, overrides), resume=resume, started=time.time())


def resume_on_a_rank(path: Path, overrides: list[str]) -> tuple[dict[str, Any], list[str]]:
    logged = logged_lines()
    return train(load_config(path, overrides), resume=True, started=time.time()), logged


def scalars(directory: Path) -> dict[str, dict[int, float]]:
    events = EventAccumulator(str(directory / "out" / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_a_run_with_the_dial_states_the_sizes_it_derived(pool: RankPool, data: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path, data, max_steps=2)
    metrics = pool.run(train_on_a_rank, path, ['model={"scale": 0.002, "dim": 8, "head": [8]}'], False)
    resolved = load_config(tmp_path / "out/config.json")
    assert isinstance(resolved.model, WukongConfig) and resolved.model.scale is None
    assert resolved.model.layers > 2 and resolved.model.rank == 24 and len(resolved.model.mlp) == 3
    counted = resolve(resolved, load_schema(data)).cost.flop / 1e9
    assert metrics[0]["train"]["gflop_per_example"] == counted == pytest.approx(0.002, rel=0.15)
    assert set(scalars(tmp_path)["train/logloss"]) == {1, 2}


def test_a_run_learns_and_leaves_what_design_promises(pool: RankPool, data: Path, tmp_path: Path) -> None:
    before = {path.name for path in Path("/dev/shm").iterdir()}
    metrics = pool.run(train_on_a_rank, write_config(tmp_path, data, epochs=4), [], False)
    assert metrics[0]["test"] == metrics[1]["test"]
    written = json.loads((tmp_path / "out/metrics.json").read_text())
    assert {"auc", "logloss", "ne", "calibration"} <= set(written["test"])
    assert {"examples_per_second", "gflop_per_example", "tflops", "mfu"} <= set(written["train"])
    assert written["test"]["examples"] == 100
    assert written["train"]["steps"] == 32
    assert json.loads((tmp_path / "out/config.json").read_text())["model"]["dim"] == 8

    found = scalars(tmp_path)
    assert set(found["train/logloss"]) == set(range(1, 33))
    assert set(found["valid/auc"]) == {8, 16, 24, 32}
    losses = [found["train/logloss"][step] for step in range(1, 33)]
    assert sum(losses[-8:]) < 0.97 * sum(losses[:8])
    assert found["train/gradient_norm"][5] > 0
    assert found["workload/traffic_mib_per_step/world"][5] > 0
    assert found["workload/memory_mib/activations"][5] > 0
    assert found["workload/memory_mib/process"][5] > 100  # torch alone takes more
    assert {
        "workload/mfu",
        "workload/time_ms/step",
        "workload/time_ms/data",
        "workload/time_ms/exchange",
        "workload/time_ms/dense",
        "workload/time_ms/optimizer",
    } <= set(found)
    timed = range(2, 33)  # the first step is start-up
    assert all(0 < found["workload/time_ms/forward"][step] < found["workload/time_ms/dense"][step] for step in timed)
    assert all(found["workload/slowest_rank"][step] in (0, 1) for step in timed)
    assert all(found["workload/median_rank_ms"][step] <= found["workload/slowest_rank_ms"][step] for step in timed)
    for tag in ("examples_per_second", "mfu", "time_ms/dense", "slowest_rank_ms"):
        assert set(found[f"workload/{tag}"]) == set(timed)
    assert 0 < found["workload/rows_used/least"][32] <= found["workload/rows_used/mean"][32] <= 1
    assert found["test/auc"] == {32: pytest.approx(written["test"]["auc"])}
    assert not [tag for tag in found if tag.startswith("Train/Samples")], "points on an axis of examples"
    best = min(found["valid/logloss"], key=found["valid/logloss"].__getitem__)
    assert written["step"] == best and written["valid"]["logloss"] == pytest.approx(found["valid/logloss"][best])

    lines = (tmp_path / "out/log.txt").read_text().splitlines()
    line = r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] \[INFO\] \[rank 0\] "
    assert all(re.match(line, text) for text in lines), lines
    assert re.fullmatch(line + f"test  at step {best}, the best by logloss: AUC .* calibration .*", lines[-2])
    assert re.fullmatch(line + re.escape(f"wrote {tmp_path / 'out/metrics.json'}"), lines[-1])
    leaked = {path.name for path in Path("/dev/shm").iterdir()} - before
    assert not {name for name in leaked if "deepspeed" in name}


@pytest.mark.parametrize(
    "topology",
    [pytest.param([], marks=pytest.mark.slow), ["parallel.tensor=2", "deepspeed.zero_optimization.stage=3"]],
    ids=str,
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    topology: list[str], pool: RankPool, data: Path, tmp_path: Path
) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    for directory in (whole, halves):
        directory.mkdir()
    pool.run(train_on_a_rank, write_config(whole, data), topology, False)
    path = write_config(halves, data)
    half = [*topology, "train.max_steps=11", "train.checkpoint_every=5"]  # ends mid-epoch
    pool.run(train_on_a_rank, path, half, False)
    pool.run(train_on_a_rank, path, topology, True)
    expected, found = scalars(whole), scalars(halves)
    assert len(expected["train/logloss"]) == 16
    for tag in ("train/logloss", "train/gradient_norm", "train/dense_learning_rate"):
        assert found[tag] == expected[tag]
    assert found["valid/logloss"][16] == expected["valid/logloss"][16]


@pytest.mark.parametrize(
    "topology",
    [
        ["deepspeed.zero_optimization.stage=3"],
        pytest.param(["parallel.tensor=2"], marks=pytest.mark.slow),
        pytest.param(["deepspeed.bf16.enabled=true"], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_what_is_tested_is_the_best_by_validation(
    topology: list[str], pool: RankPool, data: Path, tmp_path: Path
) -> None:
    path = write_config(tmp_path, data, epochs=6)
    tested = pool.run(train_on_a_rank, path, [*topology, "dense.learning_rate=0.2"], False)[0]["valid"]["logloss"]
    seen = scalars(tmp_path)["valid/logloss"]
    assert tested == pytest.approx(min(seen.values()), rel=1e-6)
    assert tested < seen[max(seen)], "the last validation must not be the best one for this to prove anything"


def train_by_another_clock(path: Path, overrides: list[str]) -> tuple[dict[str, Any], list[str]]:
    """A step takes 2 seconds, the first one a thousand; nothing else takes any."""
    logged, now, step = logged_lines(), [0.0], trainer.train_step
    clock = SimpleNamespace(perf_counter=lambda: now[0], time=time.time)

    def slow(*arguments: Any, **options: Any) -> Any:
        now[0] += 2.0 if now[0] else 1_000.0
        return step(*arguments, **options)

    trainer.train_step, step_log.time = slow, clock  # type: ignore[assignment]
    try:
        return train(load_config(path, overrides), resume=False, started=time.time()), logged
    finally:
        trainer.train_step, step_log.time = step, time  # type: ignore[attr-defined]


def test_rates_leave_the_start_up_out(pool: RankPool, data: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path, data, log_every=4, evaluate_every=3)
    metrics, logged = pool.run(train_by_another_clock, path, [])[0]
    rates = [line.rpartition("  ")[2] for line in logged if line.startswith("step ")]
    assert rates == ["50 examples/s"] * 4
    assert scalars(tmp_path)["workload/examples_per_second"] == dict.fromkeys((4, 8, 12, 16), 50.0)
    assert metrics["train"]["examples_per_second"] == 50.0

    metrics, logged = pool.run(train_by_another_clock, path, ["train.log_every=1", "train.max_steps=3"])[0]
    lines = [line for line in logged if line.startswith("step ")]
    assert re.fullmatch(r"step 1/3 .* AUC \S+", lines[0]) and all(
        line.endswith("  50 examples/s") for line in lines[1:]
    )
    assert metrics["train"]["examples_per_second"] == 50.0
    assert set(scalars(tmp_path)["workload/mfu"]) == {2, 3}

    metrics, _ = pool.run(train_by_another_clock, path, ["train.max_steps=1"])[0]
    assert metrics["train"]["examples_per_second"] is None and metrics["train"]["mfu"] is None


def test_a_resume_with_nothing_left_to_train_says_so(pool: RankPool, data: Path, tmp_path: Path) -> None:
    """At the last step, at a later one than the run has, and out of patience; the metrics stay."""
    wishes = {"evaluate_every": 2, "max_steps": 6, "keep_checkpoints": 9, "early_stopping": 3}
    path = write_config(tmp_path, data, **wishes)
    before = pool.run(train_on_a_rank, path, ["dense.learning_rate=0"], False)[0]
    for override, end in {
        "train.epochs=2": "step 6, and this run has 6; raise train.epochs or max_steps",
        "train.max_steps=4": "step 6, and this run has 4; raise train.epochs or max_steps",
    }.items():
        metrics, logged = pool.run(resume_on_a_rank, path, [override, "dense.learning_rate=0"])[0]
        (line,) = (line for line in logged if "NO STEP" in line)
        assert line == f"WARNING: NO STEP WILL BE MADE: step-000000006 is at {end}"
        assert metrics["test"] == before["test"] and metrics["train"]["examples_per_second"] is None
    for checkpoint in (tmp_path / "out/checkpoints").glob("step-*"):
        index = json.loads((checkpoint / "index.json").read_text())
        index["position"]["since_best"] = 3
        (checkpoint / "index.json").write_bytes(sealed(index))
    _, logged = pool.run(resume_on_a_rank, path, ["train.max_steps=8"])[0]
    assert any("NO STEP WILL BE MADE" in line and "3 validations brought no improvement" in line for line in logged)
    assert not [line for line in logged if line.startswith("step ")]


def test_resume_without_a_checkpoint_starts_from_scratch(pool: RankPool, data: Path, tmp_path: Path) -> None:
    metrics = pool.run(train_on_a_rank, write_config(tmp_path, data, max_steps=2), [], True)
    assert metrics[0]["train"]["steps"] == 2


def test_early_stopping_ends_the_run(pool: RankPool, data: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path, data, epochs=20, evaluate_every=4, early_stopping=2)
    overrides = ["dense.learning_rate=0.5", "schedule.plateau_patience=1"]
    metrics = pool.run(train_on_a_rank, path, overrides, False)
    assert metrics[0]["train"]["steps"] < 160
    rates = scalars(tmp_path)["train/dense_learning_rate"]
    assert min(rates.values()) == pytest.approx(0.15)  # one drop by plateau_factor 0.3 before it stopped


def test_deepspeeds_own_optimizer_keeps_its_learning_rate(pool: RankPool, data: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path, data, max_steps=2)
    run = json.loads(path.read_text())
    del run["dense"]
    run["schedule"] = {"decay": "linear", "final": 0.5}
    run["deepspeed"]["optimizer"] = {"type": "AdamW", "params": {"lr": 0.02, "torch_adam": True}}
    path.write_text(json.dumps(run))
    pool.run(train_on_a_rank, path, [], False)
    assert scalars(tmp_path)["train/dense_learning_rate"] == {1: pytest.approx(0.02), 2: pytest.approx(0.01)}


def error_on_a_rank(path: Path, overrides: list[str], resume: bool) -> str:
    """The message of the UserError that a run ends with; every rank meets it, so the pool stays whole."""
    try:
        train(load_config(path, overrides), resume=resume, started=time.time())
    except UserError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ('data.features=["single_0"]', "placement"),  # more ranks than tables
        ("data.batch_size=101", "data.batch_size=101 does not divide: 2 ranks x 1"),
        ("deepspeed.gradient_accumulation_steps=7", "data.batch_size=100 does not divide: 2 ranks x 7"),
        ("data.batch_size=1000", "exceeds the 800 training examples"),
        ("parallel.ranks_per_host=3", "parallel.ranks_per_host=3 does not divide the 2 ranks of the job"),
        ("data.path=nowhere", "nowhere/schema.json does not exist"),
        ("deepspeed.zero_optimization.stgae=2", "stgae"),
        ("embedding.features.single_9.width=4", "single_9"),
    ],
)
def test_mistakes_end_every_rank_with_one_line(
    pool: RankPool, data: Path, tmp_path: Path, override: str, expected: str
) -> None:
    for message in pool.run(error_on_a_rank, write_config(tmp_path, data), [override], False):
        assert expected in message
        assert "\n" not in message
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_one_process_trains_alone(rank_pool: Callable[[int], RankPool], data: Path, tmp_path: Path) -> None:
    metrics = rank_pool(1).run(train_on_a_rank, write_config(tmp_path, data, max_steps=3), [], False)
    assert metrics[0]["train"]["steps"] == 3
