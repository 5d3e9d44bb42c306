"""How fast trials run: as stated, as earlier trials ran, or as a few steps of the cheapest and the dearest run."""

import json
import subprocess
from dataclasses import asdict
from pathlib import Path

from megarec.errors import UserError
from megarec.scaling.attended import attended
from megarec.scaling.budget import Budget, Pace, Plan, plan_sweep
from megarec.scaling.grid import Trial
from megarec.scaling.rows import Rows, write_whole
from megarec.scaling.sweep import command_of, environment_of, local_slots

PROBE_STEPS = 30


def find_pace(trials: list[Trial], rows: Rows, stated: float | None, jobs: int) -> Pace:
    """The pace to plan by.

    Args:
        stated: GFLOP/s of a trial.
        jobs: trials at a time, among which a probe shares out this machine's cores.

    Raises:
        UserError: the probe's run fails.
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
        (trial.cost.flop / 1e9, _probe(trial, rows.output / "probe" / trial.name, jobs)) for trial in ends.values()
    ]
    return Pace.measured(
        probed, f"measured in {PROBE_STEPS} steps of {' and of '.join(t.model for t in ends.values())}"
    )


def _flop(trial: Trial) -> int:
    return trial.cost.flop


def _probe(trial: Trial, folder: Path, jobs: int) -> dict[str, float]:
    slot = local_slots(jobs)[0]
    steps = [f"train.max_steps={PROBE_STEPS}", f"train.log_every={PROBE_STEPS // 3}"]
    command = [*command_of(trial, folder, slot.threads), *(word for step in steps for word in ("--set", step))]
    command.remove("--resume")
    with subprocess.Popen(attended(folder, environment_of(slot), command), stdin=subprocess.PIPE) as process:
        code = process.wait()
    if code:
        raise UserError(
            f"{trial.model}: {PROBE_STEPS} steps, to see its pace, failed with exit code {code}: {folder / 'log.txt'}"
        )
    train: dict[str, float] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["train"]
    return train


def planned(trials: list[Trial], rows: Rows, at_once: int, budget: Budget) -> Plan:
    """The sweep's plan; that of an interrupted sweep stays, so that going on leaves out what it left out.

    Raises:
        UserError: a probe's run fails.
    """
    path = rows.output / "plan.json"
    asked = {"trials": [trial.name for trial in trials], "at_once": at_once, "budget": asdict(budget)}
    if path.is_file() and (before := json.loads(path.read_text(encoding="utf-8")))["asked"] == asked:
        return Plan.of_json(before["plan"])
    plan = plan_sweep(trials, find_pace(trials, rows, budget.gflop_per_second, at_once), at_once, budget)
    write_whole(path, json.dumps({"asked": asked, "plan": plan.as_json()}, indent=2).encode())
    return plan
