"""What a run shows: lines on the console, a progress bar on a terminal, TensorBoard. Only rank 0 speaks."""

import json
import sys
from collections.abc import Iterable
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LAYOUT = {
    "Quality": {
        "LogLoss": ["Multiline", ["train/loss", "valid/logloss"]],
        "Normalized entropy": ["Multiline", ["train/ne", "valid/ne"]],
        "AUC": ["Multiline", ["train/auc", "valid/auc"]],
        "Calibration": ["Multiline", ["train/calibration", "valid/calibration"]],
    },
    "Optimization": {
        "Learning rates": ["Multiline", ["optim/dense_learning_rate", "optim/table_learning_rate"]],
        "Dense gradient norm": ["Multiline", ["optim/gradient_norm"]],
        "Skipped steps": ["Multiline", ["optim/skipped_steps"]],
    },
    "Speed": {
        "Examples per second": ["Multiline", ["speed/examples_per_second"]],
        "TFLOP/s": ["Multiline", ["speed/tflops"]],
        "MFU": ["Multiline", ["speed/mfu"]],
        "Milliseconds by part": ["Multiline", [r"time_ms/.*"]],
    },
    "Memory and traffic": {
        "Bytes of memory": ["Multiline", [r"memory/.*"]],
        "Bytes sent per step": ["Multiline", [r"bytes_per_step/.*"]],
        "Rows of tables used": ["Multiline", [r"rows_used/.*"]],
    },
}


class SafeSummaryWriter:
    """A SummaryWriter whose failing disk ends TensorBoard, loudly, and not the run.

    Its thread dies at the first write that fails, and from then on every call raises, also when there is room again.
    """

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def add_scalar(self, *args: Any, **options: Any) -> None:
        self._write("add_scalar", *args, **options)

    def add_text(self, *args: Any) -> None:
        self._write("add_text", *args)

    def add_custom_scalars(self, *args: Any) -> None:
        self._write("add_custom_scalars", *args)

    def flush(self) -> None:
        self._write("flush")

    def _write(self, what: str, *args: Any, **options: Any) -> None:
        if self._writer is None:
            return
        try:
            getattr(self._writer, what)(*args, **options)
        except OSError as error:
            self._writer = None
            print(f"WARNING: TENSORBOARD ENDS HERE, THE RUN GOES ON: {error.strerror or error}", file=sys.stderr)


class Console:
    """Console and TensorBoard of rank 0; on the other ranks every method does nothing.

    Args:
        writer: DeepSpeed's own SummaryWriter (deepspeed.tensorboard) as a `Board`, or None.
    """

    def __init__(self, rank: int, writer: SafeSummaryWriter | None, total_steps: int) -> None:
        self.rank = rank
        self.writer = writer if rank == 0 else None
        self.progress = None
        if rank == 0 and sys.stdout.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.progress = Progress(*columns)
            self.task = self.progress.add_task("training", total=total_steps)
            self.progress.start()

    def say(self, text: str) -> None:
        if self.rank != 0:
            return
        if self.progress:
            self.progress.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def step(self, step: int, description: str | None = None) -> None:
        if self.progress:
            self.progress.update(self.task, completed=step, description=description)

    def scalars(self, step: int, values: dict[str, float | None]) -> None:
        if self.writer is not None:
            for tag, value in values.items():
                if value is not None:
                    self.writer.add_scalar(tag, value, step)

    def start(self, config: dict[str, Any], lines: Iterable[str]) -> None:
        """The resolved config and the choices made, as text, and the custom layout."""
        lines = list(lines)
        for line in lines:
            self.say(line)
        if self.writer is not None:
            self.writer.add_text("config", f"```json\n{json.dumps(config, indent=2)}\n```", 0)
            self.writer.add_text("choices", "\n\n".join(lines), 0)
            self.writer.add_custom_scalars(LAYOUT)

    def close(self) -> None:
        if self.progress:
            self.progress.stop()
        if self.writer is not None:
            self.writer.flush()
