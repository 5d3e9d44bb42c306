"""The training loop of one run, top to bottom."""

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from megarec.checkpoint.store import Checkpoints
from megarec.config.sections import RunConfig
from megarec.data.loader import EvalLoader
from megarec.dense.memory import saved_activations
from megarec.distributed.collectives import gather_texts
from megarec.distributed.process import start_process
from megarec.errors import PREEMPTED, STOPPED, RunEnded, UserError
from megarec.run.build import Run, build_run
from megarec.run.metrics import Predictions, Quality, described
from megarec.run.schedule import Patience
from megarec.run.state import TrainState
from megarec.signals import Interruption
from megarec.training.console import Console, SafeSummaryWriter
from megarec.training.faults.policy import Action, FaultPolicy
from megarec.training.faults.replicas import differing_replicas
from megarec.training.faults.step_check import StepCheck
from megarec.training.id_prefetch import BatchFuture, IdPrefetcher
from megarec.training.profiling import tracing
from megarec.training.step import StepResult, predict, train_step
from megarec.training.step_log import StepLog


def train(config: RunConfig, resume: bool, started: float) -> dict[str, Any]:
    """Train, keep the best by validation, test it, write metrics.json; collective.

    A run that its fault policy stops writes one too, with the reason as "stopped" and no "test".

    Args:
        resume: continue from the latest checkpoint under train.output_dir, or start from scratch if there is none.
        started: time.time() of the process start, for the time to the first step.

    Returns:
        What metrics.json holds.

    Raises:
        RunEnded: stopped by the fault policy, or pre-empted; on every rank, with everything saved that will be.
    """
    with Interruption() as interruption:
        return _train(config, resume, started, interruption)


def _train(config: RunConfig, resume: bool, started: float, interruption: Interruption) -> dict[str, Any]:
    device = start_process(config)
    run = build_run(config, device)
    config = run.config
    output = Path(config.train.output_dir)
    monitor = Console(run.topology.rank, run.dense.summary_writer(SafeSummaryWriter), run.schedule.total_steps)
    checkpoints = Checkpoints(output / "checkpoints", run, monitor.say, fresh=not resume)
    window = Predictions()
    position, name = checkpoints.resume(window) or (TrainState(), None)
    run.schedule.plateau_drops = position.plateau_drops
    if run.topology.rank == 0:
        (output / "config.json").write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")
    monitor.step(position.step)
    monitor.start(config.model_dump(mode="json"), run.choices)
    for split, reasons in run.skipped_rows.items():
        monitor.say(f"data.bad_rows=skip: left out of {split}: {reasons}")
    monitor.say(f"resumed from {checkpoints.directory / name}" if name else "starting from scratch")

    progress = StepLog(run, monitor, position, window, started)
    loop = Trainer(run, progress, checkpoints, interruption)
    try:
        with tracing(config.train.trace, output / "trace", run.topology.rank, position.step) as step_done:
            loop.run_to_the_end(step_done)
    except RunEnded as ended:
        monitor.close()
        if ended.code == STOPPED:
            stopped = {"stopped": str(ended), "train": progress.summary(), "skipped_rows": run.skipped_rows}
            try:
                _write_metrics(run, stopped)
            except UserError as error:  # why the run ended weighs more
                monitor.say(f"WARNING: {error}")
        raise
    loop.ahead.close()

    checkpoints.wait()
    if not math.isinf(position.best):
        checkpoints.load_best()
    test = evaluate(run, run.test)
    metrics = {
        "test": described(test),
        "valid": described(evaluate(run, run.valid)),
        "train": progress.summary(),
        "skipped_rows": run.skipped_rows,
    }
    monitor.say(
        f"test  AUC {test.auc:.4f}  LogLoss {test.logloss:.4f}  NE {test.ne:.4f}  calibration {test.calibration:.3f}"
    )
    monitor.close()
    _write_metrics(run, metrics)
    return metrics


def _write_metrics(run: Run, metrics: dict[str, Any]) -> None:
    if run.topology.rank == 0:
        path = Path(run.config.train.output_dir) / "metrics.json"
        try:
            path.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"{path}: cannot be written ({error.strerror}); fix that and run again with --resume: the checkpoint "
                "holds everything"
            ) from None


