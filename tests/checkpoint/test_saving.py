"""Saving and resuming whole runs: what is written, what is kept, and what happens when something goes wrong."""

import errno
import json
import re
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megarec.checkpoint import publish
from megarec.checkpoint.format import read_header, sealed
from megarec.checkpoint.pointers import name_of, pointed
from megarec.checkpoint.writing import file_entry
from megarec.config.load import load_config
from megarec.distributed.rank_pool import RankPool
from megarec.errors import UserError
from megarec.run.state import TrainState
from megarec.training.trainer import Trainer, train
from tests.checkpoint.runs import MODEL, TOWER_MODULE, TOWERS, build, leg, store, train_steps, write_run
from tests.logged import logged_lines

Pools = Callable[[int], RankPool]


def test_background_and_foreground_write_the_same_bytes(rank_pool: Pools, data: Path, tmp_path: Path) -> None:
    found = []
    for name, background in (("back", True), ("front", False)):
        out = {"output_dir": str(tmp_path / name / "out"), "background_checkpoints": background}
        path = write_run(tmp_path / name, data, train=out)
        rank_pool(2).run(partial(leg, load=False, save=True), path, [], 0, 2)
        directory = tmp_path / name / "out/checkpoints/step-000000002"
        index = json.loads((directory / "index.json").read_text())
        files = {file.name: file.read_bytes() for file in directory.glob("*.safetensors")}
        found.append((files, index["tensors"], index["files"]))
    assert found[0] == found[1]
    assert set(found[0][0]) == {"rank-00000.safetensors", "rank-00001.safetensors"}
    written = [size["bytes"] for size in found[0][2].values()]
    assert max(written) < 1.5 * min(written), "replicas are not shared out"


def full_on_rank_1(path: Path) -> tuple[list[str], list[str], list[float]]:
    """Save, save on a disk that is full for rank 1, train on, save again."""
    run, logged = build(path, []), logged_lines()
    checkpoints, write = store(run), publish.write_file
    train_steps(run, 0, 1)
    checkpoints.save(TrainState(step=1))
    checkpoints.wait()

    def full(target: Path, blocks: Any) -> Any:
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    train_steps(run, 1, 2)
    publish.write_file = full if run.topology.rank == 1 else write
    checkpoints.save(TrainState(step=2))
    checkpoints.wait()
    publish.write_file = write
    left = sorted(file.name for file in checkpoints.directory.iterdir()) if run.topology.rank == 0 else []
    losses = train_steps(run, 2, 3)
    checkpoints.save(TrainState(step=3), best=True)
    checkpoints.wait()
    return logged, left, losses


def test_a_full_disk_on_one_rank_ends_the_save_and_not_the_run(rank_pool: Pools, data: Path, tmp_path: Path) -> None:
    logged, left, losses = rank_pool(2).run(full_on_rank_1, write_run(tmp_path, data))[0]
    (line,) = logged
    assert "STEP 2 WAS NOT SAVED (rank 1: No space left on device)" in line
    assert line.endswith("latest checkpoint is " + str(tmp_path / "out/checkpoints/step-000000001"))
    assert left == ["latest", "step-000000001"]
    assert len(losses) == 1
    checkpoints = tmp_path / "out/checkpoints"
    assert publish.published(checkpoints) == ["step-000000003", "step-000000001"]
    assert pointed(checkpoints, "latest") == pointed(checkpoints, "best") == "step-000000003"


def test_a_disk_that_is_full(rank_pool: Pools, data: Path, tmp_path: Path, small_disk: Callable[[str], Path]) -> None:
    disk = small_disk("size=32k")
    path = write_run(tmp_path, data, train={"output_dir": str(disk / "out")})
    found = rank_pool(2).run(partial(leg, load=False, save=True), path, [], 0, 1)[0]
    (line,) = found.logged
    assert "No space left on device" in line and line.endswith("the latest checkpoint is none")
    assert list((disk / "out/checkpoints").iterdir()) == []


def no_directory(path: Path) -> tuple[list[str], float, list[float]]:
    """Save where no rank can make a directory, train on, save again where all can."""
    run, logged = build(path, []), logged_lines()
    checkpoints, mkdir = store(run), Path.mkdir

    def full(target: Path, *arguments: Any, **options: Any) -> None:
        if ".tmp-" in target.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        mkdir(target, *arguments, **options)

    Path.mkdir = full  # type: ignore[method-assign]
    began = time.monotonic()
    try:
        checkpoints.save(TrainState(step=1))
        checkpoints.wait()
    finally:
        Path.mkdir = mkdir  # type: ignore[method-assign]
    seconds = time.monotonic() - began
    losses = train_steps(run, 1, 2)
    checkpoints.save(TrainState(step=2))
    checkpoints.wait()
    return logged, seconds, losses


