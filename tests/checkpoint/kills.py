"""Kill -9 at random moments, saves in flight included: every restart resumes, and the end is that of a run that was
never killed, bit for bit.

PYTHONPATH=. python tests/checkpoint/kills.py --kills 200 --seed 1

Two ranks train, each forked from this process, which has everything imported: a restart takes a second. A moment is
drawn over the time that a run can take, and for every other kill, the last one among them, over some time after the
attempt's first save: so kills hit starts as well as saves, however slow the machine. One rank or both die, the other
follows as a launcher would have it. When a run has reached its end, another one begins, until there were enough kills.
"""

import argparse
import importlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megarec.checkpoint.format import read_index
from megarec.checkpoint.pointers import LATEST, name_of, pointed
from megarec.checkpoint.reading import verify
from megarec.config.load import load_config
from megarec.data.sources.synthetic import Shape, prepare_synthetic
from megarec.training.trainer import train
from tests.checkpoint.runs import MODEL

RANKS, STEPS = 2, 48
MODULES = "modules.txt"
PATIENCE = 600.0  # seconds that an attempt may take, on a machine that others use as well


@dataclass
class Report:
    kills: int = 0
    runs: int = 0
    resumed: list[int] = field(default_factory=list)  # the step that each restart resumed from
    in_flight: int = 0  # kills that left a temporary directory behind


def write_run(directory: Path, data: Path) -> Path:
    run: dict[str, Any] = {
        "model": MODEL,
        "data": {"path": str(data), "batch_size": 100},
        "embedding": {"learning_rate": 0.1},
        "dense": {"learning_rate": 0.01},
        "train": {
            "epochs": STEPS // 8,
            "log_every": 5,
            "evaluate_every": 12,
            "checkpoint_every": 2,
            "peak_tflops": 1.0,
            "output_dir": str(directory / "out"),
        },
        "deepspeed": {"zero_optimization": {"stage": 2}},
    }
    directory.mkdir(parents=True)
    path = directory / "run.json"
    path.write_text(json.dumps(run))
    return path


def start(path: Path, attempt: int) -> list[int]:
    """Fork the ranks of one attempt; returns their process ids."""
    processes = []
    for rank in range(RANKS):
        process = os.fork()
        if process == 0:
            code = 1
            try:
                live(path, attempt, rank)
                code = 0
            finally:
                os._exit(code)
        processes.append(process)
    return processes


