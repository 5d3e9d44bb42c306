"""Whatever goes wrong in the thread that saves, the run goes on, with one line that says what and where."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megarec.checkpoint import publish
from megarec.distributed.rank_pool import RankPool
from megarec.run.state import TrainState
from tests.checkpoint.runs import build, store, train_steps, write_run
from tests.logged import logged_lines

FAILURES: dict[str, tuple[int, str, Exception]] = {  # by step: rank, function of publish.py that fails, with what
    "2": (1, "write_file", MemoryError("no room")),
    "3": (0, "write_file", ValueError("not\na line")),
    "4": (0, "sealed", TypeError("not JSON serializable")),
    "5": (1, "key_of", KeyError("dense/x")),
    "6": (0, "point", RuntimeError("a bug")),
}


def save_with_failures(path: Path) -> tuple[list[str], list[float]]:
    run, said = build(path, []), logged_lines()
    checkpoints, losses = store(run), []
    for step in range(1, 8):
        losses += train_steps(run, step - 1, step)
        rank, name, error = FAILURES.get(str(step), (-1, "write_file", ValueError()))
        works = getattr(publish, name)

        def fails(*_: Any, error: Exception = error) -> None:
            raise error

        if rank == run.topology.rank:
            setattr(publish, name, fails)
        checkpoints.save(TrainState(step=step))
        checkpoints.wait()
        setattr(publish, name, works)
    return said, losses


def test_no_error_of_a_save_ends_the_run(rank_pool: Callable[[int], RankPool], data: Path, tmp_path: Path) -> None:
    (said, losses), (others, _) = rank_pool(2).run(save_with_failures, write_run(tmp_path, data))
    assert len(losses) == 7 and others == [] and len(said) == 5
    expected = [
        r"STEP 2 WAS NOT SAVED (rank 1: MemoryError: no room in test_failing_saves.py:",
        r"STEP 3 WAS NOT SAVED (rank 0: ValueError: not\na line in test_failing_saves.py:",
        r"STEP 4 WAS NOT SAVED (rank 0: TypeError: not JSON serializable in test_failing_saves.py:",
        r"STEP 5 WAS NOT SAVED (rank 1: KeyError: 'dense/x' in test_failing_saves.py:",
        r"STEP 6 WAS NOT SAVED (rank 0: RuntimeError: a bug in test_failing_saves.py:",
    ]
    for line, text in zip(said, expected, strict=True):
        assert text in line and "training goes on, the latest checkpoint is " in line and "\n" not in line
    directory = tmp_path / "out/checkpoints"
    assert not list(directory.glob("*.tmp-*"))
    assert publish.pointed(directory, "latest") == "step-000000007"
