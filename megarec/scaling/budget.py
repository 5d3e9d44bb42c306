"""What a sweep will cost, planned before it starts, and which models a budget leaves out.

The pace of trials is as stated, as earlier trials ran, or as a few steps of the cheapest and the most expensive run.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megarec.errors import UserError
from megarec.files import read_object, write_whole
from megarec.scaling.grid import Trial, of_models
from megarec.scaling.results import Rows
from megarec.scaling.sweep import Slot, command_of, start_on

_FORWARD_SHARE = 1 / 3  # of a training step's FLOPs: what predicting an example costs
PROBE_STEPS = 30


@dataclass(frozen=True)
class Pace:
    """How long a trial takes: start + examples x (per_example + per_gflop x GFLOP/example), in seconds.

    Attributes:
        source: where it is from, for people.
    """

    start: float
    per_example: float
    per_gflop: float
    source: str

    @staticmethod
    def stated(gflop_per_second: float) -> "Pace":
        return Pace(0.0, 0.0, 1 / gflop_per_second, f"{gflop_per_second:g} GFLOP/s a trial, as stated")

    @staticmethod
    def measured(trials: Iterable[tuple[float, dict[str, Any]]], source: str) -> "Pace":
        """From trials' GFLOP/example and the "train" part of their metrics.json: a line through their seconds an
        example, neither part of it below 0."""
        gflop, train = zip(*((gflop, train) for gflop, train in trials), strict=True)
        seconds = np.array([1 / each["examples_per_second"] for each in train])
        cost = np.array(gflop)
        slope, offset = np.polyfit(cost, seconds, 1) if len(set(gflop)) > 1 else (0.0, 0.0)
        if slope <= 0 or offset < 0:
            slope, offset = float(seconds @ cost / (cost @ cost)), 0.0
        start = float(np.mean([each["first_step_seconds"] for each in train]))
        return Pace(start, float(offset), float(slope), source)

    def seconds(self, trial: Trial) -> float:
        """Of a trial that does not stop early: training, and predicting at every validation and at the end."""
        gflop, rows = trial.cost.flop / 1e9, trial.schema.rows
        train = trial.config.train
        every = (train.evaluate_every or rows["train"] // trial.config.data.batch_size) * trial.config.data.batch_size
        predicted = (trial.examples // max(every, 1) + 1) * rows["valid"] + rows["test"]
        return self.start + (trial.examples + _FORWARD_SHARE * predicted) * (self.per_example + self.per_gflop * gflop)


@dataclass(frozen=True)
class Budget:
    """What a sweep may cost.

    Attributes:
        gflop: training FLOPs of all runs together, in 1e9; None: no limit.
        hours: from the start of the sweep to its end; None: no limit.
        gflop_per_second: of a trial, to plan by; None: measured.
    """

    gflop: float | None = None
    hours: float | None = None
    gflop_per_second: float | None = None


@dataclass(frozen=True)
class Line:
    """One model of a plan.

    Attributes:
        runs: its trials: all learning rates with the first seed, the other seeds with the best of them.
        gflop, seconds: of all its runs, each on its own.
        left_out: why; None: it runs.
    """

    model: str
    runs: int
    gflop_per_example: float
    gflop: float
    seconds: float
    left_out: str | None


@dataclass(frozen=True)
class Plan:
    """What a sweep runs.

    Attributes:
        lines: the models, cheapest first.
        at_once: trials that run at the same time.
    """

    lines: tuple[Line, ...]
    pace: Pace
    at_once: int

    @property
    def kept(self) -> list[Line]:
        return [line for line in self.lines if line.left_out is None]

    @property
    def gflop(self) -> float:
        return sum(line.gflop for line in self.kept)

    @property
    def hours(self) -> float:
        return sum(line.seconds for line in self.kept) / 3600 / self.at_once

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "gflop": self.gflop, "hours": self.hours}

    @staticmethod
    def of_json(value: dict[str, Any]) -> "Plan":
        return Plan(tuple(Line(**line) for line in value["lines"]), Pace(**value["pace"]), value["at_once"])


def plan_sweep(trials: list[Trial], pace: Pace, at_once: int, budget: Budget) -> Plan:
    """Keep the cheapest models that fit the budget with all their runs; more expensive ones are left out whole."""
    lines: list[Line] = []
    gflop = hours = 0.0  # of what is kept so far
    for line in sorted((_line(model, own, pace) for model, own in of_models(trials)), key=lambda line: line.gflop):
        takes = line.seconds / 3600 / at_once
        why: str | None = "costs more than a model that is left out"
        if not (lines and lines[-1].left_out):
            why = _exceeds("GFLOP", line.gflop, gflop, budget.gflop) or _exceeds("hours", takes, hours, budget.hours)
        if why is None:
            gflop, hours = gflop + line.gflop, hours + takes
        lines.append(replace(line, left_out=why))
    return Plan(tuple(lines), pace, at_once)


def _exceeds(unit: str, needed: float, spent: float, limit: float | None) -> str | None:
    if limit is None or spent + needed <= limit:
        return None
    return f"needs {needed:,.3g} {unit}, of the budget's {limit:,g} {limit - spent:,.3g} are left"


def _line(model: str, trials: list[Trial], pace: Pace) -> Line:
    """A model's trials at most: all that choose with the first seed, and the other seeds of the one that costs most."""
    others: dict[int, list[Trial]] = {}
    for trial in trials:
        if not trial.tuning:
            others.setdefault(trial.rate, []).append(trial)
    runs = [trial for trial in trials if trial.tuning]
    runs += max(others.values(), key=lambda own: sum(trial.gflop for trial in own), default=[])
    cost, seconds = max(trial.cost.flop for trial in trials), sum(pace.seconds(trial) for trial in runs)
    return Line(model, len(runs), cost / 1e9, sum(trial.gflop for trial in runs), seconds, None)


