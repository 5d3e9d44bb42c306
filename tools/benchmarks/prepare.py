"""Files of Criteo's format, made up, prepared by two workers at two sizes: rows/s and the memory of all processes.

Sizes are MEGAREC_BENCH_ROWS, by default 2,000,000 and 8,000,000; the files lie in `.cache/`.
"""

import contextlib
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from megarec.data.sources.criteo import write_made_up
from megarec.errors import UserError

TOOL = Path(__file__).parents[1] / "prepare_data.py"
DAY = 1_000_000  # rows of a file
WORKERS = 2


def run() -> dict[str, Any]:
    """A row of rows/s and MiB for each size; the ratio of the memory at the largest size to that at the smallest."""
    sizes = [int(rows) for rows in os.environ.get("MEGAREC_BENCH_ROWS", "2000000,8000000").split(",")]
    directory = Path(".cache/prepare-benchmark")
    shutil.rmtree(directory, ignore_errors=True)
    (directory / "raw").mkdir(parents=True)
    try:
        write_made_up(directory / "raw" / "rest", 10_000, seed=1)
        rows = []
        for size in sizes:
            for day in range(-(-size // DAY)):
                if not (path := directory / "raw" / f"day_{day}").exists():
                    write_made_up(path, DAY, seed=2 + day)
            rows.append(_measured(directory, size))
        memory = [row["memory_mib"] for row in rows]
        return {"name": "prepare", "rows": rows, "ratios": {"memory_of_largest": max(memory) / memory[0]}}
    finally:
        shutil.rmtree(directory)


def _measured(directory: Path, size: int) -> dict[str, Any]:
    days = [str(directory / "raw" / f"day_{day}") for day in range(-(-size // DAY))]
    rest, output = str(directory / "raw" / "rest"), directory / "out"
    command = [sys.executable, str(TOOL), "criteo", "--train", *days, "--valid", rest, "--test", rest]
    command += ["--output", str(output), "--workers", str(WORKERS)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with (directory / "stderr").open("wb") as told:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=told)
    watch = _Memory(process.pid)
    watch.start()
    start = time.perf_counter()
    code = process.wait()
    seconds = time.perf_counter() - start
    watch.join()
    if code:
        raise UserError(f"prepare_data.py ended with {code}: {(directory / 'stderr').read_text(errors='replace')}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    computed = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    read = sum(Path(day).stat().st_size for day in days)
    shutil.rmtree(output)
    return {
        "rows": len(days) * DAY,
        "bytes_per_row": read / (len(days) * DAY),
        "seconds": seconds,
        "rows_per_second": len(days) * DAY / seconds,
        "rows_per_cpu_second": len(days) * DAY / computed,
        "memory_mib": watch.peak / 2**20,
    }


class _Memory(threading.Thread):
    """The largest memory of a process and its children together: a page that several share counts once.

    Attributes:
        peak: bytes; pages of mapped files are among them, which the kernel can take back at any time.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._process = psutil.Process(pid)
        self.peak = 0

    def run(self) -> None:
        while True:
            together = 0
            try:
                if self._process.status() == psutil.STATUS_ZOMBIE:
                    return
                processes = [self._process, *self._process.children(recursive=True)]
            except psutil.Error:
                return
            for process in processes:
                with contextlib.suppress(psutil.Error):
                    together += process.memory_full_info().pss
            self.peak = max(self.peak, together)
            time.sleep(0.1)
