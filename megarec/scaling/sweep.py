"""Runs a sweep's trials, some at a time, here, on hosts or on a Ray cluster; goes on where an earlier sweep ended."""

import fcntl
import functools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megarec.errors import STOPPED, UserError
from megarec.files import NotJson, read_object, write_json
from megarec.launching.commands import TRAIN_SCRIPT
from megarec.launching.hosts import OPTIONS, Host, accelerator, keep_alive, on_ssh_host
from megarec.ray_cluster import RayCluster
from megarec.scaling.grid import Trial
from megarec.scaling.results import DIVERGED, FAILED, TABLE, Rows, lost_row, row_of
from megarec.scaling.trial_process import attended
from megarec.training.run_directory import move_to_previous

TRAIN = TRAIN_SCRIPT
SSH_FAILED = 255  # ssh's own exit code; a trial has none so high
_POLL_SECONDS = 0.2
HERE = "localhost"
STUDY_NOTE = "sweep.json"
PARTS = (STUDY_NOTE, TABLE, "rows", "runs", "plan.json", "probe", "search.json", "search.md", "chosen", "calibrated")


@dataclass(frozen=True)
class Slot:
    """A place for one trial at a time.

    Attributes:
        host: over ssh; None: this machine.
        place: its number on its host, and of its GPU if any.
        threads: CPU threads of a trial there; None: as many as the host has cores.
        cluster: whose nodes run it, in place of a host; its places only limit how many run at a time.
        gpus: that a trial asks the cluster for.
    """

    host: str | None
    place: int
    threads: int | None
    cluster: RayCluster | None = None
    gpus: int = 0


@contextmanager
def lock_of(path: Path) -> Iterator[int]:
    """An open file to lock, which is made if need be.

    Raises:
        UserError: its directory cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open(
            "a+"
        )  # a shared lock over NFS needs a file that can be read, the other one that can be written
    except OSError as error:
        raise UserError(f"{path.parent}: cannot be written ({error.strerror})") from error
    with lock:
        yield lock.fileno()


def busy(output: Path) -> UserError:
    return UserError(f"{output}: another sweep is at work there; wait for it, or choose another --output")


@contextmanager
def only_sweep_in(output: Path) -> Iterator[None]:
    """Keep other sweeps out of the directory.

    Raises:
        UserError: another sweep is at work there, or it cannot be written.
    """
    with lock_of(output / "lock") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy(output) from None
        yield


def take_over(output: Path, study: Path, trials: list[Trial], *, keep: str | None) -> Path | None:
    """Claim the directory for this study: the sweep of another study there moves to `previous` in it, whole.

    It is the same study where the file is the same, edited or not, or where any run is: a moved file, or a copy.

    Args:
        keep: the option that forbids moving; None: it is allowed.

    Returns:
        Where the other study's sweep is now; None: there was none.

    Raises:
        UserError: it cannot be moved, or must not.
    """
    note, me, previous = output / STUDY_NOTE, str(study.resolve()), None
    there = read_object(note, "which study a sweep is of").get("study") if note.is_file() else None
    found = [path for name in PARTS if (path := output / name).exists()]
    runs = {path.stem for path in output.glob("rows/*.json")} | {path.name for path in output.glob("runs/*")}
    if runs and there != me and not runs & {trial.name for trial in trials}:
        of = f"the study {there}" if there else "another study"
        if keep is not None:
            raise UserError(
                f"{output}: holds a sweep of {of}; choose another --output, or start without {keep}, which moves it "
                "to `previous` there"
            )
        previous = move_to_previous(output, found, f"{output}: the sweep of {of} there", "choose another --output")
    write_json(note, {"study": me})
    return previous


class OnCluster:
    """A trial's process on some node of a cluster, as of subprocess.Popen; it ends when the cluster is left.

    Attributes:
        ended: once it has, (exit code, seconds that it took, the host it was on).
    """

    def __init__(self, cluster: RayCluster, trial: Trial, command: list[str], gpus: int) -> None:
        self._cluster, self.ended = cluster, (0, 0.0, "")
        self._number = cluster.submit(attend, command, trial.name, trial.config.train.threads or 1, gpus)

    def poll(self, *, wait: bool = False) -> int | None:
        if (result := self._cluster.result(self._number, wait=wait)) is None:
            return None
        (self.ended,) = result
        return self.ended[0]

    def wait(self) -> int:
        code = self.poll(wait=True)
        assert code is not None
        return code

    def __enter__(self) -> "OnCluster":
        return self

    def __exit__(self, *error: object) -> None:
        pass


@dataclass
class Running:
    """A trial's process."""

    trial: Trial
    process: "subprocess.Popen[bytes] | OnCluster"
    started: float