def live(path: Path, attempt: int, rank: int) -> None:
    """A rank's life."""
    log = os.open(path.parent / f"attempt-{attempt}.rank-{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(RANKS))
    store = dist.FileStore(str(path.parent / f"store-{attempt}"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    torch.set_num_threads(1)
    train(load_config(path, []), resume=True, started=time.time())
    sys.stdout.flush()
    if rank == 0:
        (path.parent / MODULES).write_text("\n".join(sys.modules))


def import_what_a_run_imports(directory: Path, data: Path) -> None:
    """Libraries import much on first use, which takes a rank longer than all its steps: do it before forking."""
    path = write_run(directory / "imports", data)
    run_to_the_end(path, 0)
    for name in (path.parent / MODULES).read_text().splitlines():
        with suppress(ImportError):  # names that libraries put into sys.modules without a file behind them
            importlib.import_module(name)


def wait(processes: list[int], seconds: float, until: Callable[[], bool] = lambda: False) -> list[int]:
    """Wait until all have ended, or for some time or event; returns those still alive. A rank that failed raises."""
    deadline, alive = time.monotonic() + seconds, list(processes)
    while alive and time.monotonic() < deadline and not until():
        for process in list(alive):
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                alive.remove(process)
                if status:
                    end(alive)
                    raise RuntimeError(f"a rank ended by itself with status {status}")
        time.sleep(0.002)
    return alive


def run_to_the_end(path: Path, attempt: int) -> float:
    """Seconds that it took."""
    began = time.monotonic()
    alive = wait(start(path, attempt), PATIENCE)
    end(alive)
    assert not alive, f"{path.parent}: attempt {attempt} did not end"
    return time.monotonic() - began


def end(processes: list[int]) -> None:
    for process in processes:
        os.kill(process, signal.SIGKILL)
    for process in processes:
        os.waitpid(process, 0)


def final_state(path: Path) -> tuple[Any, ...]:
    """Test and validation metrics, and checksums of the last checkpoint: weights, optimizers, tables, log window."""
    out = path.parent / "out"
    metrics = json.loads((out / "metrics.json").read_text())
    index = read_index(out / "checkpoints" / name_of(STEPS))
    return metrics["test"], metrics["valid"], {name: entry.xxh3 for name, entry in index.files.items()}


def wait_for_save(processes: list[int], path: Path) -> list[int]:
    """Wait until `latest` names another checkpoint than now; returns the processes still alive."""
    pointer = path.parent / "out/checkpoints" / LATEST

    def text() -> str:
        return pointer.read_text() if pointer.is_file() else ""

    before = text()
    return wait(processes, PATIENCE, until=lambda: text() != before)


def latest_step(path: Path) -> int:
    """The step that `latest` names, after proof that the checkpoint is whole; 0 without one."""
    checkpoints = path.parent / "out/checkpoints"
    pointer = checkpoints / LATEST
    if not pointer.is_file():
        return 0
    name = pointed(checkpoints, LATEST)
    assert name is not None, f"latest names {pointer.read_text()!r}, which is not there"
    verify(checkpoints / name, read_index(checkpoints / name))
    return int(name.removeprefix("step-"))


def resumed_step(path: Path, attempt: int) -> int | None:
    """The step that an attempt resumed from; 0: it started from scratch; None: it did not get that far."""
    for line in (path.parent / f"attempt-{attempt}.rank-0.log").read_text().splitlines():
        if "[rank 0] resumed from" in line:
            return int(line.rpartition("step-")[2])
        if line.endswith("[rank 0] starting from scratch"):
            return 0
    return None


def torture(directory: Path, kills: int, seed: int) -> Report:
    """Run, kill, resume; asserts at every turn."""
    data, dice, report = directory / "data", random.Random(seed), Report()
    prepare_synthetic(Shape(examples=1_000, seed=2), data)  # 800 train
    import_what_a_run_imports(directory, data)
    reference = write_run(directory / "reference", data)
    whole = run_to_the_end(reference, 0)
    expected = final_state(reference)
    while report.kills < kills:
        path = write_run(directory / f"run-{report.runs}", data)
        attempt = published = 0
        while True:
            began = time.monotonic()
            processes = start(path, attempt)
            last_of_run = report.kills == kills
            if last_of_run:
                alive = wait(processes, PATIENCE)
            elif (kills - report.kills) % 2:
                alive = wait(wait_for_save(processes, path), dice.uniform(0.0, whole / 4))
            else:
                alive = wait(processes, dice.uniform(0.0, whole))
            resumed = resumed_step(path, attempt) if (path.parent / f"attempt-{attempt}.rank-0.log").exists() else None
            if not alive:
                whole = min(whole, time.monotonic() - began) if attempt == 0 else whole
                break
            if last_of_run:
                end(alive)
                raise AssertionError("the run did not end")
            first = dice.sample(alive, dice.randint(1, len(alive)))
            end(first)
            time.sleep(dice.uniform(0.0, 0.2))
            end([process for process in alive if process not in first])
            report.kills += 1
            resumed = resumed_step(path, attempt)
            assert resumed in (None, published), f"resumed from {resumed}, {published} was published"
            report.resumed += [resumed] if resumed else []
            report.in_flight += any((path.parent / "out/checkpoints").glob("*.tmp-*"))
            now = latest_step(path)
            assert now >= published, f"step {published} was published and is lost"
            attempt, published = attempt + 1, now
        assert resumed == published, f"resumed from {resumed}, {published} was published"
        report.resumed += [resumed] if resumed else []
        assert final_state(path) == expected, f"{path.parent} ended otherwise than {reference.parent}"
        report.runs += 1
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill a job at random moments, and prove that it does not matter.")
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="megarec-kills-") as directory:
        report = torture(Path(directory), arguments.kills, arguments.seed)
    print(json.dumps({"kills": report.kills, "runs": report.runs, "in_flight": report.in_flight,
                      "resumed": len(report.resumed), "steps": sorted(set(report.resumed))}))  # fmt: skip


if __name__ == "__main__":
    main()
