"""Whole runs that meet faults and signals: what they skip, where they go back to, how they end, what they leave."""

import itertools
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megarec.config.load import load_config
from megarec.data.batch import Batch
from megarec.data.loader import TrainLoader
from megarec.data.sources.synthetic import Shape, prepare_synthetic
from megarec.dense.masters import unsharded_states
from megarec.dense.tensor_parallel import is_sharded
from megarec.distributed.rank_pool import RankPool
from megarec.errors import DONE, PREEMPTED, STOPPED, RunEnded
from megarec.run.build import Run
from megarec.training import trainer
from megarec.training.faults.replicas import differing_ranks, hash_of
from tests.checkpoint.runs import TOWER_MODULE, TOWERS, write_run
from tests.logged import logged_lines

STEPS = 16


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fault_runs") / "data"
    prepare_synthetic(Shape(examples=1_000, seed=2), path)
    return path


@dataclass
class Plan:
    """What happens on which rank, as the run goes.

    Attributes:
        bad: steps (from 0) whose batches have a label that is NaN on rank 1; None: all from step 5 on.
        flipped: steps whose labels are turned round on all ranks.
        signals: (rank, moment): "start", "validation" or "save", at which it is sent SIGUSR1.
        corrupt: (rank, a place that `_flip_a_bit` knows) at the first comparison of replicas.
        poison: the step whose save finds a table full of NaN; 0: none.
    """

    bad: list[int] | None = field(default_factory=list)
    flipped: list[int] = field(default_factory=list)
    signals: list[tuple[int, str]] = field(default_factory=list)
    corrupt: tuple[int, str] | None = None
    poison: int = 0


@dataclass
class End:
    """How a run ended on a rank, and its log."""

    code: int
    reason: str
    logged: list[str]


def run_it(path: Path, overrides: list[str], plan: Plan, resume: bool = False) -> End:
    logged = logged_lines()
    with pytest.MonkeyPatch.context() as patch:
        _plant(patch, plan)
        try:
            trainer.train(load_config(path, overrides), resume=resume, started=time.time())
        except RunEnded as ended:
            return End(ended.code, str(ended), logged)
    return End(DONE, "", logged)


def _plant(patch: pytest.MonkeyPatch, plan: Plan) -> None:
    rank = int(os.environ["RANK"])
    batches, evaluate, save, compare = (
        TrainLoader.batches, trainer.evaluate, trainer.Trainer._save, trainer.differing_replicas,
    )  # fmt: skip

    def planted(loader: TrainLoader, epoch: int, start: int = 0) -> Iterator[Batch]:
        for index, batch in zip(itertools.count(start), batches(loader, epoch, start), strict=False):
            step, labels = epoch * loader.steps_per_epoch + index, batch.labels.clone()
            if rank == 1 and (step >= 5 if plan.bad is None else step in plan.bad):
                labels[7] = torch.nan
            if step in plan.flipped:
                labels = 1 - labels
            yield Batch(batch.numeric, batch.ids, labels, batch.keys, batch.valid)

    def signalled(moment: str) -> None:
        for planned in [planned for planned in plan.signals if planned == (rank, moment)]:
            plan.signals.remove(planned)
            os.kill(os.getpid(), signal.SIGUSR1)

    def evaluating(run: Run, loader: Any) -> Any:
        signalled("validation")
        return evaluate(run, loader)

    def saving(loop: trainer.Trainer, best: bool) -> None:
        if loop.state.step == plan.poison:
            plan.poison = 0
            for name, (_, tensor) in loop.run.sparse.state().items():
                if name == "single_1/weight":
                    tensor.detach().fill_(torch.nan)
        save(loop, best)
        signalled("save")

    def comparing(run: Run) -> str | None:
        if plan.corrupt is not None and plan.corrupt[0] == rank:
            _flip_a_bit(run, plan.corrupt[1])
        return compare(run)

    patch.setattr(TrainLoader, "batches", planted)
    patch.setattr(trainer, "evaluate", evaluating)
    patch.setattr(trainer.Trainer, "_save", saving)
    patch.setattr(trainer, "differing_replicas", comparing)
    build = trainer.build_run

    def building(*args: Any, **named: Any) -> Run:
        signalled("start")
        return build(*args, **named)

    patch.setattr(trainer, "build_run", building)


@torch.no_grad()
def _flip_a_bit(run: Run, where: str) -> None:
    if where == "dense":
        *_, tensor = run.dense.module.parameters()
    elif where == "sharded":
        tensor = next(parameter for parameter in run.dense.module.parameters() if is_sharded(parameter))
    elif where in ("exp_avg", "master"):
        held = {(name, state): values for name, state, values in unsharded_states(run.dense.engine, run.topology)}
        tensor = next(values for (_, state), values in held.items() if state == where)
    elif where == "tower":
        assert run.sparse.modules is not None
        tensor = next(run.sparse.modules.bank.parameters())
    else:
        _, tensor = run.sparse.state()["single_1/weight"]
    tensor.detach().view(-1)[:1].view(torch.int32).bitwise_xor_(1)


