"""The training loop of one run, top to bottom."""

import contextlib
import json
import logging
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from megarec.checkpoint.store import Checkpoints
from megarec.config.sections import RunConfig
from megarec.data.loader import EvalLoader
from megarec.dense.memory import saved_activations
from megarec.distributed.collectives import gather_texts, raise_together
from megarec.distributed.process import start_process
from megarec.errors import PREEMPTED, STOPPED, RunEnded, UserError
from megarec.files import write_whole
from megarec.run.build import Run, build_run, predictions_of
from megarec.run.metrics import Quality, described, in_words, why_undefined
from megarec.run.schedule import Patience
from megarec.run.state import TrainState
from megarec.signals import Interruption
from megarec.training.charts import hyper_parameters
from megarec.training.console import Console
from megarec.training.faults.policy import Action, FaultPolicy
from megarec.training.faults.replicas import differing_replicas
from megarec.training.faults.step_check import StepCheck
from megarec.training.id_prefetch import BatchFuture, IdPrefetcher
from megarec.training.profiling import tracing
from megarec.training.run_directory import check_outputs, only_run_in, set_aside
from megarec.training.step import StepResult, predict, train_step
from megarec.training.step_log import Predict, StepLog, no_prediction

METRICS_FILE = "metrics.json"
_log = logging.getLogger(__name__)


def train(config: RunConfig, resume: bool, started: float, predict: Predict = no_prediction) -> dict[str, Any]:
    """Train, keep the best by validation, test it, write metrics.json; collective.

    A run that its fault policy stops writes one too, with the reason as "stopped" and no "test"; one with train.test
    off has no "test" either.

    Args:
        resume: continue from the latest checkpoint under train.output_dir, or start from scratch if there is none.
        started: time.time() of the process start, for the time to the first step.
        predict: points that TensorBoard shows beside what is measured, by their tags.

    Returns:
        What metrics.json holds.

    Raises:
        RunEnded: stopped by the fault policy, or pre-empted; on every rank, with everything saved.
    """
    with Interruption() as stop:
        return _train(config, resume, started, stop, predict)


def _train(config: RunConfig, resume: bool, started: float, stop: Interruption, predict: Predict) -> dict[str, Any]:
    check_outputs(config)
    device = start_process(config)
    with only_run_in(Path(config.train.output_dir), device) as remark:
        run = build_run(config, device, watched=True)
        previous, console = _begin(run, resume)
        with console:
            stop.take_keyboard()
            if remark is not None:
                _log.warning("%s", remark)
            if previous is not None:
                _log.info("an earlier run is in %s now: this one starts from scratch", previous)
            return _train_and_test(run, console, resume, started, stop, predict(run))


def _begin(run: Run, resume: bool) -> tuple[Path | None, Console]:
    """Move an earlier run aside, unless this one continues it, and open the log; returns where the earlier one is.

    Collective: a directory that rank 0 cannot write ends every rank.
    """
    rank, output = run.topology.rank, Path(run.config.train.output_dir)
    previous, error = None, None
    try:
        previous = set_aside(output) if rank == 0 and not resume else None
        console = Console(rank, output, run.schedule.total_steps)
    except UserError as problem:
        error = problem
    raise_together(error, run.topology, run.device)
    return previous, console


