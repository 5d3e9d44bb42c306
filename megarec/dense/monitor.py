"""The writers of DeepSpeed's monitor: TensorBoard, CSV files, Weights & Biases, comet, as the deepspeed section says.

The trainer alone writes, at optimizer steps: the engine's own points, whose axis counts examples, are off.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.summary.writer.event_file_writer import _AsyncWriterThread
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from megarec.files import write_whole

_log = logging.getLogger(__name__)


class Monitor:
    """The writers that DeepSpeed opened: on rank 0, none on the others.

    A writer that fails ends, with a warning, and the run goes on: TensorBoard's thread dies at the first write that a
    full disk refuses, and every later call raises, also when there is room again.

    TensorBoard's file is opened at the first point, not when the engine is built: until the run knows where it
    starts, the directory has no file of it.

    Args:
        master: DeepSpeed's MonitorMaster.
    """

    def __init__(self, master: Any) -> None:
        master.enabled = False  # the engine's check before it writes points of its own
        opened = {
            "TensorBoard": master.tb_monitor,
            "CSV": master.csv_monitor,
            "Weights & Biases": master.wandb_monitor,
            "comet": master.comet_monitor,
        }
        self._writers = {name: writer for name, writer in opened.items() if writer is not None and writer.enabled}
        self._charts: Path | None = None
        self._first_step = 0
        writer = getattr(self._writers.get("TensorBoard"), "summary_writer", None)
        if writer is not None:
            self._charts = Path(writer.log_dir)
            self._close_charts(unwritten=True)

    def start(self, step: int) -> None:
        """Remove points that an earlier run, or this one before a rollback, made after a step; 0: all points.

        The steps after it are repeated, and a curve has one point a step. TensorBoard learns it from its file
        (`purge_step`); rows of CSV files are removed.
        """
        self._first_step = step + 1 if step else 0
        if "TensorBoard" in self._writers and self._charts is not None:
            self._write("TensorBoard", lambda _: self._close_charts(), opens=False)
        if "CSV" in self._writers:
            self._write("CSV", lambda monitor: _forget_rows(monitor, step))

    def _close_charts(self, unwritten: bool = False) -> None:
        monitor = self._writers["TensorBoard"]
        if monitor.summary_writer is None:
            return
        path = Path(monitor.summary_writer.file_writer.event_writer._file_name)
        monitor.summary_writer.close()
        monitor.summary_writer = None
        if unwritten:
            path.unlink(missing_ok=True)
            with suppress(OSError):  # it holds something else
                path.parent.rmdir()

    def _open_charts(self) -> None:
        monitor = self._writers["TensorBoard"]
        if monitor.summary_writer is None and self._charts is not None:
            _leave_failures_to_the_next_call()
            _wait_for_a_later_name(self._charts)
            monitor.summary_writer = SummaryWriter(str(self._charts), purge_step=self._first_step)

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        """One point a tag at an optimizer step, to every writer; a tag without a value gets none."""
        events = [(tag, float(value), step) for tag, value in values.items() if value is not None]
        for name in tuple(self._writers):
            self._write(name, lambda writer: writer.write_events(events))

    def histogram(self, step: int, tag: str, values: list[float]) -> None:
        """A distribution, TensorBoard only."""
        if values:
            self._tensorboard(lambda writer: writer.add_histogram(tag, np.asarray(values), step))

    def text(self, tag: str, markdown: str) -> None:
        """A page of TensorBoard's tab Text."""
        self._tensorboard(lambda writer: writer.add_text(tag, markdown, 0))

    def layout(self, layout: dict[str, Any]) -> None:
        """The charts of TensorBoard's tab Custom scalars."""
        self._tensorboard(lambda writer: writer.add_custom_scalars(layout))

    def hyper_parameters(self, values: dict[str, bool | int | float | str]) -> None:
        """A row of TensorBoard's tab HParams; every scalar of the run can be a column beside it.

        The experiment's own summary is left out, so that TensorBoard takes the columns of all runs, not of one.
        """
        _, start, end = hparams(values, {})

        def write(writer: Any) -> None:
            writer._get_file_writer().add_summary(start)
            writer._get_file_writer().add_summary(end)

        self._tensorboard(write)

    def flush(self) -> None:
        self._tensorboard(lambda writer: writer.flush())

    def _tensorboard(self, write: Callable[[Any], object]) -> None:
        if "TensorBoard" in self._writers:
            self._write("TensorBoard", lambda monitor: write(monitor.summary_writer))

    def _write(self, name: str, write: Callable[[Any], object], opens: bool = True) -> None:
        try:
            if name == "TensorBoard" and opens:
                self._open_charts()
            write(self._writers[name])
        except Exception as error:
            del self._writers[name]
            why = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            _log.warning("%s ENDS HERE, THE RUN GOES ON: %s", name.upper(), " ".join(why.split()))


def _leave_failures_to_the_next_call() -> None:
    """TensorBoard's thread raises its error in the next write; its traceback must not be in the log."""
    before = threading.excepthook
    if getattr(before, "leaves_out_tensorboard", False):
        return

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if not isinstance(arguments.thread, _AsyncWriterThread):
            before(arguments)

    hook.leaves_out_tensorboard = True  # type: ignore[attr-defined]
    threading.excepthook = hook


def _wait_for_a_later_name(directory: Path) -> None:
    """TensorBoard reads files in the order of their names, which begin with a second: let no two share it."""
    names = (path.name.split(".")[3] for path in directory.glob("events.out.tfevents.*"))
    newest = max((int(second) for second in names if second.isdigit()), default=0)
    if 0 <= newest - time.time() + 1 <= 1:
        time.sleep(newest - time.time() + 1)


def _forget_rows(monitor: Any, step: int) -> None:
    """Leave the rows of a CSV monitor's files up to a step; their one header stays."""
    if monitor.log_dir is None:  # not rank 0
        return
    for path in sorted(Path(monitor.log_dir).glob("*.csv")):
        header, *rows = path.read_text(encoding="utf-8").splitlines(keepends=True) or [""]
        kept = [row for row in rows if (first := row.partition(",")[0]).isdigit() and int(first) <= step]
        write_whole(path, "".join([header, *kept]).encode())
        monitor.filenames.append(path.stem)  # it has its header