def scalars(directory: Path) -> dict[str, dict[int, float]]:
    events = EventAccumulator(str(directory / "out" / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def config(directory: Path, data: Path, /, faults: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Path:
    """16 steps in two epochs of eight; a checkpoint every two, validation every four."""
    train = {"epochs": 2, "log_every": 1, "evaluate_every": 4, "checkpoint_every": 2, "peak_tflops": 1.0}
    sections["train"] = {**train, "output_dir": str(directory / "out"), "faults": faults or {}} | sections.get(
        "train", {}
    )
    sections["data"] = {"path": str(data), "batch_size": 100}
    engine = {"zero_optimization": {"stage": 2}, "tensorboard": {"enabled": True}}
    sections["deepspeed"] = engine | sections.get("deepspeed", {})
    return write_run(directory, data, **sections)


@pytest.fixture
def run(rank_pool: Callable[[int], RankPool]) -> Callable[..., list[End]]:
    return lambda path, plan, resume=False, ranks=2: rank_pool(ranks).run(run_it, path, [], plan, resume)


Runner = Callable[..., list[End]]


@pytest.fixture(scope="module")
def skipping(rank_pool: Callable[[int], RankPool], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that skips steps 6 and 7 (counted from 1)."""
    directory = tmp_path_factory.mktemp("skipping")
    ends = rank_pool(2).run(run_it, config(directory, data), [], Plan(bad=[5, 6]), False)
    assert [end.code for end in ends] == [DONE, DONE]
    assert any(
        "FAULTY STEP 6, NOTHING WAS CHANGED: a loss that is not finite: rank 1: loss" in t for t in ends[0].logged
    )
    assert any("NO CHECKPOINT OF STEP 6" in text for text in ends[0].logged)
    return directory


def test_skipped_steps_are_counted_and_the_state_is_good(skipping: Path) -> None:
    summary = json.loads((skipping / "out/metrics.json").read_text())
    assert summary["train"]["skipped_steps"] == 2 and summary["train"]["skipped_by_cause"] == {"loss": 2}
    found = scalars(skipping)
    assert [found["train/skipped_steps"][step] for step in (5, 6, 7, 16)] == [0, 1, 2, 2]
    assert found["train/skipped_steps/loss"][16] == 2
    assert set(range(1, STEPS + 1)) - set(found["train/logloss"]) == {6, 7}
    assert summary["test"]["logloss"] < 1


def test_after_n_in_a_row_the_run_stops(run: Runner, data: Path, tmp_path: Path) -> None:
    path = config(tmp_path, data, faults={"max_in_a_row": 3}, train={"evaluate_every": STEPS})
    for end in run(path, Plan(bad=[5, 7, 8, 9])):
        assert end.code == STOPPED
        assert end.reason.startswith("stopped by the fault policy at step 10: 3 faulty steps in a row")
        assert "rank 1: loss is nan" in end.reason
    assert scalars(tmp_path)["train/skipped_steps"][10] == 4
    summary = json.loads((tmp_path / "out/metrics.json").read_text())
    assert summary["train"]["skipped_by_cause"] == {"loss": 4} and summary["stopped"] == end.reason
    assert "test" not in summary, "nothing was tested"
    assert (tmp_path / "out/checkpoints/latest").read_text().strip() == "step-000000007", "put off from step 6"


@pytest.mark.slow  # a second way to end with the fault policy
def test_a_run_whose_last_steps_were_faulty_is_not_done(run: Runner, data: Path, tmp_path: Path) -> None:
    """Fewer than max_in_a_row, but no step will come that could end the row."""
    path = config(tmp_path, data, faults={"max_in_a_row": 10}, train={"evaluate_every": STEPS})
    for end in run(path, Plan(bad=[STEPS - 2, STEPS - 1])):
        assert end.code == STOPPED
        assert end.reason.startswith(f"stopped by the fault policy at step {STEPS}: the last 2 steps of the run were")
    summary = json.loads((tmp_path / "out/metrics.json").read_text())
    assert summary["stopped"] == end.reason and "test" not in summary
    assert run(config(tmp_path, data, faults={"max_in_a_row": 10}), Plan(bad=[STEPS - 1]))[0].code == DONE


def test_a_rollback_goes_on_without_the_faulty_batches(run: Runner, data: Path, tmp_path: Path, skipping: Path) -> None:
    path = config(tmp_path, data, faults={"max_in_a_row": 2, "then": "rollback"}, parallel={"overlap": True})
    ends = run(path, Plan(bad=[5, 6]))
    assert [end.code for end in ends] == [DONE, DONE]
    assert any("ROLLED BACK FROM STEP 7 TO step-000000004" in text for text in ends[0].logged)
    mine, skipped = scalars(tmp_path), scalars(skipping)
    for tag in (
        "train/logloss",
        "train/gradient_norm",
        "valid/logloss",
    ):  # a good state had come back, and data with it
        assert mine[tag] == skipped[tag]
    summary = json.loads((tmp_path / "out/metrics.json").read_text())["train"]
    assert summary["rollbacks"] == 1 and summary["skipped_by_cause"] == {"left_out": 2}


def test_a_poisoned_state_is_not_published_and_a_rollback_heals_it(run: Runner, data: Path, tmp_path: Path) -> None:
    path = config(tmp_path, data, faults={"max_in_a_row": 2, "then": "rollback"})
    ends = run(path, Plan(poison=6))
    assert [end.code for end in ends] == [DONE, DONE]
    log = "\n".join(ends[0].logged)
    assert "CHECKPOINT OF STEP 6 WAS NOT SAVED (rank " in log
    (line,) = (text for text in ends[0].logged if "WAS NOT SAVED" in text)
    assert "rank 1: table/single_1/weight@0,0 has numbers that are not finite" in line
    assert "embeddings of feature single_1 are not finite in" in log
    assert "ROLLED BACK FROM STEP 8 TO step-000000004" in log
    summary = json.loads((tmp_path / "out/metrics.json").read_text())
    assert summary["train"]["skipped_by_cause"] == {"left_out": 2} and summary["test"]["logloss"] < 1


def test_rollbacks_come_to_an_end(run: Runner, data: Path, tmp_path: Path) -> None:
    path = config(tmp_path, data, faults={"max_in_a_row": 1, "then": "rollback", "max_rollbacks": 2})
    ends = run(path, Plan(bad=None))
    assert [end.code for end in ends] == [STOPPED, STOPPED]
    assert "after 2 rollbacks" in ends[1].reason
    assert sum("ROLLED BACK" in text for text in ends[0].logged) == 2


@pytest.mark.parametrize(("then", "code"), [pytest.param("skip", DONE, marks=pytest.mark.slow), ("stop", STOPPED)])
def test_a_spike_is_skipped_or_stops(then: str, code: int, run: Runner, data: Path, tmp_path: Path) -> None:
    faults = {"spike": then, "spike_window": 5, "spike_deviations": 1.0}
    path = config(tmp_path, data, faults=faults, embedding={"learning_rate": 0.5}, dense={"learning_rate": 0.05})
    ends = run(path, Plan(flipped=[12]))
    assert [end.code for end in ends] == [code, code]
    assert any("FAULTY STEP 13" in text and "a loss far above those before it" in text for text in ends[0].logged)
    assert scalars(tmp_path)["train/skipped_steps/spike"][13] >= 1


def test_a_spike_rolls_back_and_its_batch_is_left_out(run: Runner, data: Path, tmp_path: Path) -> None:
    faults = {"spike": "rollback", "spike_window": 5, "spike_deviations": 20.0}
    path = config(tmp_path, data, faults=faults, embedding={"learning_rate": 0.5}, dense={"learning_rate": 0.05})
    ends = run(path, Plan(flipped=[12]))
    assert [end.code for end in ends] == [DONE, DONE]
    assert any("ROLLED BACK FROM STEP 13 TO step-000000012" in text for text in ends[0].logged)
    summary = json.loads((tmp_path / "out/metrics.json").read_text())["train"]
    assert summary["rollbacks"] == 1 and summary["skipped_by_cause"] == {"left_out": 1}


@pytest.mark.parametrize(
    "signals",
    [
        pytest.param([(1, "start")], marks=pytest.mark.slow),
        pytest.param([(0, "validation"), (1, "validation")], marks=pytest.mark.slow),
        [(0, "save")],
    ],
    ids=["before the first step", "during validation, both", "during a save, rank 0"],
)
def test_a_signal_saves_and_the_resumed_run_is_the_uninterrupted_one(
    signals: list[tuple[int, str]], run: Runner, data: Path, tmp_path: Path, skipping: Path
) -> None:
    path, plan = config(tmp_path, data), Plan(bad=[5, 6], signals=signals)
    first = {"start": 1, "validation": 5, "save": 3}[signals[0][1]]
    for end in run(path, plan):
        assert end.code == PREEMPTED
        assert end.reason.startswith(f"pre-empted by SIGUSR1 at step {first}, saved at step {first}: resumable")
    assert [end.code for end in run(path, Plan(bad=[5, 6]), resume=True)] == [DONE, DONE]
    mine, whole = scalars(tmp_path), scalars(skipping)
    for tag in ("train/logloss", "train/gradient_norm", "valid/logloss", "train/skipped_steps"):
        assert mine[tag] == whole[tag]


@pytest.mark.slow  # as a signal during validation
def test_a_signal_where_a_validation_is_due_leaves_it_to_the_resumed_run(
    run: Runner, data: Path, tmp_path: Path, skipping: Path
) -> None:
    path = config(tmp_path, data, train={"evaluate_every": 1})
    assert {end.code for end in run(path, Plan(signals=[(1, "validation")]))} == {PREEMPTED}
    assert set(scalars(tmp_path)["valid/logloss"]) == {1}
    assert {end.code for end in run(path, Plan(), resume=True)} == {DONE}
    assert set(scalars(tmp_path)["valid/logloss"]) == set(range(1, STEPS + 1))


@pytest.mark.parametrize("where", ["dense", "table"])
def test_a_flipped_bit_in_a_replica_stops_the_run(where: str, run: Runner, data: Path, tmp_path: Path) -> None:
    path = config(tmp_path, data, train={"verify_replicas_every": 3}, embedding={"placement": "replicated"})
    assert {end.code for end in run(path, Plan())} == {DONE}
    for end in run(path, Plan(corrupt=(1, where))):
        assert end.code == STOPPED
        assert "at step 3" in end.reason and "ranks 0, 1 (no majority tells which)" in end.reason
        assert ("table single_1/weight" if where == "table" else "head") in end.reason


@pytest.mark.parametrize(
    ("where", "stage", "more"),
    [
        pytest.param("exp_avg", 0, {}, marks=pytest.mark.slow),
        pytest.param("master", 0, {"bf16": {"enabled": True}}, marks=pytest.mark.slow),
        ("dense", 3, {}),  # a small parameter, which ZeRO-3 keeps whole
    ],
)
def test_a_flipped_bit_in_what_a_stage_holds_in_copies_stops_the_run(
    where: str, stage: int, more: dict[str, Any], run: Runner, data: Path, tmp_path: Path
) -> None:
    section = {"zero_optimization": {"stage": stage}, **more}
    path = config(tmp_path, data, train={"verify_replicas_every": 3}, deepspeed=section)
    assert {end.code for end in run(path, Plan())} == {DONE}
    for end in run(path, Plan(corrupt=(1, where))):
        assert end.code == STOPPED and "ranks 0, 1 (no majority tells which)" in end.reason
        assert ("head" if where == "dense" else f"/{where}") in end.reason


def test_a_flipped_bit_in_a_tensor_parallel_shard_names_its_data_group(run: Runner, data: Path, tmp_path: Path) -> None:
    path = config(tmp_path, data, train={"verify_replicas_every": 2}, parallel={"tensor": 2})
    for end in run(path, Plan(corrupt=(3, "sharded")), ranks=4):
        assert end.code == STOPPED and "ranks 1, 3 (no majority tells which)" in end.reason


def test_a_flipped_bit_in_a_tower_module_names_its_replicas(run: Runner, data: Path, tmp_path: Path) -> None:
    train = {"verify_replicas_every": 2}
    towers = {"exchange": "tower", "ranks_per_host": 2, "towers": TOWERS}
    path = config(tmp_path, data, train=train, parallel=towers, tower_module=TOWER_MODULE)
    for end in run(path, Plan(corrupt=(3, "tower")), ranks=4):
        assert end.code == STOPPED and "ranks 2, 3" in end.reason and "towers.1." in end.reason


def test_a_majority_names_the_culprit() -> None:
    assert differing_ranks([7, 7, 9], [0, 2, 4]) == "rank 4 against 2 others: another copy of"
    assert differing_ranks([7, 9, 7, 8, 7], [0, 1, 2, 3, 4]) == "ranks 1, 3 against 3 others: another copy of"
    assert differing_ranks([7, 9], [4, 5]).startswith("ranks 4, 5 (no majority")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.bool])
def test_the_hash_sees_any_flipped_bit_and_any_exchange(dtype: torch.dtype) -> None:
    tensor = torch.randn(3, 50, generator=torch.Generator().manual_seed(1)).to(dtype)
    before = int(hash_of(tensor))
    assert int(hash_of(tensor.clone())) == before
    raw = tensor.view(-1).view(torch.uint8)
    for byte in range(0, raw.numel(), 7):
        for bit in range(8 if dtype != torch.bool else 1):
            raw[byte] ^= 1 << bit
            assert int(hash_of(tensor)) != before
            raw[byte] ^= 1 << bit
    if dtype != torch.bool:
        tensor[0, 0], tensor[2, 3] = tensor[2, 3].clone(), tensor[0, 0].clone()
        assert int(hash_of(tensor)) != before
