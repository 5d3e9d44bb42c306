"""Whatever goes wrong in the thread that saves, the run goes on, with one line that says what and where."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megarec.checkpoint import publish
from megarec.checkpoint.snapshot import Snapshot
from megarec.distributed.rank_pool import RankPool
from megarec.run.state import TrainState
from tests.checkpoint.runs import build, store, train_steps, write_run
from tests.logged import logged_lines

FAILURES: dict[str, tuple[int, Any, str, Exception]] = {  # by step: rank, which function fails, with what
    "2": (1, publish, "write_file", MemoryError("no room")),
    "3": (0, publish, "write_file", ValueError("not\na line")),
    "4": (0, publish, "sealed", TypeError("not JSON serializable")),
    "5": (1, publish, "key_of", KeyError("dense/x")),
    "6": (0, publish, "point", RuntimeError("a bug")),
    "7": (1, Snapshot, "_copy", RuntimeError("cannot pin memory")),
}


def save_with_failures(path: Path) -> tuple[list[str], list[float]]:
    run, logged = build(path, []), logged_lines()
    checkpoints, losses = store(run), []
    for step in range(1, 9):
        losses += train_steps(run, step - 1, step)
        rank, owner, name, error = FAILURES.get(str(step), (-1, publish, "write_file", ValueError()))
        works = getattr(owner, name)

        def fails(*_: Any, error: Exception = error) -> None:
            raise error

        if rank == run.topology.rank:
            setattr(owner, name, fails)
        checkpoints.save(TrainState(step=step))
        checkpoints.wait()
        setattr(owner, name, works)
    return logged, losses


def test_no_error_of_a_save_ends_the_run(rank_pool: Callable[[int], RankPool], data: Path, tmp_path: Path) -> None:
    (logged, losses), (others, _) = rank_pool(2).run(save_with_failures, write_run(tmp_path, data))
    assert len(losses) == 8 and others == [] and len(logged) == 6
    expected = [
        r"STEP 2 WAS NOT SAVED (rank 1: MemoryError: no room in test_failing_saves.py:",
        r"STEP 3 WAS NOT SAVED (rank 0: ValueError: not\na line in test_failing_saves.py:",
        r"STEP 4 WAS NOT SAVED (rank 0: TypeError: not JSON serializable in test_failing_saves.py:",
        r"STEP 5 WAS NOT SAVED (rank 1: KeyError: 'dense/x' in test_failing_saves.py:",
        r"STEP 6 WAS NOT SAVED (rank 0: RuntimeError: a bug in test_failing_saves.py:",
        r"STEP 7 WAS NOT SAVED (rank 1: RuntimeError: cannot pin memory in test_failing_saves.py:",
    ]
    for line, text in zip(logged, expected, strict=True):
        assert text in line and "training goes on, the latest checkpoint is " in line and "\n" not in line
    directory = tmp_path / "out/checkpoints"
    assert not list(directory.glob("*.tmp-*"))
    assert publish.pointed(directory, "latest") == "step-000000008"