def _train_and_test(
    run: Run, console: Console, resume: bool, started: float, interruption: Interruption, predicted: dict[str, float]
) -> dict[str, Any]:
    config, output, monitor = run.config, Path(run.config.train.output_dir), run.dense.monitor
    _check_validation(run)
    checkpoints, window = Checkpoints(output / "checkpoints", run), predictions_of(run)
    state, name = checkpoints.resume(window) or (TrainState(), None)
    run.schedule.plateau_drops = state.plateau_drops
    monitor.start(state.step)
    _write_output(run, "config.json", config.model_dump_json(indent=2), "nothing was trained; fix that and start again")
    console.progress(state.step)
    for line in run.choices:
        _log.info(line)
    if run.rounding:
        _log.warning(run.rounding)
    monitor.text("config", f"```json\n{config.model_dump_json(indent=2)}\n```")
    monitor.text("choices", "\n\n".join(run.choices))
    monitor.hyper_parameters(hyper_parameters(run))
    for split, reasons in run.skipped_rows.items():
        _log.info("data.bad_rows=skip: skipped in %s: %s", split, reasons)
    _log.info("resumed from %s", checkpoints.directory / name) if name else _log.info("starting from scratch")
    for line in checkpoints.changed:
        _log.warning(line)
    if (reason := _nothing_to_train(run, state)) is not None:
        _log.warning("NO STEP WILL BE MADE: %s is at step %d, and %s", name, state.step, reason)
    step_log = StepLog(run, console, state, window, started, predicted)
    trainer = Trainer(run, step_log, checkpoints, interruption)
    try:
        with tracing(config.train.trace, output / "trace", run.topology.rank, state.step) as step_done:
            trainer.train(step_done)
    except RunEnded as ended:
        monitor.flush()
        if ended.code == STOPPED:
            stopped = {"stopped": str(ended), "train": step_log.summary(), "skipped_rows": run.skipped_rows}
            try:
                _write_metrics(run, stopped, checkpoints)
            except UserError as error:  # the reason of the run's end is more important
                _log.warning("%s", error)
        raise
    trainer.prefetcher.close()

    checkpoints.wait()
    best = None if math.isinf(state.best) else checkpoints.load_best()
    valid, test = evaluate(run, run.valid), evaluate(run, run.test) if config.train.test else None
    problem = _why_not_finished(run, state, valid, test)
    if problem is not None:
        _log.warning("%s", problem)
    at = f"step {state.step}, the last" if best is None else f"step {best}, the best by {config.train.best_by}"
    _log.info("valid at %s: %s", at, in_words(valid))
    metrics: dict[str, Any] = {}
    if test is not None:
        _log.info("test  at %s: %s", at, in_words(test))
        monitor.scalars(state.step, step_log.points("test", test))
        metrics["test"] = described(test)
    monitor.flush()
    metrics |= {
        "valid": described(valid),
        "step": state.step if best is None else best,
        "best_by": None if best is None else config.train.best_by,
        "train": step_log.summary(),
        "skipped_rows": run.skipped_rows,
    }
    if problem is not None:
        metrics["stopped"] = problem
    _write_metrics(run, metrics, checkpoints)
    _log.info("wrote %s", output / METRICS_FILE)
    if problem is not None:
        gather_texts("", run.topology, run.device)  # a launcher ends all ranks with the first that ends
        raise RunEnded(STOPPED, problem)
    return metrics


def _nothing_to_train(run: Run, state: TrainState) -> str | None:
    """Why a resumed run has nothing left to train; None: it has."""
    if state.step >= run.schedule.total_steps:
        return f"this run has {run.schedule.total_steps}; raise train.epochs or max_steps"
    patience = run.config.train.early_stopping
    if patience is not None and state.since_best >= patience and not state.validation_due:
        return f"{state.since_best} validations brought no improvement (train.early_stopping={patience})"
    return None


def _check_validation(run: Run) -> None:
    """Raise a UserError where no validation could ever choose a best model; of the first label alone."""
    labels = run.valid.store.labels
    best_by, of_first = run.config.train.best_by, run.config.train.best_label in (None, run.schema.label)
    if best_by != "logloss" and of_first and len(labels) == 1:
        raise UserError(
            f"train.best_by={best_by!r}: all {len(run.valid.store):,} labels of the split valid of "
            f"{run.config.data.path} are {labels[0]:g}, and one class has no AUC; use train.best_by='logloss', or "
            "prepare a split valid with both labels"
        )


def _why_not_finished(run: Run, state: TrainState, valid: Quality, test: Quality | None) -> str | None:
    """Why the metrics of a run's best model are not available; None: they are."""
    metric = run.config.train.best_by
    reason = why_undefined(valid, metric)
    if math.isinf(state.best) and valid.examples and reason is not None:
        return (
            f"no best model was chosen, as no validation had a finite {metric} (the last: {reason}); what is tested is "
            f"step {state.step}, the last. Correct or leave out such rows of the split valid, or lower learning rates"
        )
    if test is not None and test.not_finite:
        return (
            f"the tested model has no metrics: {test.not_finite:,} of {test.examples:,} logits of the split test are "
            "NaN or infinite; correct or leave out such rows of it"
        )
    return None


def _write_metrics(run: Run, metrics: dict[str, Any], checkpoints: Checkpoints) -> None:
    step = checkpoints.latest_step()
    saved = "no checkpoint was saved" if step is None else f"--resume goes on from the checkpoint of step {step}"
    _write_output(run, METRICS_FILE, json.dumps(metrics, indent=2), f"the log has the metrics, and {saved}")


def _write_output(run: Run, name: str, content: str, hint: str) -> None:
    """Write one of the run's files; collective: an error of rank 0 is raised on all ranks.

    Args:
        hint: what to tell the user where it cannot be written.

    Raises:
        UserError: it cannot.
    """
    problem, path = None, Path(run.config.train.output_dir) / name
    try:
        if run.topology.rank == 0:
            write_whole(path, f"{content}\n".encode())
    except OSError as error:
        problem = UserError(f"{path}: cannot be written ({error.strerror or error}); {hint}")
    raise_together(problem, run.topology, run.device)


