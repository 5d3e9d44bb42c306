"""What a run says of its steps: lines, TensorBoard, and the "train" part of metrics.json."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from megarec.run.build import Run
from megarec.run.metrics import Predictions, described
from megarec.run.state import TrainState
from megarec.training.console import Console
from megarec.training.profiling import StepTimer, measure_gemm_tflops
from megarec.training.step import StepResult


class StepLog:
    """Adds up steps between log lines.

    Args:
        position: of the run.
        window: predictions that the log has not shown yet.
        started: time.time() of the process start.
    """

    def __init__(self, run: Run, monitor: Console, position: TrainState, window: Predictions, started: float) -> None:
        self.run, self.monitor, self.position, self.window = run, monitor, position, window
        self.started = started
        self.clock = StepTimer(run.device)
        self.activations: dict[str, int] = {}
        self.first_step_seconds: float | None = None
        self._window_start = time.perf_counter()
        self._window_steps = 0
        self._train_seconds = 0.0
        self._trained_steps = 0
        peak = run.config.train.peak_tflops or measure_gemm_tflops(run.dense.dtype, run.device)
        self._peak = peak * run.topology.world_size

    def first_step_done(self) -> None:
        self.first_step_seconds = time.time() - self.started
        self.monitor.say(f"first step {self.first_step_seconds:.1f} s after the start")

    def step_done(self) -> None:
        self._window_steps += 1
        self.monitor.step(self.position.step)

    @contextmanager
    def off_the_clock(self) -> Iterator[None]:
        """Validation, saving and the like do not count in the examples per second."""
        started = time.perf_counter()
        yield
        self._window_start += time.perf_counter() - started

    def skips(self) -> dict[str, float | None]:
        """TensorBoard's counts of steps that were not applied."""
        position = self.position
        by_cause = {f"optim/skipped_steps/{cause}": float(count) for cause, count in position.skipped.items()}
        return {"optim/skipped_steps": position.skipped_steps, "optim/rollbacks": position.rollbacks, **by_cause}

    def log(self, result: StepResult, factor: float) -> None:
        """A line and TensorBoard's points; collective.

        Args:
            result: of the last step.
            factor: of the learning rates.
        """
        run, position = self.run, self.position
        seen = self.window.gather(run.topology.world)
        seconds = time.perf_counter() - self._window_start
        rate = self._window_steps * run.config.data.batch_size / seconds  # `seen` has more right after a resume
        self._train_seconds += seconds
        self._trained_steps += self._window_steps
        tflops = rate * run.spec.cost.flop / 1e12
        epoch = position.step / run.train.steps_per_epoch
        self.monitor.say(
            f"step {position.step}/{run.schedule.total_steps}  epoch {epoch:.2f}  loss {seen.logloss:.4f}  "
            f"NE {seen.ne:.4f}  AUC {seen.auc:.4f}  {rate:,.0f} examples/s"
        )
        self.monitor.step(position.step, f"{rate:,.0f} examples/s  loss {seen.logloss:.4f}  NE {seen.ne:.4f}")
        held = run.dense.memory_bytes()
        steps = max(1, self._window_steps)
        sent = {f"bytes_per_step/{group}": total / steps for group, total in run.ledger.take().items()}
        quality = described(seen)
        self.monitor.scalars(
            position.step,
            {
                "train/loss": quality["logloss"],
                "train/ne": quality["ne"],
                "train/auc": quality["auc"],
                "train/calibration": quality["calibration"],
                "optim/dense_learning_rate": factor * run.dense.learning_rate,
                "optim/table_learning_rate": factor * run.config.embedding.learning_rate,
                "optim/gradient_norm": result.gradient_norm,
                **self.skips(),
                "speed/examples_per_second": rate,
                "speed/gflop_per_example": run.spec.cost.flop / 1e9,
                "speed/tflops": tflops,
                "speed/mfu": tflops / self._peak,
                **{f"time_ms/{part}": value for part, value in self.clock.milliseconds().items()},
                "memory/tables": run.sparse.memory_bytes(),
                "memory/dense": held["parameters"] + held["optimizer"],
                "memory/activations": self.activations.get("bytes"),
                **sent,
                **{f"rows_used/{table}": share for table, share in run.sparse.row_usage().items()},
            },
        )
        self._window_steps = 0
        self._window_start = time.perf_counter()

    def summary(self) -> dict[str, float | dict[str, int] | None]:
        """The "train" part of metrics.json: rates over the logged steps, validation and saving left out."""
        flop, position = self.run.spec.cost.flop, self.position
        examples = self._trained_steps * self.run.config.data.batch_size
        rate = examples / self._train_seconds if self._train_seconds else None
        tflops = rate * flop / 1e12 if rate else None
        return {
            "examples_per_second": rate,
            "gflop_per_example": flop / 1e9,
            "tflops": tflops,
            "mfu": tflops / self._peak if tflops else None,
            "peak_tflops": self._peak,
            "steps": position.step,
            "skipped_steps": position.skipped_steps,
            "skipped_by_cause": position.skipped,
            "rollbacks": position.rollbacks,
            "first_step_seconds": self.first_step_seconds,
        }