def test_a_failure_before_the_first_byte_ends_the_save_at_once(rank_pool: Pools, data: Path, tmp_path: Path) -> None:
    lines = list[str]()
    for logged, seconds, losses in rank_pool(2).run(no_directory, write_run(tmp_path, data)):
        assert seconds < 30.0 and len(losses) == 1
        assert all("STEP 1 WAS NOT SAVED (rank 0: [Errno 28] No space left on device)" in line for line in logged)
        lines += logged
    assert len(lines) == 1
    assert publish.published(tmp_path / "out/checkpoints") == ["step-000000002"]


def test_a_run_from_scratch_sets_the_earlier_one_aside_and_says_where(
    rank_pool: Pools, data: Path, copied: Path
) -> None:
    """Twice, and a third time after a run that was killed within its first save."""
    output = copied.parent / "out"
    (output / "metrics.json").write_text("of the first run")
    (output / "config.json").touch()
    logged = [rank_pool(2).run(run_training, copied, [], False, 2)[0].logged for _ in range(2)]
    shutil.rmtree(output / "checkpoints")
    (output / "checkpoints/step-000000002.tmp-1234").mkdir(parents=True)
    logged.append(rank_pool(2).run(run_training, copied, [], False, 2)[0].logged)
    announced = [[line for line in lines if "an earlier run is in" in line] for lines in logged]
    previous = [output / f"previous{end}" for end in ("", "-2", "-3")]
    assert [len(lines) for lines in announced] == [1, 1, 1]
    assert all(f"{path} now" in lines[0] for path, lines in zip(previous, announced, strict=True))
    assert "step-000000016" in publish.published(previous[0] / "checkpoints")
    assert (previous[0] / "metrics.json").read_text() == "of the first run" and not (output / "metrics.json").exists()
    assert publish.published(previous[1] / "checkpoints") == ["step-000000002"]
    assert not (previous[2] / "checkpoints").exists() and (previous[2] / "config.json").is_file()
    assert (output / "log.txt").read_text().count("starts from scratch") == 1
    assert (previous[1] / "tensorboard").is_dir()


class Interrupted(Exception):
    pass


class Ended(NamedTuple):
    """How a run ended on a rank: the UserError, if any, and the lines of its log."""

    error: str
    logged: list[str]


def run_training(path: Path, overrides: list[str], resume: bool, interrupt: int | None = None) -> Ended:
    """A whole run, or one that is interrupted right after the save of a step."""
    logged, save = logged_lines(), Trainer._save

    def interrupting(trainer: Trainer, best: bool) -> None:
        save(trainer, best)
        if trainer.state.step == interrupt:
            trainer.checkpoints.wait()
            trainer.prefetcher.drain()
            raise Interrupted

    Trainer._save = interrupting  # type: ignore[method-assign]
    try:
        train(load_config(path, overrides), resume=resume, started=time.time())
    except UserError as error:
        return Ended(str(error), logged)
    except Interrupted:
        return Ended("interrupted", logged)
    finally:
        Trainer._save = save  # type: ignore[method-assign]
    return Ended("", logged)


def training(directory: Path, data: Path, **sections: dict[str, Any]) -> Path:
    """16 steps in two epochs, a checkpoint every two, the log every four."""
    wishes = {"epochs": 2, "log_every": 4, "checkpoint_every": 2, "output_dir": str(directory / "out")}
    board = {"tensorboard": {"enabled": True}, "zero_optimization": {"stage": 2}}
    sections = {"train": wishes, "deepspeed": board, **sections}
    return write_run(directory, data, **{**sections, "data": {"batch_size": 100}})


