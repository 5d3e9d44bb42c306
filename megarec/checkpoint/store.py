"""Saves, loads and resumes a run; collective except the writing itself, which a thread does."""

import logging
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megarec.checkpoint import compatibility, contents, publish
from megarec.checkpoint.format import INDEX, Index, read_index
from megarec.checkpoint.pointers import BEST, LATEST, name_of, pointed
from megarec.checkpoint.publish import Plan, SaveFailed
from megarec.checkpoint.reading import Reader, verify
from megarec.checkpoint.settings import changed_settings
from megarec.checkpoint.snapshot import Snapshot
from megarec.checkpoint.writing import lower_priority
from megarec.distributed.collectives import from_rank_0, gather_texts, raise_together
from megarec.errors import DamagedCheckpoint, UserError
from megarec.run.build import Run
from megarec.run.metrics import Predictions
from megarec.run.state import TrainState

_log = logging.getLogger(__name__)


class _OwnPart:
    """This rank's part of a save: whether it has ended, and why it failed ("" if it did not)."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.failure = ""


class Checkpoints:
    """The checkpoints of one run, under one directory that all hosts share.

    Args:
        directory: of all checkpoints of the run.

    Attributes:
        changed: a line for every setting that differs from the checkpoint loaded last.
    """

    def __init__(self, directory: Path, run: Run) -> None:
        run.dense.check_supported()
        self.directory, self._run = directory, run
        self._snapshot = Snapshot()
        self._writing: threading.Thread | None = None
        self._part = _OwnPart()
        self._others = publish.OtherParts()
        self._saves = 0
        self.changed: list[str] = []
        if run.topology.rank == 0:
            publish.clean(directory)
        self._together(self._make_directory)
        # The token is unique: late threads of other or earlier jobs never write into this job's directories.
        self._token = from_rank_0(secrets.randbits(62), run.topology, run.device)

    def _make_directory(self) -> None:
        try:
            if self._run.topology.rank == 0:
                self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{self.directory}: cannot be made ({error.strerror}); no checkpoint could be saved"
            ) from None

    def save(self, position: TrainState, window: Predictions | None = None, *, best: bool = False) -> None:
        """Save the run's state; `latest` moves to it once it is whole on the disk. Collective.

        Waits for the save before this one and, on a CPU, for a copy of the rank's slices (see `hold_changes`). The rest
        happens in a thread, unless train.background_checkpoints is off. An error from then on, a full disk or
        anything else, ends the save, with a line, and not the run.

        Args:
            window: predictions that the log has not shown yet.
            best: whether `best` moves to it as well.
        """
        self.wait()
        run, config = self._run, self._run.config
        self._snapshot.take(contents.written(run, window))
        self._saves += 1
        plan = Plan(
            checkpoints=self.directory,
            step=position.step,
            token=f"{self._token:016x}-{self._saves}",
            ranks=run.topology.world_size,
            about=contents.about(run, position) if run.topology.rank == 0 else {},
            pointers=(BEST, LATEST) if best else (LATEST,),
            keep=config.train.keep_checkpoints,
            timeout=config.parallel.timeout_seconds,
        )
        self._part, self._others = _OwnPart(), publish.OtherParts()
        # A daemon: a job that ends with an error must not wait for ranks that are gone.
        self._writing = threading.Thread(target=self._write, args=(plan,), name="checkpoint", daemon=True)
        self._writing.start()
        if not config.train.background_checkpoints:
            self.wait()

    def hold_changes(self) -> None:
        """Before the run changes: on an accelerator the change waits there for the copy of the last save."""
        self._snapshot.hold()

    def _write(self, plan: Plan) -> None:
        """In the thread: no collectives, no tensors of the run."""
        rank = self._run.topology.rank
        failure = None
        lower_priority()
        try:
            try:
                publish.write_part(plan, rank, self._snapshot)
            except SaveFailed as error:
                failure = error  # another rank's failure is in its mark, which rank 0 logs, or `wait` does
                self._part.failure = str(error).removeprefix(f"rank {rank}: ")
            finally:
                self._part.ended.set()
            if rank == 0:
                publish.publish(plan, failure, self._others)
        except SaveFailed as error:
            kept = pointed(self.directory, LATEST)
            _log.warning(
                "CHECKPOINT OF STEP %d WAS NOT SAVED (%s); training goes on, the latest checkpoint is %s",
                plan.step,
                error,
                self.directory / kept if kept else "none",
            )

    def wait(self) -> None:
        """Until all ranks' parts of the last save are done; on rank 0, until it is published. Collective.

        A rank that cannot leave a mark where rank 0 looks for it says here why: rank 0 would wait for it as long as
        the others wait for rank 0.
        """
        if self._writing is not None:
            self._part.ended.wait()
            run = self._run
            self._others.failures = gather_texts(self._part.failure, run.topology, run.device)
            self._others.ended.set()
            self._writing.join()
            self._writing = None

    def resume(self, window: Predictions | None = None) -> tuple[TrainState, str] | None:
        """Load the latest checkpoint, or with train.fall_back the newest good one; collective.

        Args:
            window: takes the predictions that the log had not shown yet.

        Returns:
            The run's position, and the checkpoint's name; None when there is none.

        Raises:
            UserError: the checkpoint is damaged, or does not fit this run; the message names file and reason.
        """
        step = self._agreed_step(LATEST)
        while step is not None:
            try:
                return self.load(step, window), name_of(step)
            except DamagedCheckpoint as error:
                older = self._agreed_step(None, below=step)
                if not self._run.config.train.fall_back:
                    hint = f"; train.fall_back=true resumes from {name_of(older)}" if older is not None else ""
                    raise DamagedCheckpoint(f"{error}{hint}") from error
                if older is None:
                    raise
                if self._run.topology.rank == 0:
                    _log.warning("%s; FALLING BACK TO %s (train.fall_back=true)", error, name_of(older))
                step = older
        return None

    def latest_step(self) -> int | None:
        """The step of the latest checkpoint; collective."""
        self.wait()
        return self._agreed_step(LATEST)

    def load_best(self) -> int | None:
        """Load the best checkpoint by validation; collective.

        Returns:
            Its step; None, with a warning, when it is not there or damaged: the weights stay then.
        """
        self.wait()
        step = self._agreed_step(BEST)
        problem = "none was saved" if step is None else None
        try:
            if step is not None:
                self.load(step)
        except DamagedCheckpoint as error:
            problem = str(error)
        if problem and self._run.topology.rank == 0:
            _log.warning("NO BEST CHECKPOINT (%s): the last weights stay", problem)
        return step if problem is None else None

    def load(self, step: int, window: Predictions | None = None) -> TrainState:
        """Fill the run from the checkpoint of a step, whatever topology wrote it; collective.

        Raises:
            DamagedCheckpoint: a file is not what it should be.
            UserError: it does not fit this run.
        """
        run, directory = self._run, self.directory / name_of(step)
        index = self._together(lambda: self._opened(directory))
        position = self._together(lambda: _position(directory, index, step))
        if compatibility.resets_towers(run, index):
            position.forget_best()  # `best` is a checkpoint of the old towers, which this run can never load whole
        reader = Reader(directory, index)
        self._together(lambda: contents.check(run, directory, index, position))
        self._together(lambda: contents.fill(run, reader, window))
        contents.finish(run, index, position.step, position.skipped_steps)
        self.changed = list(changed_settings(run, index))
        for line in contents.remarks(run, index) if run.topology.rank == 0 else []:
            _log.info(line)
        return position

    def _opened(self, directory: Path) -> Index:
        """The index, after this rank has verified its share of the files: all of them are before anything changes."""
        index, topology = read_index(directory), self._run.topology
        verify(directory, index, topology.rank, topology.world_size)
        return index

    def _together(self, work: Callable[[], Any]) -> Any:
        """Do something on every rank; an error of one rank is raised on all."""
        result, problem = None, None
        try:
            result = work()
        except UserError as error:
            problem = error
        raise_together(problem, self._run.topology, self._run.device)
        return result

    def _agreed_step(self, pointer: str | None, below: int | None = None) -> int | None:
        """By rank 0's view of the directory: the step that a pointer names, else the newest, below a step if one is
        given.

        `best` that is not there is no checkpoint at all.
        """
        step = -1
        if self._run.topology.rank == 0:
            names = publish.published(self.directory)
            if below is not None:
                names = [name for name in names if int(name.removeprefix("step-")) < below]
            named = pointed(self.directory, pointer) if pointer else None
            if pointer != BEST and named is None and names:
                named = names[0]
            step = int(named.removeprefix("step-")) if named else -1
        step = from_rank_0(step, self._run.topology, self._run.device)
        return None if step < 0 else step


def _position(directory: Path, index: Index, step: int) -> TrainState:
    position = TrainState.from_json(index.position, directory / INDEX)
    if not index.step == position.step == step:
        raise DamagedCheckpoint(
            f"{directory / INDEX}: step {index.step}, position.step {position.step}; expected {step}, as in its "
            "directory's name"
        )
    return position
