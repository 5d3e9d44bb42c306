"""Asked once a step, before anything changes: the vote, the cause, and the line that says what was wrong and where."""

import math
import statistics

from megarec.checkpoint.agreement import told_by_ranks
from megarec.checkpoint.position import Position
from megarec.launching.interruption import Interruption
from megarec.parallel.collectives import build_channel
from megarec.training.build import Run
from megarec.training.diagnosis import diagnose
from megarec.training.drop import loss_scale_can_shrink
from megarec.training.faults import CAUSES, FaultPolicy, cause_of
from megarec.training.monitor import Monitor
from megarec.training.step import Evidence
from megarec.training.vote import Ballot, Vote, faulty_ranks


class StepJudge:
    """A `megarec.training.step.Judge`.

    Attributes:
        loss: mean over the global batch of the last step.
        signum: a signal that some rank was sent; 0: none.
        said: what the log has of the last faulty step.
    """

    def __init__(
        self, run: Run, monitor: Monitor, policy: FaultPolicy, position: Position, interruption: Interruption
    ) -> None:
        self._run, self._monitor, self._policy, self._position = run, monitor, policy, position
        world = build_channel(run.topology, "world", run.ledger)
        self._vote = Vote(run.engine, run.sparse, world, lambda: interruption.signum or 0)
        self.loss, self.signum, self.said = math.nan, 0, ""

    def __call__(self, evidence: Evidence) -> str | None:
        ballots = self._vote(evidence)
        self.signum = max(int(ballot.signum) for ballot in ballots)
        self.loss = statistics.fmean(ballot.loss for ballot in ballots)
        cause = cause_of(ballots, loss_scale_can_shrink(self._run.engine))
        if cause is None and self._policy.spikes(self.loss):
            cause = "spike"
        if cause is not None and cause != "overflow":
            self._report(cause, ballots, evidence)
        self._vote.clear()
        return cause

    def _report(self, cause: str, ballots: list[Ballot], evidence: Evidence) -> None:
        run, faulty = self._run, faulty_ranks(ballots)
        shown = run.topology.rank in faulty or cause == "spike"
        mine = diagnose(ballots[run.topology.rank], evidence, self._vote.dense, run.sparse, run.schema.numeric, shown)
        found = told_by_ranks(mine, run.topology, run.device)
        parts = [f"rank {rank}: {text}" for rank, text in found.items()]
        if cause == "spike":
            highest = max(range(len(ballots)), key=lambda rank: ballots[rank].loss)
            parts.insert(
                0,
                f"mean loss {self.loss:.4g}, the bound is {self._policy.spike_bound():.4g}; highest on rank {highest}: "
                f"{ballots[highest].loss:.4g}",
            )
        elif not found.keys() >= set(faulty):
            parts.append(f"all faulty ranks: {', '.join(map(str, faulty))}")
        self.said = f"{CAUSES[cause]}: {'; '.join(parts)}"
        self._monitor.say(f"WARNING: FAULTY STEP {self._position.step + 1}, NOTHING WAS CHANGED: {self.said}")
