"""A run's reports of its steps: lines, TensorBoard, and the "train" part of metrics.json."""

import logging
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import torch

from megarec.distributed.collectives import gather_numbers
from megarec.run.binned_metrics import binned_quality
from megarec.run.build import Run
from megarec.run.metrics import Predictions, Quality, points
from megarec.run.state import TrainState
from megarec.training.charts import layout
from megarec.training.console import Console
from megarec.training.profiling import StepTimer, data_sheet_tflops, measure_gemm_tflops, time_forward
from megarec.training.step import StepResult

MIB = 2**20
_log = logging.getLogger(__name__)

Predict = Callable[[Run], dict[str, float]]
"""Points that TensorBoard shows beside what is measured, by their tags."""


def no_prediction(run: Run) -> dict[str, float]:
    """Nothing beside what is measured."""
    return {}


class StepLog:
    """Adds up steps between log lines.

    The first step of a process compiles, allocates and meets the other ranks for the first time: rates and times leave
    it out, here and in metrics.json. A window that has no other step has none.

    Args:
        state: of the run.
        window: predictions that the log has not shown yet.
        started: time.time() of the process start.
        predicted: points shown beside the measured ones, the same at every log line.
    """

    def __init__(
        self,
        run: Run,
        console: Console,
        state: TrainState,
        window: Predictions,
        started: float,
        predicted: dict[str, float],
    ) -> None:
        self._predicted = predicted
        self.run, self.console, self.state, self.window = run, console, state, window
        self.started = started
        self.timer = StepTimer(run.device)
        time_forward(run.dense.module, self.timer)
        self.activations: dict[str, int] = {}
        self.first_step_seconds: float | None = None
        self._window_start = time.perf_counter()
        self._window_steps = self._timed_steps = 0
        self._train_seconds = 0.0
        self._trained_steps = 0
        self._laid_out = False
        self._peak = _peak_tflops(run) * run.topology.world_size

    def first_step_done(self) -> None:
        """Rates and times begin here."""
        self.first_step_seconds = time.time() - self.started
        self.timer.milliseconds()
        self._timed_steps = -1
        self._window_start = time.perf_counter()
        _log.info("first step %.1f s after the start", self.first_step_seconds)

    def step_done(self) -> None:
        self._window_steps += 1
        self._timed_steps += 1
        self.console.progress(self.state.step)

    @contextmanager
    def off_the_clock(self) -> Iterator[None]:
        """Validation, saving and the like count neither in the examples per second nor in the traffic of steps."""
        started, sent = time.perf_counter(), self.run.ledger.totals()
        yield
        self.run.ledger.leave_out(sent)
        self._window_start += time.perf_counter() - started

    def skips(self) -> dict[str, float | None]:
        """TensorBoard's counts of steps that were not applied."""
        state = self.state
        by_cause = {f"train/skipped_steps/{cause}": float(count) for cause, count in state.skipped.items()}
        by_cause |= {f"train/faulty_labels/{label}": float(count) for label, count in state.faulty_labels.items()}
        return {"train/skipped_steps": state.skipped_steps, "train/rollbacks": state.rollbacks, **by_cause}

    def points(self, split: str, found: Quality) -> dict[str, float | None]:
        """TensorBoard's points of a split's quality."""
        return {f"{split}/{name}": value for name, value in points(found).items()}

    def log(self, result: StepResult, factor: float) -> None:
        """A line and TensorBoard's points; collective.

        Args:
            result: of the last step.
            factor: of the learning rates.
        """
        run, state = self.run, self.state
        seen = binned_quality(self.window, run.topology.world)
        seconds = time.perf_counter() - self._window_start
        rate = step_ms = None  # of this window's steps; `seen` has more right after a resume
        if self._timed_steps > 0:
            step_ms = 1e3 * seconds / self._timed_steps
            rate = self._timed_steps * run.config.data.batch_size / seconds
            self._train_seconds += seconds
            self._trained_steps += self._timed_steps
        tflops = None if rate is None else rate * run.spec.cost.flop / 1e12
        speed = "" if rate is None else f"{rate:,.0f} examples/s"
        epoch = state.step / run.train.steps_per_epoch
        shown = "  |  ".join(
            f"{name}loss {own.logloss:.4f}  NE {own.ne:.4f}  AUC {own.auc:.4f}"
            for name, own in ({f"{label}: ": q for label, q in seen.labels.items()} or {"": seen}).items()
        )
        _log.info(f"step {state.step}/{run.schedule.total_steps}  epoch {epoch:.2f}  {shown}  {speed}".rstrip())
        self.console.progress(state.step, f"{speed}  loss {seen.logloss:.4f}  NE {seen.ne:.4f}".lstrip())
        values = {
            **self.points("train", seen),
            "train/dense_learning_rate": factor * run.dense.learning_rate,
            "train/table_learning_rate": factor * run.config.embedding.learning_rate,
            "train/gradient_norm": result.gradient_norm,
            "train/loss_scale": run.dense.loss_scale(),
            **self.skips(),
            "workload/examples_per_second": rate,
            "workload/tflops": tflops,
            "workload/mfu": None if tflops is None else tflops / self._peak,
            "workload/time_ms/step": step_ms,
            **self._of_all_ranks(self.timer.milliseconds()),
            **self._predicted,
        }
        if not self._laid_out and (rate is not None or state.step == run.schedule.total_steps):  # else tags are missing
            tags = [tag for tag, value in values.items() if value is not None]
            run.dense.monitor.layout(layout(tags, run.schema.group is not None, run.schema.tasks))
            self._laid_out = True
        run.dense.monitor.scalars(state.step, values)
        self._window_steps = self._timed_steps = 0
        self._window_start = time.perf_counter()

    def _of_all_ranks(self, parts: dict[str, float]) -> dict[str, float | None]:
        """Times, memory, traffic and use of the tables: rank 0's, and how the ranks compare; collective."""
        run = self.run
        usage = list(run.sparse.row_usage().values())
        busy = parts.get("data", 0.0) + parts.get("forward", 0.0)
        process = psutil.Process().memory_info().rss / MIB
        device = torch.cuda.max_memory_allocated(run.device) / MIB if run.device.type == "cuda" else 0.0
        mine = [busy, process, device, sum(usage), len(usage), min(usage, default=1.0)]
        ranks = gather_numbers(mine, run.topology, run.device)
        all_busy, processes, devices, used, tables, least = zip(*ranks, strict=True)
        held, steps = run.dense.memory_bytes(), max(1, self._window_steps)
        activations = self.activations.get("bytes")
        run.dense.monitor.histogram(self.state.step, "workload/rows_used/tables_of_rank_0", usage)
        return {
            **{f"workload/time_ms/{part}": value for part, value in parts.items()},
            "workload/slowest_rank": float(all_busy.index(max(all_busy))) if parts else None,
            "workload/slowest_rank_ms": max(all_busy) if parts else None,
            "workload/median_rank_ms": statistics.median(all_busy) if parts else None,
            "workload/memory_mib/tables": run.sparse.memory_bytes() / MIB,
            "workload/memory_mib/dense": (held["parameters"] + held["optimizer"]) / MIB,
            "workload/memory_mib/activations": None if activations is None else activations / MIB,
            "workload/memory_mib/process": max(processes),
            "workload/memory_mib/device": max(devices) or None,
            **{f"workload/traffic_mib_per_step/{group}": n / steps / MIB for group, n in run.ledger.take().items()},
            "workload/rows_used/mean": sum(used) / sum(tables) if sum(tables) else None,
            "workload/rows_used/least": min(least) if sum(tables) else None,
        }

    def summary(self) -> dict[str, float | dict[str, int] | None]:
        """The "train" part of metrics.json: rates over the logged steps; start-up, validation and saving left out."""
        flop, state = self.run.spec.cost.flop, self.state
        examples = self._trained_steps * self.run.config.data.batch_size
        rate = examples / self._train_seconds if self._train_seconds else None
        tflops = rate * flop / 1e12 if rate else None
        of_labels = {"faulty_steps_by_label": state.faulty_labels} if self.run.schema.tasks else {}
        return {
            "examples_per_second": rate,
            "gflop_per_example": flop / 1e9,
            "tflops": tflops,
            "mfu": tflops / self._peak if tflops else None,
            "peak_tflops": self._peak,
            "steps": state.step,
            "skipped_steps": state.skipped_steps,
            "skipped_by_cause": state.skipped,
            "rollbacks": state.rollbacks,
            "first_step_seconds": self.first_step_seconds,
            **of_labels,
        }


def _peak_tflops(run: Run) -> float:
    """Of one rank, for the MFU: as configured, else by the data sheet of the device, else as a GEMM has it.

    On an accelerator the log has the GEMM as well: no model can exceed it.
    """
    given, device = run.config.train.peak_tflops, run.device
    if given is not None and device.type == "cpu":
        return given
    measured = measure_gemm_tflops(run.dense.dtype, device)
    if device.type == "cpu":
        return measured
    peak = given or data_sheet_tflops(run.dense.dtype, device) or measured
    _log.info("peak of a rank: %.0f TFLOP/s for the MFU; a GEMM reaches %.0f", peak, measured)
    return peak
