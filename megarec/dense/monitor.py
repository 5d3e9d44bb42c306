"""What DeepSpeed's monitor writes to: TensorBoard, CSV files, Weights & Biases, comet, as the deepspeed section says.

The trainer alone writes, at optimizer steps: the engine's own points, whose axis counts examples, are off.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch.utils.tensorboard.summary import hparams

_log = logging.getLogger(__name__)


class Monitor:
    """The writers that DeepSpeed opened: on rank 0, none on the others.

    A writer that fails ends, with a warning, and the run goes on: TensorBoard's thread dies at the first write that a
    full disk refuses, and every later call raises, also when there is room again.

    Args:
        master: DeepSpeed's MonitorMaster.
    """

    def __init__(self, master: Any) -> None:
        master.enabled = False  # what the engine asks before it writes points of its own
        opened = {
            "TensorBoard": master.tb_monitor,
            "CSV": master.csv_monitor,
            "Weights & Biases": master.wandb_monitor,
            "comet": master.comet_monitor,
        }
        self._writers = {name: writer for name, writer in opened.items() if writer is not None and writer.enabled}

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

    def _write(self, name: str, write: Callable[[Any], object]) -> None:
        try:
            write(self._writers[name])
        except Exception as error:
            del self._writers[name]
            why = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            _log.warning("%s ENDS HERE, THE RUN GOES ON: %s", name.upper(), " ".join(why.split()))