def scalars(directory: Path, tag: str) -> dict[int, float]:
    events = EventAccumulator(str(directory / "out/tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


@pytest.fixture(scope="module")
def finished(rank_pool: Pools, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of 16 steps on two ranks."""
    directory = tmp_path_factory.mktemp("finished")
    assert rank_pool(2).run(run_training, training(directory, data), [], False)[0].error == ""
    return directory


@pytest.fixture
def copied(finished: Path, data: Path, tmp_path: Path) -> Path:
    """The config of a run that can resume from a copy of the finished run's checkpoints."""
    shutil.copytree(finished / "out/checkpoints", tmp_path / "out/checkpoints")
    return training(tmp_path, data)


def test_the_newest_and_the_best_are_kept(finished: Path) -> None:
    checkpoints = finished / "out/checkpoints"
    valid = scalars(finished, "valid/logloss")
    best = name_of(min(valid, key=lambda step: valid[step]))
    newest = {"step-000000014", "step-000000016"}
    assert set(publish.published(checkpoints)) == newest | {best}
    assert pointed(checkpoints, "latest") == "step-000000016"
    assert pointed(checkpoints, "best") == best
    assert {path.name for path in checkpoints.iterdir()} == {*newest, best, "latest", "best"}


def test_the_log_goes_on_in_the_middle_of_its_window(
    rank_pool: Pools, data: Path, finished: Path, tmp_path: Path
) -> None:
    """Stopped after 10 steps, two into a window of four: the line at 12 still covers four steps."""
    path = training(tmp_path, data)
    assert rank_pool(2).run(run_training, path, [], False, 10)[0].error == "interrupted"
    (tmp_path / "out/tensorboard").rename(tmp_path / "out/first")
    assert rank_pool(2).run(run_training, path, [], True)[0].error == ""
    for tag in ("train/logloss", "train/auc"):
        assert scalars(tmp_path, tag) == {step: scalars(finished, tag)[step] for step in (12, 16)}


def spoiled(checkpoints: Path, name: str) -> Path:
    path = checkpoints / name / "rank-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path


def test_a_damaged_checkpoint_is_refused_or_passed_over_when_asked(rank_pool: Pools, copied: Path) -> None:
    path = spoiled(copied.parent / "out/checkpoints", "step-000000016")
    for message, _ in rank_pool(2).run(run_training, copied, [], True):
        assert message.startswith(f"{path}: checksum ") and "\n" not in message
        assert message.endswith("train.fall_back=true resumes from step-000000014")
    error, logged = rank_pool(2).run(run_training, copied, ["train.fall_back=true"], True)[0]
    assert error == ""
    warning = next(line for line in logged if "FALLING BACK" in line)
    assert re.fullmatch(rf"WARNING: {path}: checksum .* FALLING BACK TO step-000000014 .*", warning)
    assert f"resumed from {path.parent.parent / 'step-000000014'}" in logged


def test_what_an_unfinished_save_left_is_removed(rank_pool: Pools, copied: Path) -> None:
    left = copied.parent / "out/checkpoints/step-000000018.tmp-1234"
    left.mkdir()
    (left / "rank-00000.safetensors").write_bytes(b"half")
    error, logged = rank_pool(2).run(run_training, copied, [], True)[0]
    assert error == "" and not left.exists()
    assert any(line.startswith(f"removed {left}") for line in logged)


SHAPES = {**MODEL, "num_fm": 3}


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        (
            {"model": SHAPES},
            r"dense/\S+ is \[.*\] there, \[.*\] in this run \(model.num_fm: \[?2\]? there, \[?3\]? here",
        ),
        ({"model": {**MODEL, "layers": 2}}, "dense/.* is not there, .*model.layers: 1 there, 2 here"),
        ({"dense": {"optimizer": "sgd"}}, "the dense optimizer was AdamW, this run's is SGD"),
        ({"embedding": {"optimizer": "sgd"}}, "rowwise_square_sum is there, but not in this run .*embedding.optimizer"),
        ({"embedding": {"weights": "fp16"}}, "weight is F32 there, torch.float16 in this run"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_run_of_another_model_is_refused(
    rank_pool: Pools, data: Path, copied: Path, sections: dict[str, Any], expected: str
) -> None:
    path = training(copied.parent, data, **sections)
    for message, _ in rank_pool(2).run(run_training, path, ["train.fall_back=true"], True):
        assert re.search(expected, message) and "step-000000016" in message and "\n" not in message


def test_a_best_of_another_metric_is_refused(rank_pool: Pools, copied: Path) -> None:
    """No LogLoss is below minus an AUC: training would end early, and an old model be tested."""
    for message, _ in rank_pool(2).run(run_training, copied, ["train.best_by=auc"], True):
        assert message.startswith(str(copied.parent / "out/checkpoints/step-000000016")) and "\n" not in message
        assert "chosen by train.best_by=logloss, this run asks for auc; resume with train.best_by=logloss" in message
    for path in (copied.parent / "out/checkpoints").glob("*/index.json"):  # as an earlier version wrote them
        index = json.loads(path.read_text())
        assert index["position"].pop("best_by") == "logloss"
        path.write_bytes(sealed(index))
    assert rank_pool(2).run(run_training, copied, ["train.best_by=auc"], True)[0].error == ""


def test_a_run_on_other_data_is_refused(rank_pool: Pools, data: Path, copied: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(data, other)
    schema = json.loads((other / "schema.json").read_text())
    schema["categorical"][1]["rows"] += 1
    (other / "schema.json").write_text(json.dumps(schema))
    name = schema["categorical"][1]["name"]
    for message, _ in rank_pool(2).run(run_training, copied, [f"data.path={other}"], True):
        assert f"other data: schema.categorical.{name}.rows is" in message


def test_other_towers_are_refused_unless_their_modules_may_start_from_scratch(
    rank_pool: Pools, data: Path, tmp_path: Path
) -> None:
    def path_of(towers: list[list[str]]) -> Path:
        return write_run(tmp_path, data, parallel={"towers": towers}, tower_module=TOWER_MODULE)

    swapped = [[*TOWERS[0][:1], TOWERS[1][0], TOWERS[0][2]], [TOWERS[0][1], *TOWERS[1][1:]]]
    rank_pool(2).run(partial(leg, load=False, save=True), path_of(TOWERS), [], 0, 2)
    path = path_of(swapped)
    for message in rank_pool(2).run(load_error, path, []):
        assert "tower modules were trained for towers [['single_0'" in message and "reset_towers" in message
    found = rank_pool(2).run(tables_and_towers, path, ["train.reset_towers=true"])[0]
    assert found["tables"] and found["fresh"]
    assert any("tower modules start from scratch" in line for line in found["logged"])


def load_error(path: Path, overrides: list[str]) -> str:
    try:
        store(build(path, overrides)).load(2)
    except UserError as error:
        return str(error)
    return ""


def tables_and_towers(path: Path, overrides: list[str]) -> dict[str, Any]:
    """After a load: did the tables change, and are the modules as they were?"""
    run, logged = build(path, overrides), logged_lines()
    assert run.sparse.modules is not None

    def copies(state: dict[str, Any]) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in state.items()}

    tables = copies({name: tensor for name, (_, tensor) in run.sparse.state().items() if name.endswith("weight")})
    modules = copies(run.sparse.modules.state_dict())
    store(run).load(2)
    after = {name: tensor for name, (_, tensor) in run.sparse.state().items()}
    same = [torch.equal(tensor, run.sparse.modules.state_dict()[name]) for name, tensor in modules.items()]
    changed = [not torch.equal(tensor, after[name]) for name, tensor in tables.items()]
    return {"tables": all(changed), "fresh": all(same), "logged": logged}


def load_of_other_bytes(path: Path, key: str, content: bytes) -> tuple[str, bool]:
    """Save, put other bytes into a tensor, load: the message, and whether tables and torch's generator stay."""
    run = build(path, [])
    checkpoints, directory = store(run), Path(run.config.train.output_dir) / "checkpoints/step-000000002"
    train_steps(run, 0, 2)
    checkpoints.save(TrainState(step=2))
    checkpoints.wait()
    file = directory / "rank-00000.safetensors"
    found = {name: tensor for name, tensor in read_header(file).items() if name.startswith(key)}
    (at,) = found.values()
    raw = bytearray(file.read_bytes())
    size = torch.Size(at.shape).numel() * at.dtype.itemsize
    raw[at.start : at.start + size] = (content * size)[:size]
    file.write_bytes(raw)
    index = json.loads((directory / "index.json").read_text())
    index["files"][file.name] = file_entry(file).model_dump()
    (directory / "index.json").write_bytes(sealed(index))
    for _, tensor in run.sparse.state().values():
        tensor.zero_()
    state, message = torch.get_rng_state(), ""
    try:
        checkpoints.load(2)
    except UserError as error:
        message = str(error)
    changed = any(bool(tensor.any()) for _, tensor in run.sparse.state().values())
    return message, not changed and torch.equal(state, torch.get_rng_state())


def test_a_state_of_no_generator_is_refused_before_anything_changes(
    rank_pool: Pools, data: Path, tmp_path: Path
) -> None:
    """torch's own word for it was a traceback, after the tables had been loaded."""
    path = write_run(tmp_path, data)
    message, stays = rank_pool(1).run(load_of_other_bytes, path, "random/cpu", b"ab")[0]
    directory = tmp_path / "out/checkpoints/step-000000002"
    assert message == f"{directory}: random/cpu is not the state of a generator" and stays
