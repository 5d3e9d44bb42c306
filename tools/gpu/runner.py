"""Runs the parts, each in processes of its own that are cut off when their time is over, and reports what they found.

A part's processes start, import and prepare while the part before them runs, and wait for a file called `go`. On a CPU
they are forks, which cost nothing; a fork cannot use CUDA.
"""

import contextlib
import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megarec.files import parse_json

TOOL = Path(__file__).resolve().parents[1] / "gpu_check.py"
PREPARING = 180.0  # seconds that a part may import and prepare before its turn, at most
STEP = 0.02


class Part(NamedTuple):
    """A part of the check.

    Attributes:
        seconds: after which it is cut off.
        module, function, prepare: of tools.gpu.
        ranks: processes.
    """

    name: str
    seconds: float
    module: str
    function: str = "run"
    prepare: str | None = None
    ranks: int = 1


PARTS = (
    Part("ceilings", 30, "ceilings"),
    Part("parity", 75, "numbers", "run_parity", "prepare_parity"),
    Part("two ranks", 45, "numbers", "run_ranks", "prepare_ranks", ranks=2),
    Part("repeatability", 30, "numbers", "run_repeat", "prepare_repeat"),
    Part("repeatability, deterministic", 30, "numbers", "run_repeat_deterministic", "prepare_repeat"),
    Part("ladder", 150, "ladder", "run_mfu"),
    Part("true rank", 75, "ladder", "run_true_rank"),
    Part("tables", 60, "tables"),
    Part("end to end", 90, "end_to_end", prepare="prepare"),
)
PREDICTIONS = Part("predictions", 120, "predictions")


class Started:
    """The processes of a part, from their start to their end."""

    def __init__(self, part: Part, device: str, size: str, directory: Path) -> None:
        self.part = part
        self.directory = directory / part.name.replace(",", "").replace(" ", "-")
        self.directory.mkdir()
        self._processes = [self._start(device, size, rank) for rank in range(part.ranks)]

    def _start(self, device: str, size: str, rank: int) -> Any:
        words = [self.part.name, device, size, str(self.directory), str(rank), str(os.getpid())]
        if device == "cpu":
            process = multiprocessing.get_context("fork").Process(target=serve, args=(words,))
            process.start()
            return process
        return subprocess.Popen([sys.executable, "-u", str(TOOL), "--serve", *words])

    def finish(self, end: float) -> dict[str, Any]:
        """Let it run for its seconds, and until `end` at most (time.monotonic()); its rows, and why it failed."""
        waiting = min(time.monotonic() + PREPARING, end)
        ready = [self.directory / f"{rank}/ready" for rank in range(self.part.ranks)]
        while not all(path.exists() for path in ready) and self._running() and time.monotonic() < waiting:
            time.sleep(STEP)
        (self.directory / "go").touch()
        started = time.monotonic()
        seconds = min(self.part.seconds, max(0.0, end - started))
        while self._running() and time.monotonic() < started + seconds:
            if any(self._said(rank) for rank in range(self.part.ranks)):
                seconds = min(seconds, time.monotonic() - started + 5)  # the other ranks would wait for one that failed
            time.sleep(STEP)
        cut = self._running()
        self.stop()
        rows = self.directory / "0/rows.jsonl"
        found = [parse_json(line, str(rows)) for line in rows.read_text().splitlines()] if rows.exists() else []
        failure = next(filter(None, map(self._said, range(self.part.ranks))), None)
        if failure is None and cut:
            failure = {"failed": f"cut off after {seconds:.0f} s"}
        if failure is None and not all((self.directory / f"{rank}/done").exists() for rank in range(self.part.ranks)):
            failure = {"failed": f"a process died without a result{self._codes()}"}
        return {"rows": found, "seconds": time.monotonic() - started, **(failure or {})}

    def _said(self, rank: int) -> dict[str, Any] | None:
        path = self.directory / f"{rank}/failed.json"
        return None if not path.exists() else parse_json(path.read_text(), str(path))

    def _running(self) -> bool:
        return any(_code(process) is None for process in self._processes)

    def _codes(self) -> str:
        codes = [code for process in self._processes if (code := _code(process))]
        return f" (exit code {', '.join(map(str, codes))})" if codes else ""

    def stop(self) -> None:
        """End them, and all their descendants."""
        for process in self._processes:
            if _code(process) is None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
            process.wait() if isinstance(process, subprocess.Popen) else process.join()


