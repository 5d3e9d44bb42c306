"""A sweep in parts: task k of n runs its share of the trials, beside the others in the same directory.

A share follows from the study alone, so that no two tasks have a trial in common, whichever of them run and when. The
rows are files; without `--array` the same command collects them, and names the tasks whose rows are not all there.
"""

import fcntl
import os
import re
import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megarec.errors import UserError
from megarec.files import read_object, write_json
from megarec.scaling.grid import Trial
from megarec.scaling.results import Rows
from megarec.scaling.sweep import busy, folder_of, lock_of, stopped

NOTE = "array.json"
_SLURM = {name: f"SLURM_ARRAY_TASK_{name.upper()}" for name in ("id", "min", "max", "step", "count")}
_PATIENCE = 10.0  # seconds for another task that starts to let this one in


@dataclass(frozen=True)
class Share:
    """Task `number` of `count`, from 1."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def names(self, trials: list[Trial]) -> set[str]:
        """Of the trials of this task.

        Each one that chooses a learning rate counts by itself; the others of a model and seed, where only the one with
        the chosen rate will run, together. They go round the tasks by cost, so that all get as much.
        """
        groups: dict[tuple[str, int, int | None], list[Trial]] = {}
        for trial in trials:
            groups.setdefault((trial.model, trial.seed, trial.rate if trial.tuning else None), []).append(trial)
        ordered = sorted(groups.values(), key=lambda group: (not group[0].tuning, -group[0].gflop))
        return {trial.name for group in ordered[self.number - 1 :: self.count] for trial in group}


def share_of(text: str, environment: Mapping[str, str]) -> Share:
    """The share that `--array` names.

    Args:
        text: "3/16"; empty: as Slurm numbers the tasks of a job array.

    Raises:
        UserError: it is not a share.
    """
    if text:
        found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
        share = Share(int(found[1]), int(found[2])) if found else Share(0, 0)
        if not 1 <= share.number <= share.count:
            raise UserError(f"--array {text}: expected K/N, the K-th of N tasks, as 3/16")
        return share
    task = {}
    for name, variable in _SLURM.items():
        value = environment.get(variable)
        if value is None or not value.isdecimal():
            seen = "is not set" if value is None else f"is {value!r}"
            raise UserError(f"--array: {variable} {seen}: submit with sbatch --array=0-15, or say which task, as 3/16")
        task[name] = int(value)
    steps = (task["max"] - task["min"]) // max(task["step"], 1) + 1
    if steps != task["count"] or task["count"] == 1:
        raise UserError(
            f"--array: a job array of {task['count']} tasks, numbered {task['min']} to {task['max']}, is only a part "
            "of one; say which task of how many this is, as --array 3/16"
        )
    return Share((task["id"] - task["min"]) // task["step"] + 1, task["count"])


@contextmanager
def only_task_in(output: Path, share: Share) -> Iterator[None]:
    """Keep sweeps out that are not another task of the same array.

    Raises:
        UserError: such a sweep or this task is at work there already.
    """
    note = output / NOTE
    with lock_of(output / "lock") as lock, lock_of(output / f"lock-{share.number}-of-{share.count}") as own:
        deadline = time.monotonic() + _PATIENCE
        if _held(lock, fcntl.LOCK_EX):  # no other task is there
            write_json(note, {"count": share.count})
        while not _held(lock, fcntl.LOCK_SH):
            if time.monotonic() > deadline:
                raise busy(output)
            time.sleep(0.1)
        if (count := tasks_of(output)) != share.count:
            raise UserError(
                f"{output}: tasks of an array of {count} are at work there, not of {share.count}; wait for them"
            )
        if not _held(own, fcntl.LOCK_EX):
            raise UserError(f"{output}: task {share} is at work there already; wait for it, or start another one")
        yield


def _held(descriptor: int, how: int) -> bool:
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def tasks_of(output: Path) -> int | None:
    """How many tasks the array has that works in a directory; None: none did."""
    if not (output / NOTE).is_file():
        return None
    count = read_object(output / NOTE, "how many tasks a sweep's array has").get("count")
    if not isinstance(count, int) or count < 1:
        raise UserError(f"{output / NOTE}: count is {count!r}, expected the number of tasks; remove the file")
    return count


def waiting_for_rates(trials: list[Trial], rows: Rows, names: set[str]) -> list[str]:
    """Models with other seeds among these trials whose learning rates have not all been tried."""
    untried = {
        trial.model
        for trial in trials
        if trial.tuning and trial.name not in rows.of and not stopped(folder_of(rows.output, trial))
    }
    others = {trial.model for trial in trials if trial.name in names and trial.rate > 0 and not trial.tuning}
    return sorted(untried & others)


def missing(trials: list[Trial], rows: Rows, count: int) -> dict[Share, int]:
    """The tasks whose rows are not all there, with the number of runs to go.

    Of a model whose learning rates have not all been tried, the other seeds are one run a seed as well.
    """
    chosen = {model: rows.chosen_rate(model) or 0 for model in {trial.model for trial in trials}}
    found = {}
    for number in range(1, count + 1):
        share = Share(number, count)
        names = share.names(trials)
        left = sum(
            trial.name in names and trial.name not in rows.of and (trial.tuning or trial.rate == chosen[trial.model])
            for trial in trials
        )
        if left:
            found[share] = left
    return found


def command(program: str, study: Path, output: Path, share: Share) -> str:
    """The shell command for this task, from this directory, with this program's name."""
    words = ["python", os.path.relpath(program)] if program.endswith(".py") else program.split()
    return shlex.join([*words, "sweep", "--study", str(study), "--output", str(output), "--array", str(share)])
