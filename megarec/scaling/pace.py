"""How fast trials run: as stated, as earlier trials ran, or as a few steps of the cheapest and the dearest run."""

import json
from dataclasses import asdict
from pathlib import Path

from megarec.errors import UserError
from megarec.scaling.budget import Budget, Pace, Plan, plan_sweep
from megarec.scaling.grid import Trial
from megarec.scaling.rows import Rows, write_whole
from megarec.scaling.sweep import Slot, command_of, start_on

PROBE_STEPS = 30


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
            f"{trial.model}: {PROBE_STEPS} steps, to see its pace, failed with exit code {code}: {folder / 'log.txt'}; "
            "mend it, take it out of the study, or state a pace (--gflop-per-second)"
        )
    train: dict[str, float] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["train"]
    if not train["examples_per_second"]:
        raise UserError(f"{trial.model}: too few steps to see its pace; state one (--gflop-per-second)")
    return train


def planned(trials: list[Trial], rows: Rows, slots: list[Slot], budget: Budget) -> Plan:
    """The sweep's plan; that of an interrupted sweep stays, so that going on leaves out what it left out.

    Raises:
        UserError: a probe's run fails.
    """
    path, at_once = rows.output / "plan.json", len(slots)
    asked = {"trials": [trial.name for trial in trials], "at_once": at_once, "budget": asdict(budget)}
    if path.is_file() and (before := json.loads(path.read_text(encoding="utf-8")))["asked"] == asked:
        return Plan.of_json(before["plan"])
    plan = plan_sweep(trials, find_pace(trials, rows, budget.gflop_per_second, slots[0]), at_once, budget)
    write_whole(path, json.dumps({"asked": asked, "plan": plan.as_json()}, indent=2).encode())
    return plan