def find_pace(trials: list[Trial], rows: Rows, stated: float | None, slot: Slot) -> Pace:
    """The pace to plan by.

    Args:
        stated: GFLOP/s of a trial.
        slot: where a probe runs.

    Raises:
        UserError: a probe's run fails.
    """
    if stated is not None:
        return Pace.stated(stated)
    done = [
        (row["train_gflop_per_example"], row)
        for row in rows.of.values()
        if row["examples_per_second"] and row["first_step_seconds"]
    ]
    if done:
        return Pace.measured(done, f"measured in {len(done)} finished runs")
    ends = {trial.name: trial for trial in (min(trials, key=_flop), max(trials, key=_flop))}
    probed = [
        (trial.cost.flop / 1e9, _probe(trial, rows.output / "probe" / trial.name, slot)) for trial in ends.values()
    ]
    return Pace.measured(
        probed, f"measured in {PROBE_STEPS} steps of {' and of '.join(t.model for t in ends.values())}"
    )


def _flop(trial: Trial) -> int:
    return trial.cost.flop


def _probe(trial: Trial, folder: Path, slot: Slot) -> dict[str, float]:
    steps = [f"train.max_steps={PROBE_STEPS}", f"train.log_every={PROBE_STEPS // 3}"]
    command = [*command_of(trial, folder, slot.threads), *(word for step in steps for word in ("--set", step))]
    command.remove("--resume")
    with start_on(slot, trial, folder, command) as process:
        code = process.wait()
    if code:
        raise UserError(
            f"{trial.model}: {PROBE_STEPS} steps, to see its pace, failed with exit code {code}: "
            f"{folder / 'output.txt'}; fix it, take it out of the study, or state a pace (--gflop-per-second)"
        )
    metrics = read_object(folder / "metrics.json", "the metrics of a run", nan=True)
    train: dict[str, float] = metrics.get("train", {})
    if not train.get("examples_per_second"):
        raise UserError(f"{trial.model}: too few steps to see its pace; state one (--gflop-per-second)")
    return train


def planned(trials: list[Trial], rows: Rows, slots: list[Slot], budget: Budget) -> Plan:
    """The sweep's plan; that of an interrupted sweep stays, so that it leaves out the same models.

    Raises:
        UserError: a probe's run fails.
    """
    path, at_once = rows.output / "plan.json", len(slots)
    asked = {"trials": [trial.name for trial in trials], "at_once": at_once, "budget": asdict(budget)}
    before = read_object(path, "the plan of a sweep") if os.path.lexists(path) else {}
    if before.get("asked") == asked:
        try:
            return Plan.of_json(before["plan"])
        except (KeyError, TypeError) as error:
            raise UserError(f"{path}: {error} is not what a sweep writes; remove the file to plan again") from error
    plan = plan_sweep(trials, find_pace(trials, rows, budget.gflop_per_second, slots[0]), at_once, budget)
    write_whole(path, json.dumps({"asked": asked, "plan": plan.as_json()}, indent=2).encode())
    return plan
