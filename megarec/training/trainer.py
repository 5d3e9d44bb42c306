"""The training loop of one run, top to bottom."""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megarec.checkpoint.position import Position
from megarec.checkpoint.store import Checkpoints
from megarec.config.sections import RunConfig
from megarec.data.loader import EvalLoader
from megarec.training.ahead import Ahead, Pending
from megarec.training.build import Run, build_run
from megarec.training.clock import Clock
from megarec.training.engine import compute_dtype, set_learning_rate, start_process
from megarec.training.memory import dense_bytes, saved_activations
from megarec.training.metrics import Predictions, Quality
from megarec.training.monitor import Monitor, writer_of
from megarec.training.peak import measured_peak
from megarec.training.schedule import Patience
from megarec.training.step import StepResult, predict, train_step
from megarec.training.trace import tracing


def train(config: RunConfig, resume: bool, started: float) -> dict[str, Any]:
    """Train, keep the best by validation, test it, write metrics.json; collective.

    Args:
        resume: continue from the latest checkpoint under train.output_dir, or start afresh if there is none.
        started: time.time() of the process start, for the time to the first step.

    Returns:
        What metrics.json holds.
    """
    device = start_process(config)
    run = build_run(config, device)
    config = run.config
    output = Path(config.train.output_dir)
    monitor = Monitor(run.topology.rank, writer_of(run.engine), run.schedule.total_steps)
    checkpoints = Checkpoints(output / "checkpoints", run, monitor.say, fresh=not resume)
    window = Predictions()
    position, name = checkpoints.resume(window) or (Position(), None)
    run.schedule.plateau_drops = position.plateau_drops
    if run.topology.rank == 0:
        (output / "config.json").write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")
    monitor.step(position.step)
    monitor.start(config.model_dump(mode="json"), run.choices)
    for split, reasons in run.skipped_rows.items():
        monitor.say(f"data.bad_rows=skip: left out of {split}: {reasons}")
    monitor.say(f"resumed from {checkpoints.directory / name}" if name else "starting afresh")

    loop = Loop(run, monitor, checkpoints, position, window, started)
    with tracing(config.train.trace, output / "trace", run.topology.rank, position.step) as step_done:
        loop.run_to_the_end(step_done)
    loop.ahead.close()

    checkpoints.wait()
    if not math.isinf(position.best):
        checkpoints.load_best()
    test = evaluate(run, run.test)
    metrics = {
        "test": _described(test),
        "valid": _described(evaluate(run, run.valid)),
        "train": loop.summary(),
        "skipped_rows": run.skipped_rows,
    }
    monitor.say(
        f"test  AUC {test.auc:.4f}  LogLoss {test.logloss:.4f}  NE {test.ne:.4f}  calibration {test.calibration:.3f}"
    )
    monitor.close()
    if run.topology.rank == 0:
        (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    return metrics


def evaluate(run: Run, loader: EvalLoader) -> Quality:
    """Exact metrics over all examples of a split and all ranks; collective, the same on every rank."""
    predictions = Predictions()
    for batch in loader.batches():
        batch = batch.to(run.device)
        predictions.add(predict(run.engine, run.sparse, batch), batch.labels, batch.valid)
    return predictions.gather(run.topology.world)


class Loop:
    """The steps of a run from a position to its end."""

    def __init__(
        self,
        run: Run,
        monitor: Monitor,
        checkpoints: Checkpoints,
        position: Position,
        window: Predictions,
        started: float,
    ) -> None:
        self.run = run
        self.monitor = monitor
        self.checkpoints = checkpoints
        self.position = position
        self.started = started
        self.patience = Patience(position.best, position.since_best, position.since_drop)
        self.clock = Clock(run.device)
        self.ahead = Ahead(run.sparse, run.device, run.overlap)
        self.window = window
        self.window_start = time.perf_counter()
        self.window_steps = 0
        self.train_seconds = 0.0
        self.trained_steps = 0
        self.first_step_seconds: float | None = None
        self.activations: dict[str, int] = {}
        peak = run.config.train.peak_tflops or measured_peak(compute_dtype(run.engine), run.device)
        self.peak = peak * run.topology.world_size

    def run_to_the_end(self, step_done: Callable[[], None]) -> None:
        run, config, position = self.run, self.run.config.train, self.position
        evaluate_every = config.evaluate_every or run.train.steps_per_epoch
        checkpoint_every = config.checkpoint_every or evaluate_every
        while position.step < run.schedule.total_steps:
            epoch, done = divmod(position.step, run.train.steps_per_epoch)
            for pending, start_next in self.ahead.steps(run.train.batches(epoch, start=done), self.clock):
                self._step(pending, start_next)
                step_done()
                last = position.step == run.schedule.total_steps
                best = (position.step % evaluate_every == 0 or last) and self._validate()
                if best or position.step % checkpoint_every == 0 or last:
                    self._save(best)
                stop = config.early_stopping and self.patience.since_best >= config.early_stopping
                if stop:
                    self.monitor.say(f"stopping early: {self.patience.since_best} validations without improvement")
                    return
                if last:
                    return

    def _step(self, pending: Pending, start_next: Callable[[], None]) -> None:
        run, position = self.run, self.position
        due = (position.step + 1) % run.config.train.log_every == 0 or position.step + 1 == run.schedule.total_steps
        self.clock.next_step(sampled=due)
        factor = run.schedule.factor(position.step)
        set_learning_rate(run.engine, factor * run.dense_learning_rate)
        run.sparse.scale_learning_rate(factor)
        with self.clock.part("ids"):
            batch, ids = pending()

        def step() -> StepResult:
            return train_step(
                run.engine,
                run.sparse,
                batch,
                world_size=run.topology.world_size,
                clock=self.clock,
                ids=ids,
                meanwhile=start_next,
                want_norm=due,
            )

        if self.first_step_seconds is None:
            with saved_activations(self.activations, run.engine.module):
                result = step()
            self.first_step_seconds = time.time() - self.started
            self.monitor.say(f"first step {self.first_step_seconds:.1f} s after the start")
        else:
            result = step()
        position.step += 1
        position.skipped_steps += not result.applied
        self.window.add(result.logits, batch.labels)
        self.window_steps += 1
        self.monitor.step(position.step)
        if due:
            self._log(result, factor)

    def _log(self, result: StepResult, factor: float) -> None:
        run, position = self.run, self.position
        seen = self.window.gather(run.topology.world)
        seconds = time.perf_counter() - self.window_start
        rate = self.window_steps * run.config.data.batch_size / seconds  # `seen` has more right after a resume
        self.train_seconds += seconds
        self.trained_steps += self.window_steps
        tflops = rate * run.cost.flop / 1e12
        epoch = position.step / run.train.steps_per_epoch
        self.monitor.say(
            f"step {position.step}/{run.schedule.total_steps}  epoch {epoch:.2f}  loss {seen.logloss:.4f}  "
            f"NE {seen.ne:.4f}  AUC {seen.auc:.4f}  {rate:,.0f} examples/s"
        )
        self.monitor.step(position.step, f"{rate:,.0f} examples/s  loss {seen.logloss:.4f}  NE {seen.ne:.4f}")
        held = dense_bytes(run.engine)
        sent = {f"bytes_per_step/{group}": total / self.window_steps for group, total in run.ledger.take().items()}
        self.monitor.scalars(
            position.step,
            {
                "train/loss": seen.logloss,
                "train/ne": seen.ne,
                "train/auc": seen.auc,
                "train/calibration": seen.calibration,
                "optim/dense_learning_rate": factor * run.dense_learning_rate,
                "optim/table_learning_rate": factor * run.config.embedding.learning_rate,
                "optim/gradient_norm": result.gradient_norm,
                "optim/skipped_steps": position.skipped_steps,
                "speed/examples_per_second": rate,
                "speed/gflop_per_example": run.cost.flop / 1e9,
                "speed/tflops": tflops,
                "speed/mfu": tflops / self.peak,
                **{f"time_ms/{part}": value for part, value in self.clock.milliseconds().items()},
                "memory/tables": run.sparse.memory_bytes(),
                "memory/dense": held["parameters"] + held["optimizer"],
                "memory/activations": self.activations.get("bytes"),
                **sent,
                **{f"rows_used/{table}": share for table, share in run.sparse.row_usage().items()},
            },
        )
        self.window_steps = 0
        self.window_start = time.perf_counter()

    def _validate(self) -> bool:
        """Whether it is the best so far."""
        run, config, position = self.run, self.run.config, self.position
        with self._off_the_clock():
            self.ahead.settle()
            found = evaluate(run, run.valid)
        improved = self.patience.update(found.logloss if config.train.best_by == "logloss" else -found.auc)
        if config.schedule.plateau_patience and self.patience.since_drop >= config.schedule.plateau_patience:
            run.schedule.plateau_drops += 1
            self.patience.since_drop = 0
            self.monitor.say(f"validation stands still: learning rates x {config.schedule.plateau_factor}")
        position.best, position.since_best = self.patience.best, self.patience.since_best
        position.since_drop, position.plateau_drops = self.patience.since_drop, run.schedule.plateau_drops
        self.monitor.say(
            f"valid at step {position.step}: AUC {found.auc:.4f}  LogLoss {found.logloss:.4f}  NE {found.ne:.4f}  "
            f"calibration {found.calibration:.3f}{'  (best)' if improved else ''}"
        )
        self.monitor.scalars(position.step, {f"valid/{key}": value for key, value in _described(found).items()})
        return improved

    def _save(self, best: bool) -> None:
        with self._off_the_clock():
            self.checkpoints.save(self.position, self.window, best=best)

    @contextmanager
    def _off_the_clock(self) -> Iterator[None]:
        """Validation and saving do not count in the examples per second."""
        started = time.perf_counter()
        yield
        self.window_start += time.perf_counter() - started

    def summary(self) -> dict[str, float | None]:
        """The "train" part of metrics.json: rates over the logged steps, validation and saving left out."""
        flop = self.run.cost.flop
        rate = self.trained_steps * self.run.config.data.batch_size / self.train_seconds if self.train_seconds else None
        tflops = rate * flop / 1e12 if rate else None
        return {
            "examples_per_second": rate,
            "gflop_per_example": flop / 1e9,
            "tflops": tflops,
            "mfu": tflops / self.peak if tflops else None,
            "peak_tflops": self.peak,
            "steps": self.position.step,
            "skipped_steps": self.position.skipped_steps,
            "first_step_seconds": self.first_step_seconds,
        }


def _described(found: Quality) -> dict[str, float | None]:
    """As JSON can say it: an undefined metric is null."""
    return {key: None if math.isnan(value) else value for key, value in asdict(found).items()}