def _code(process: Any) -> int | None:
    code: int | None = process.poll() if isinstance(process, subprocess.Popen) else process.exitcode
    return code


def serve(words: Sequence[str]) -> None:
    """The life of a process of a part. Writes into its directory: rows.jsonl, and `done` or failed.json."""
    name, device, size, shared, rank, parent = words
    os.setsid()
    threading.Thread(target=_end_with, args=(int(parent),), daemon=True).start()
    directory = Path(shared) / rank
    directory.mkdir()
    log = os.open(directory / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        _work(name, device, size, Path(shared), directory, int(rank))
        (directory / "done").touch()
    except BaseException as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        partial = directory / "failed.partial"
        partial.write_text(json.dumps({"failed": text[:2000], "traceback": traceback.format_exc()[-8000:]}))
        partial.rename(directory / "failed.json")
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # beside threads of gloo and CUDA an interpreter that shuts down may hang


def _end_with(parent: int) -> None:
    """End this process and its descendants once the check is gone: a killed check cannot end them itself."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.killpg(0, signal.SIGKILL)


def _work(name: str, device: str, size: str, shared: Path, directory: Path, rank: int) -> None:
    part = next(part for part in (*PARTS, PREDICTIONS) if part.name == name)
    module = importlib.import_module(f"tools.gpu.{part.module}")
    if part is PREDICTIONS:
        (directory / "predictions.json").write_text(json.dumps(module.predictions(size)))
        return
    import torch

    from megarec.distributed.process import quiet_libraries
    from tools.gpu.context import SIZES, Context

    quiet_libraries()
    where = torch.device("cpu") if device == "cpu" else torch.device(device, 0)
    if where.type == "cpu":
        torch.set_num_threads(1 if size == "tiny" else max(1, len(os.sched_getaffinity(0)) // part.ranks))
    context = Context(where, SIZES[size], directory, shared, rank)
    if part.prepare is not None:
        getattr(module, part.prepare)(context)
    (directory / "ready").touch()
    while not (shared / "go").exists():
        time.sleep(STEP)
    if where.type != "cpu":
        torch.accelerator.set_device_index(0)
    getattr(module, part.function)(context)


def run_parts(
    parts: Sequence[Part],
    device: str,
    size: str,
    directory: Path,
    most: float,
    keep: Callable[[dict[str, Any]], object] = lambda result: None,
) -> dict[str, Any]:
    """All parts, one after the other; failures are in the result, as `failed`, and end nothing else.

    Args:
        most: seconds for all of them; parts that have not begun by then are left out and reported.
        keep: takes the results so far, after every part.
    """
    end = time.monotonic() + most
    found: dict[str, Any] = {}
    coming = [Started(PREDICTIONS, "cpu" if device == "cpu" else device, size, directory)]
    coming += [Started(part, device, size, directory) for part in parts[:1]]
    try:
        answer = coming[0].finish(time.monotonic() + PREDICTIONS.seconds)
        made = coming.pop(0).directory / "0/predictions.json"
        predicted = parse_json(made.read_text(), str(made)) if made.exists() else {}
        if "failed" in answer:
            found["predictions"] = answer
        for index, part in enumerate(parts):
            coming += [Started(later, device, size, directory) for later in parts[index + 1 : index + 2]]
            left = end - time.monotonic()
            if left < min(10.0, part.seconds):
                coming.pop(0).stop()
                found[part.name] = {"rows": [], "seconds": 0.0, "failed": f"left out: {most:.0f} s are over"}
                continue
            found[part.name] = coming[0].finish(end)
            coming.pop(0)
            keep({"predictions": predicted, "parts": found})
            print(f"{part.name}: {found[part.name].get('failed', 'done')}", file=sys.stderr, flush=True)
    finally:
        for started in coming:  # also the one that runs, if Ctrl-C ends the check
            started.stop()
    return {"predictions": predicted, "parts": found}


def expected(predictions: dict[str, dict[str, str]], part: str, what: str) -> str:
    """The prediction for a row; "" if there is none."""
    of_part = predictions.get(part, {})
    ending = (text for name, text in of_part.items() if name.startswith("... ") and what.endswith(name[4:]))
    return of_part.get(what) or next(ending, of_part.get("", ""))