def evaluate(run: Run, loader: EvalLoader) -> Quality:
    """Exact metrics over all examples of a split and all ranks, of averaged weights where the run has them; collective,
    the same on every rank."""
    predictions = predictions_of(run)
    with run.averages.in_place():
        for batch in loader.batches():
            batch = batch.to(run.device)
            predictions.add(predict(run.dense, run.sparse, batch), batch.labels, batch.valid)
    return predictions.gather(run.topology.world, loader.groups)


class Trainer:
    """The steps of a run from its current position to its end."""

    def __init__(self, run: Run, step_log: StepLog, checkpoints: Checkpoints, interruption: Interruption) -> None:
        self.run, self.step_log, self.checkpoints = run, step_log, checkpoints
        self.state, self.timer = step_log.state, step_log.timer
        self.patience = _patience(self.state)
        self.prefetcher = IdPrefetcher(run.sparse, run.device, run.overlap)
        self.policy = FaultPolicy(run.config.train.faults, self.state)
        self.step_check = StepCheck(run, self.policy, self.state, interruption)
        self.save_due = False

    def train(self, step_done: Callable[[], None]) -> None:
        run, state = self.run, self.state
        if state.validation_due:
            state.validation_due = False
            self._validate_and_save(validate=True, save=False)
        while state.step < run.schedule.total_steps and not self._ends_early():
            epoch, done = divmod(state.step, run.train.steps_per_epoch)
            for pending, start_next in self.prefetcher.steps(run.train.batches(epoch, start=done), self.timer):
                action = self._step(pending, start_next)
                step_done()
                if action == "stop":
                    self._end(STOPPED, self._why_stopped())
                if action == "rollback":
                    self._roll_back()
                    break
                self._maybe_validate_and_save()
                if state.step == run.schedule.total_steps or self._ends_early():
                    break
        if state.step < run.schedule.total_steps:
            _log.info("stopping early: %d validations without improvement", self.patience.since_best)
        elif self.policy.in_a_row > 1:
            self._end(
                STOPPED,
                f"stopped by the fault policy at step {state.step}: the last {self.policy.in_a_row} steps of the run "
                "were faulty, and no good one follows; test the best checkpoint with tools/evaluate.py, or train on "
                f"with a larger train.epochs or train.max_steps; the last one: {self.step_check.description}",
            )

    def _step(self, pending: BatchFuture, start_next: Callable[[], None]) -> Action:
        run, state, step_log, timer = self.run, self.state, self.step_log, self.timer
        due = (state.step + 1) % run.config.train.log_every == 0 or state.step + 1 == run.schedule.total_steps
        timer.next_step(sampled=due)
        factor = run.schedule.factor(state.step)
        run.dense.scale_learning_rate(factor)
        run.sparse.scale_learning_rate(factor)
        with timer.part("ids"):
            batch, ids = pending()
        if state.step in state.left_out:
            return self._leave_out()

        def meanwhile() -> None:
            start_next()
            self.checkpoints.hold_changes()

        def step() -> StepResult:
            return train_step(
                run.dense,
                run.sparse,
                batch,
                timer=timer,
                ids=ids,
                after_lookup=start_next if self.prefetcher.threaded else lambda: None,
                meanwhile=meanwhile,
                want_norm=due,
                check=self.step_check,
            )

        first = step_log.first_step_seconds is None
        with saved_activations(step_log.activations, run.dense.module) if first else contextlib.nullcontext():
            result = step()
        action: Action = "go on"
        if result.cause is None:
            action = self.policy.applied(self.step_check.loss, self.step_check.left_out)
            with timer.part("optimizer"):
                run.averages.update(state.step + 1 - state.skipped_steps)
            step_log.window.add(result.logits, batch.labels, left_out=self.step_check.left_out)
        else:
            action = self.policy.skipped(result.cause)
            self.run.dense.monitor.scalars(state.step + 1, step_log.skips())
        if first:
            step_log.first_step_done()
        if action == "go on":
            state.step += 1
            step_log.step_done()
            if due:
                step_log.log(result, factor)
        return action

    def _leave_out(self) -> Action:
        """Pass over a batch that was faulty before a rollback."""
        self.policy.count("left_out")
        self.state.step += 1
        _log.info("step %d skipped: its batch was faulty before a rollback", self.state.step)
        self.run.dense.monitor.scalars(self.state.step, self.step_log.skips())
        return "go on"

    def _maybe_validate_and_save(self) -> None:
        """Do what is due: comparing replicas, a signal, validation, a checkpoint."""
        config, state = self.run.config.train, self.state
        if config.verify_replicas_every and state.step % config.verify_replicas_every == 0:
            with self.timer.part("replicas"):
                problem = differing_replicas(self.run)
            if problem is not None:
                self._end(STOPPED, f"stopped at step {state.step}, as replicas differ: {problem}")
        evaluate_every = config.evaluate_every or self.run.train.steps_per_epoch
        last = state.step == self.run.schedule.total_steps
        validate = state.step % evaluate_every == 0 or last
        if self.step_check.signum:
            self._save_and_exit(self.step_check.signum, validate)
        save = state.step % (config.checkpoint_every or evaluate_every) == 0 or last
        self._validate_and_save(validate, save or (self.save_due and not self.policy.in_a_row))

    def _validate_and_save(self, validate: bool, save: bool) -> None:
        best = validate and self._validate()
        if best or save:
            self._save(best)

    def _validate(self) -> bool:
        """Whether it is the best so far."""
        run, config, state = self.run, self.run.config, self.state
        self.prefetcher.drain()  # the ids of the next step are its traffic
        with self.step_log.off_the_clock():
            found = evaluate(run, run.valid)
        score = float(getattr(found, config.train.best_by))
        improved = self.patience.update(score if config.train.best_by == "logloss" else -score)
        if (reason := why_undefined(found, config.train.best_by)) is not None:
            _log.warning(
                "VALIDATION AT STEP %d HAS NO %s, SO IT CANNOT BE THE BEST: %s",
                state.step,
                config.train.best_by.upper(),
                reason,
            )
        if config.schedule.plateau_patience and self.patience.since_drop >= config.schedule.plateau_patience:
            run.schedule.plateau_drops += 1
            self.patience.since_drop = 0
            _log.info("validation does not improve: learning rates x %g", config.schedule.plateau_factor)
        state.best, state.since_best = self.patience.best, self.patience.since_best
        state.best_by = config.train.best_by
        state.since_drop, state.plateau_drops = self.patience.since_drop, run.schedule.plateau_drops
        _log.info("valid at step %d: %s%s", state.step, in_words(found), "  (best)" if improved else "")
        self.run.dense.monitor.scalars(state.step, self.step_log.points("valid", found))
        return improved

    def _save(self, best: bool) -> None:
        """Save, unless the state may cause faulty steps: then wait for a good step, or a good validation."""
        self.save_due = bool(self.policy.in_a_row) and not best
        if self.save_due:
            _log.warning("NO CHECKPOINT OF STEP %d: the last step was faulty", self.state.step)
            return
        with self.step_log.off_the_clock():
            self.checkpoints.save(self.state, self.step_log.window, best=best)

    def _ends_early(self) -> bool:
        patience = self.run.config.train.early_stopping
        return patience is not None and self.patience.since_best >= patience

    def _save_and_exit(self, signum: int, validate: bool) -> NoReturn:
        """Save and end, after a signal to some rank.

        Args:
            validate: a validation is due; it can take longer than the sender of the signal waits.
        """
        self.state.validation_due = validate
        self._save(best=False)
        name = signal.Signals(signum).name
        step = self.checkpoints.latest_step()
        saved = "nothing was saved yet" if step is None else f"saved at step {step}"
        self._end(PREEMPTED, f"pre-empted by {name} at step {self.state.step}, {saved}: resumable with --resume")

    def _roll_back(self) -> None:
        """Go back to the latest checkpoint, and go on without the faulty batches."""
        run, state, window, failed_at = self.run, self.state, self.step_log.window, self.state.step + 1
        with self.step_log.off_the_clock():
            self.prefetcher.drain()
            self.checkpoints.wait()
            window.clear()
            found = self.checkpoints.resume(window)
        if found is None:
            self._end(STOPPED, f"{self._why_stopped()}; there is no checkpoint to go back to")
        self.policy.rolled_back(found[0])
        run.dense.monitor.start(state.step)
        self.patience = _patience(state)
        run.schedule.plateau_drops = state.plateau_drops
        self.save_due = False
        _log.warning(
            "ROLLED BACK FROM STEP %d TO %s (rollback %d of %d); skipped from now on: steps %s",
            failed_at,
            found[1],
            state.rollbacks,
            run.config.train.faults.max_rollbacks,
            ", ".join(str(step + 1) for step in state.left_out),
        )

    def _why_stopped(self) -> str:
        faults, state = self.run.config.train.faults, self.state
        return (
            f"stopped by the fault policy at step {state.step + 1}: {self.policy.in_a_row} faulty steps in a row "
            f"(train.faults.max_in_a_row={faults.max_in_a_row}) after {state.rollbacks} rollbacks; the last one: "
            f"{self.step_check.description}"
        )

    def _end(self, code: int, reason: str) -> NoReturn:
        """End the run on all ranks, once none has anything left to write."""
        self.prefetcher.close()
        self.checkpoints.wait()
        gather_texts("", self.run.topology, self.run.device)  # a launcher ends all ranks with the first that ends
        raise RunEnded(code, reason)


def _patience(state: TrainState) -> Patience:
    return Patience(state.best, state.since_best, state.since_drop)