def local_slots(jobs: int) -> list[Slot]:
    """That many places on this machine, with its cores divided evenly."""
    return [Slot(None, place, max(1, len(os.sched_getaffinity(0)) // jobs)) for place in range(jobs)]


def slots_of(hosts: list[Host]) -> list[Slot]:
    """As many places on each host as its slots. A lone trial takes the host's cores, several one thread each."""
    return [Slot(host.name, place, None if host.slots == 1 else 1) for host in hosts for place in range(host.slots)]


def slots_on(cluster: RayCluster, trials: list[Trial]) -> list[Slot]:
    """As many places as trials fit on its nodes, each with a GPU where there are any.

    Raises:
        UserError: no node has room for one.
    """
    gpus = int(os.environ.get("DS_ACCELERATOR") != "cpu" and any(node.get("GPU") for node in cluster.nodes))
    cores = min(trial.config.train.threads or 1 for trial in trials)
    if not (count := cluster.places(cores, gpus)):
        raise UserError(f"no node of the Ray cluster has the {cores} cores (train.threads) that a run asks for")
    return [Slot(None, place, 1, cluster, gpus) for place in range(count)]


def run_sweep(
    trials: list[Trial], rows: Rows, slots: list[Slot], say: Callable[[str], None], share: set[str] | None = None
) -> list[str]:
    """Run what has no row yet: every learning rate with the first seed, then the other seeds at the chosen rate.

    However the sweep ends, its processes end with it.

    A place whose host cannot be reached any more is given up, and its trial runs elsewhere. A rate that the fault
    policy stopped has lost; any other failure keeps its model's other seeds waiting until the command runs again.
    A search's trial still gets a row, as diverged or, after a second try, as failed: it counts in the budget.

    Args:
        share: the trials to run, by name, while others run the rest; None: all. A model with one learning rate then
            has nothing to choose, and none of its seeds waits for the first.

    Returns:
        The names of trials that failed; `output.txt` in their directory says why.

    Raises:
        UserError: no host can be reached any more.
    """
    running: dict[Slot, Running] = {}
    failed: dict[str, int] = {}
    slots = list(slots)
    _collect([trial for trial in trials if share is None or trial.name in share], rows)
    try:
        while True:
            for slot in slots:
                if slot not in running and (trial := _next(trials, rows, running, failed, share)):
                    running[slot] = _start(trial, slot, rows.output)
            if not running:
                return list(failed)
            time.sleep(_POLL_SECONDS)
            for slot, run in list(running.items()):
                if (code := run.process.poll()) is None:
                    continue
                del running[slot]
                if slot.host is not None and code == SSH_FAILED:
                    _close(run.process)
                    slots.remove(slot)
                    _say_lost(slot, run, slots, say)
                else:
                    _finish(run, code, slot, rows, failed, say)
    finally:
        for run in running.values():
            _close(run.process)


def folder_of(output: Path, trial: Trial) -> Path:
    """A trial's `train.output_dir`."""
    return output / "runs" / trial.name


def command_of(trial: Trial, folder: Path, threads: int | None) -> list[str]:
    """The ordinary run; it continues from its latest checkpoint, if an earlier sweep left one."""
    sets = [*trial.overrides, f"train.output_dir={json.dumps(str(folder))}"]
    if threads is not None and trial.config.train.threads is None:
        sets.append(f"train.threads={threads}")
    words = [word for each in sets for word in ("--set", each)]
    return [sys.executable, str(TRAIN), "--config", str(trial.base), "--resume", *words]


def environment_of(slot: Slot) -> dict[str, str]:
    """Variables of a trial's process; where there are GPUs it sees one, of those that the sweep may see.

    Raises:
        UserError: the sweep may see fewer GPUs than it has places here.
    """
    environment = {"PYTHONUNBUFFERED": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    if slot.threads is not None:
        environment["OMP_NUM_THREADS"] = str(slot.threads)
    device = os.environ.get("DS_ACCELERATOR")
    if device is None and slot.host is None and slot.cluster is None:
        device = accelerator()
    if device is not None:  # else as `attended` finds on the host, which may have what this machine lacks
        environment["DS_ACCELERATOR"] = device
    if slot.cluster is not None:  # which decides itself what a task may see
        return environment
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if slot.host is None and device == "cuda" and visible is not None:
        gpus = visible.split(",")
        if slot.place >= len(gpus):
            raise UserError(f"--jobs above {len(gpus)}, with CUDA_VISIBLE_DEVICES={visible!r}: a run takes one GPU")
        environment["CUDA_VISIBLE_DEVICES"] = gpus[slot.place]
    elif slot.host is not None or device == "cuda":
        environment["CUDA_VISIBLE_DEVICES"] = str(slot.place)
    return environment


def _next(
    trials: list[Trial], rows: Rows, running: dict[Slot, Running], failed: dict[str, int], share: set[str] | None
) -> Trial | None:
    """Cheapest first, trials that choose a learning rate before others."""
    settled = {*rows.of, *(trial.name for trial in trials if trial.name in failed and not trial.searching)}
    at_work = {run.trial.name for run in running.values()}
    lost = {name for name, code in failed.items() if code == STOPPED}
    if share is not None:
        lost |= {trial.name for trial in trials if trial.tuning and stopped(folder_of(rows.output, trial))}
    open_models = {trial.model for trial in trials if trial.tuning and trial.name not in {*rows.of, *lost}}
    one_rate = {trial.model for trial in trials} - {trial.model for trial in trials if trial.rate > 0}
    chosen = functools.cache(rows.chosen_rate)
    for trial in sorted(trials, key=lambda trial: (not trial.tuning, trial.gflop)):
        if trial.name in settled or trial.name in at_work or (share is not None and trial.name not in share):
            continue
        if trial.tuning or (share is not None and trial.model in one_rate):
            return trial
        if trial.model not in open_models and trial.rate == chosen(trial.model):
            return trial
    return None


def _collect(trials: list[Trial], rows: Rows) -> None:
    """Collect runs that ended after an earlier sweep had been killed, or just before."""
    for trial in trials:
        folder = folder_of(rows.output, trial)
        if trial.name in rows.of:
            continue
        if metrics := _metrics(folder):
            rows.add(trial, _row_of(trial, metrics, None, None, folder))
        elif trial.searching and stopped(folder):
            rows.add(trial, lost_row(trial, DIVERGED, _steps(folder), None, None))
    rows.write_table()


def attend(command: list[str]) -> tuple[int, float, str]:
    """On a node of a cluster: (exit code, seconds, host) of a command, which ends if this process does."""
    began = time.time()
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        code = process.wait()
    return code, time.time() - began, socket.gethostname()


def start_on(slot: Slot, trial: Trial, folder: Path, command: list[str]) -> "subprocess.Popen[bytes] | OnCluster":
    """Start a trial's command there, attended; it ends when its standard input closes."""
    command = attended(folder, environment_of(slot), command)
    if slot.cluster is not None:
        return OnCluster(slot.cluster, trial, command, slot.gpus)
    if slot.host is not None:
        command = on_ssh_host(slot.host, command, (*OPTIONS, *keep_alive(trial.config.parallel.timeout_seconds)))
    return subprocess.Popen(command, stdin=subprocess.PIPE)


def _start(trial: Trial, slot: Slot, output: Path) -> Running:
    folder = folder_of(output, trial)
    command = command_of(trial, folder, slot.threads)
    return Running(trial, start_on(slot, trial, folder, command), time.time())


def _finish(
    run: Running, code: int, slot: Slot, rows: Rows, failed: dict[str, int], say: Callable[[str], None]
) -> None:
    trial, folder = run.trial, folder_of(rows.output, run.trial)
    _close(run.process)
    metrics = _metrics(folder) if code == 0 else None
    seconds, host = time.time() - run.started, slot.host or HERE
    if isinstance(run.process, OnCluster):
        _, seconds, host = run.process.ended
    if metrics is None:
        second = trial.name in failed
        failed[trial.name] = code
        say(f"FAILED {trial.name}: exit code {code}; {folder / 'output.txt'}")
        if trial.searching and (second or code == STOPPED):
            del failed[trial.name]
            status = DIVERGED if code == STOPPED else FAILED
            rows.add(trial, lost_row(trial, status, _steps(folder), seconds, host))
        return
    failed.pop(trial.name, None)
    row = _row_of(trial, metrics, seconds, host, folder)
    rows.add(trial, row)
    if trial.searching:
        quality = f"draw {trial.rate}: valid LogLoss {_words(row['valid_logloss'])}, AUC {_words(row['valid_auc'])}"
    else:
        quality = (
            f"seed {trial.seed} rate {trial.rate}: valid LogLoss {_words(row['valid_logloss'])}, "
            f"test LogLoss {_words(row['logloss'])}"
        )
    say(f"{len(rows.of)} done  {trial.model} {quality}, {seconds:.0f} s")


def _words(metric: float | None) -> str:
    return "none" if metric is None else f"{metric:.4f}"


def _say_lost(slot: Slot, run: Running, left: list[Slot], say: Callable[[str], None]) -> None:
    if not left:
        raise UserError(f"{slot.host}: ssh failed, and no other host is left; the same command goes on")
    say(f"LOST {slot.host} slot {slot.place}: ssh failed; {run.trial.name} runs elsewhere")


def _metrics(folder: Path) -> dict[str, Any] | None:
    """A run's metrics, which it writes last; None: it has none yet, or its fault policy stopped it."""
    path = folder / "metrics.json"
    if not os.path.lexists(path):
        return None
    try:
        metrics = read_object(path, "the metrics of a run", nan=True)
    except NotJson:
        return None
    return None if "stopped" in metrics else metrics


def stopped(folder: Path) -> bool:
    """Whether the fault policy stopped the run of a directory."""
    try:
        return "stopped" in read_object(folder / "metrics.json", "the metrics of a run", nan=True)
    except UserError:  # there are none
        return False


def _steps(folder: Path) -> int | None:
    """Steps of a run that the fault policy stopped; None: unknown."""
    if not stopped(folder):
        return None
    steps = read_object(folder / "metrics.json", "the metrics of a run", nan=True).get("train", {}).get("steps")
    return steps if isinstance(steps, int) else None


def _row_of(
    trial: Trial, metrics: dict[str, Any], seconds: float | None, host: str | None, folder: Path
) -> dict[str, Any]:
    try:
        return row_of(trial, metrics, seconds, host)
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{folder / 'metrics.json'}: {error} is not what a run writes; remove that directory, and the trial runs "
            "again"
        ) from error


def _close(process: "subprocess.Popen[bytes] | OnCluster") -> None:
    if isinstance(process, OnCluster):
        return
    assert process.stdin is not None
    process.stdin.close()
    process.wait()