def evaluate(run: Run, loader: EvalLoader) -> Quality:
    """Exact metrics over all examples of a split and all ranks; collective, the same on every rank."""
    predictions = Predictions()
    for batch in loader.batches():
        batch = batch.to(run.device)
        predictions.add(predict(run.dense, run.sparse, batch), batch.labels, batch.valid)
    return predictions.gather(run.topology.world)


class Trainer:
    """The steps of a run from a position to its end."""

    def __init__(self, run: Run, progress: StepLog, checkpoints: Checkpoints, interruption: Interruption) -> None:
        self.run, self.progress, self.checkpoints = run, progress, checkpoints
        self.monitor, self.position = progress.monitor, progress.position
        self.patience = _patience(self.position)
        self.ahead = IdPrefetcher(run.sparse, run.device, run.overlap)
        self.policy = FaultPolicy(run.config.train.faults, self.position)
        self.step_check = StepCheck(run, self.monitor, self.policy, self.position, interruption)
        self.save_due = False

    def run_to_the_end(self, step_done: Callable[[], None]) -> None:
        run, position = self.run, self.position
        if position.validation_due:
            position.validation_due = False
            self._validate_and_save(validate=True, save=False)
        while position.step < run.schedule.total_steps and not self._ends_early():
            epoch, done = divmod(position.step, run.train.steps_per_epoch)
            for pending, start_next in self.ahead.steps(run.train.batches(epoch, start=done), self.progress.clock):
                action = self._step(pending, start_next)
                step_done()
                if action == "stop":
                    self._end(STOPPED, self._why_stopped())
                if action == "rollback":
                    self._roll_back()
                    break
                self._after_step()
                if position.step == run.schedule.total_steps or self._ends_early():
                    break

    def _step(self, pending: BatchFuture, start_next: Callable[[], None]) -> Action:
        run, position, progress = self.run, self.position, self.progress
        due = (position.step + 1) % run.config.train.log_every == 0 or position.step + 1 == run.schedule.total_steps
        progress.clock.next_step(sampled=due)
        factor = run.schedule.factor(position.step)
        run.dense.scale_learning_rate(factor)
        run.sparse.scale_learning_rate(factor)
        with progress.clock.part("ids"):
            batch, ids = pending()
        if position.step in position.left_out:
            return self._leave_out()

        def step() -> StepResult:
            return train_step(
                run.dense,
                run.sparse,
                batch,
                timer=progress.clock,
                ids=ids,
                after_lookup=start_next,
                want_norm=due,
                check=self.step_check,
            )

        if progress.first_step_seconds is None:
            with saved_activations(progress.activations, run.dense.module):
                result = step()
            progress.first_step_done()
        else:
            result = step()
        action: Action = "go on"
        if result.cause is None:
            self.policy.applied(self.step_check.loss)
            progress.window.add(result.logits, batch.labels)
        else:
            action = self.policy.skipped(result.cause)
            self.monitor.scalars(position.step + 1, progress.skips())
        if action == "go on":
            position.step += 1
            progress.step_done()
            if due:
                progress.log(result, factor)
        return action

    def _leave_out(self) -> Action:
        """Pass over a batch that was faulty before a rollback."""
        self.policy.count("left_out")
        self.position.step += 1
        self.monitor.say(f"step {self.position.step} left out: its batch was faulty before a rollback")
        self.monitor.scalars(self.position.step, self.progress.skips())
        return "go on"

    def _after_step(self) -> None:
        """What is due: comparing replicas, obeying a signal, validation, a checkpoint."""
        config, position = self.run.config.train, self.position
        if config.verify_replicas_every and position.step % config.verify_replicas_every == 0:
            with self.progress.clock.part("replicas"):
                problem = differing_replicas(self.run)
            if problem is not None:
                self._end(STOPPED, f"stopped at step {position.step}, as copies differ: {problem}")
        evaluate_every = config.evaluate_every or self.run.train.steps_per_epoch
        last = position.step == self.run.schedule.total_steps
        validate = position.step % evaluate_every == 0 or last
        if self.step_check.signum:
            self._obey(self.step_check.signum, validate)
        save = position.step % (config.checkpoint_every or evaluate_every) == 0 or last
        self._validate_and_save(validate, save or (self.save_due and not self.policy.in_a_row))

    def _validate_and_save(self, validate: bool, save: bool) -> None:
        best = validate and self._validate()
        if best or save:
            self._save(best)

    def _validate(self) -> bool:
        """Whether it is the best so far."""
        run, config, position = self.run, self.run.config, self.position
        with self.progress.off_the_clock():
            self.ahead.drain()
            found = evaluate(run, run.valid)
        improved = self.patience.update(found.logloss if config.train.best_by == "logloss" else -found.auc)
        if config.schedule.plateau_patience and self.patience.since_drop >= config.schedule.plateau_patience:
            run.schedule.plateau_drops += 1
            self.patience.since_drop = 0
            self.monitor.say(f"validation stands still: learning rates x {config.schedule.plateau_factor}")
        position.best, position.since_best = self.patience.best, self.patience.since_best
        position.best_by = config.train.best_by
        position.since_drop, position.plateau_drops = self.patience.since_drop, run.schedule.plateau_drops
        self.monitor.say(
            f"valid at step {position.step}: AUC {found.auc:.4f}  LogLoss {found.logloss:.4f}  NE {found.ne:.4f}  "
            f"calibration {found.calibration:.3f}{'  (best)' if improved else ''}"
        )
        self.monitor.scalars(position.step, {f"valid/{key}": value for key, value in described(found).items()})
        return improved

    def _save(self, best: bool) -> None:
        """Save, but no state that may be what makes steps faulty: that waits for a good step, or a good validation."""
        self.save_due = bool(self.policy.in_a_row) and not best
        if self.save_due:
            self.monitor.say(f"WARNING: NO CHECKPOINT OF STEP {self.position.step}: the last step was faulty")
            return
        with self.progress.off_the_clock():
            self.checkpoints.save(self.position, self.progress.window, best=best)

    def _ends_early(self) -> bool:
        patience = self.run.config.train.early_stopping
        if not patience or self.patience.since_best < patience:
            return False
        self.monitor.say(f"stopping early: {self.patience.since_best} validations without improvement")
        return True

    def _obey(self, signum: int, validate: bool) -> NoReturn:
        """Save and end, as a signal asked some rank to.

        Args:
            validate: a validation is due; it can take longer than the sender of the signal waits.
        """
        self.position.validation_due = validate
        self._save(best=False)
        name = signal.Signals(signum).name
        step = self.checkpoints.latest_step()
        saved = "nothing was saved yet" if step is None else f"saved at step {step}"
        self._end(PREEMPTED, f"pre-empted by {name} at step {self.position.step}, {saved}: resumable with --resume")

    def _roll_back(self) -> None:
        """Go back to the latest checkpoint, and go on without the faulty batches."""
        run, position, window, failed_at = self.run, self.position, self.progress.window, self.position.step + 1
        with self.progress.off_the_clock():
            self.ahead.drain()
            self.checkpoints.wait()
            window.clear()
            found = self.checkpoints.resume(window)
        if found is None:
            self._end(STOPPED, f"{self._why_stopped()}; there is no checkpoint to go back to")
        self.policy.rolled_back(found[0])
        self.patience = _patience(position)
        run.schedule.plateau_drops = position.plateau_drops
        self.save_due = False
        self.monitor.say(
            f"WARNING: ROLLED BACK FROM STEP {failed_at} TO {found[1]} (rollback {position.rollbacks} of "
            f"{run.config.train.faults.max_rollbacks}); left out from now on: steps "
            f"{', '.join(str(step + 1) for step in position.left_out)}"
        )

    def _why_stopped(self) -> str:
        faults, position = self.run.config.train.faults, self.position
        return (
            f"stopped by the fault policy at step {position.step + 1}: {self.policy.in_a_row} faulty steps in a row "
            f"(train.faults.max_in_a_row={faults.max_in_a_row}) after {position.rollbacks} rollbacks; the last one: "
            f"{self.step_check.said}"
        )

    def _end(self, code: int, reason: str) -> NoReturn:
        """End the run on all ranks, once none has anything left to write."""
        self.ahead.close()
        self.checkpoints.wait()
        gather_texts("", self.run.topology, self.run.device)  # a launcher ends all ranks with the first that ends
        raise RunEnded(code, reason)


def _patience(position: TrainState) -> Patience:
    return Patience(position.best, position.since_best, position.since_drop)
