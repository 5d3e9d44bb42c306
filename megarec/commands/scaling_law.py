"""Is quality a power of compute? A sweep over sizes and seeds, the law with its intervals, and the figure."""

import argparse
import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from megarec.errors import ArgumentParser, UserError, exits_cleanly
from megarec.ray_cluster import RayCluster
from megarec.scaling.ladder import LADDER
from megarec.scaling.points import COLUMN, QUALITIES, read_points
from megarec.scaling.study import Study, as_json, study
from megarec.scaling.tables import Split, in_words, markdown
from megarec.scaling.towers import cost_table, costs, plot_costs
from megarec.signals import unwinding

if TYPE_CHECKING:
    from megarec.scaling.grid import Trial
    from megarec.scaling.results import Rows
    from megarec.scaling.sweep import Slot

MOST_JOBS = 4_096


@exits_cleanly
@unwinding()
def main() -> None:
    parser = ArgumentParser(description="Fit and draw quality as a power of compute.")
    commands = parser.add_subparsers(dest="command", required=True)
    sweep = commands.add_parser("sweep", help="models x learning rates x seeds; goes on where an earlier sweep ended")
    sweep.add_argument(
        "--study",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSON: base, models, learning rates, seeds; or a search: base, budget, families",
    )
    sweep.add_argument("--output", type=Path, metavar="DIR", help="default: runs/<the study's name>")
    places = sweep.add_mutually_exclusive_group()
    places.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time on this machine (default: 1)")
    places.add_argument("--hostfile", type=Path, metavar="FILE", help="run on these hosts, as many at a time as slots")
    places.add_argument("--engine", choices=("ray",), help="run on a Ray cluster, as many at a time as it has room for")
    sweep.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="address of the cluster, or auto (default: RAY_ADDRESS, or else a cluster of its own on this machine)",
    )
    sweep.add_argument(
        "--array",
        nargs="?",
        const="",
        metavar="K/N",
        help="run the K-th of N shares; without a value, as Slurm numbers the tasks of a job array",
    )
    sweep.add_argument("--budget-gflop", type=float, metavar="X", help="training GFLOP of all runs together")
    sweep.add_argument("--hours", type=float, metavar="H", help="limit for the whole sweep, by the expected pace")
    sweep.add_argument("--gflop-per-second", type=float, metavar="R", help="a run's pace, in place of a measured one")
    sweep.add_argument("--plan", action="store_true", help="show what would run, and stop")
    table = commands.add_parser("table", help="mean and deviation over the seeds of every model, in Markdown")
    table.add_argument("--points", type=Path, required=True, metavar="FILE", help="the parquet of a sweep")
    table.add_argument("--split", choices=("test", "valid"), default="test", help="which scores; valid to choose by")
    towers = commands.add_parser("towers", help="what models with towers lose to the flat one of their family")
    towers.add_argument("--points", type=Path, required=True, metavar="FILE", help="the parquet of a sweep")
    towers.add_argument("--split", choices=("test", "valid"), default="test", help="which scores; valid to choose by")
    towers.add_argument("--plot", type=Path, metavar="FILE", help="a figure as well, .png or .svg")
    fit = commands.add_parser("fit", help="the law of a family, and the families beside it")
    fit.add_argument("--json", action="store_true", help="one JSON object on standard output")
    plot = commands.add_parser("plot", help="scaling_law.png, scaling_law.svg and report.html")
    plot.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the files go")
    plot.add_argument("--tensorboard", type=Path, metavar="DIR", help="log the figure there as an image too")
    for command in (fit, plot):
        command.add_argument("--points", type=Path, default=LADDER, metavar="FILE", help="CSV or parquet, a row a run")
        command.add_argument("--against", choices=COLUMN, default="gflop", help="what a size costs")
        command.add_argument("--quality", choices=QUALITIES, help="which column; by default the first one found")
        command.add_argument("--family", help="the family to compare with; default: the one of most sizes")
    arguments = parser.parse_args()
    if arguments.command == "sweep":
        run_study(arguments)
        return
    if arguments.command == "table":
        print(*markdown(arguments.points, arguments.split), sep="\n")
        return
    if arguments.command == "towers":
        print_costs(arguments.points, arguments.split, arguments.plot)
        return
    result = study(read_points(arguments.points, arguments.against, arguments.quality), arguments.family)
    if arguments.command == "fit":
        print_fit(result, arguments.json)
    else:
        write_plot(result, arguments.output, arguments.tensorboard)


def run_study(arguments: argparse.Namespace) -> None:
    # they import torch, which only counting needs
    from megarec.commands.search import check_options, run_rounds, tell_search
    from megarec.launching.hosts import read_hostfile
    from megarec.scaling.array import tasks_of
    from megarec.scaling.grid import read_grid
    from megarec.scaling.results import Rows
    from megarec.scaling.search import is_search, read_search
    from megarec.scaling.sweep import local_slots, only_sweep_in, slots_of, slots_on, take_over

    for name in ("jobs", "budget_gflop", "hours", "gflop_per_second"):
        if (value := getattr(arguments, name)) is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} {value}: expected more than 0")
    if arguments.jobs > MOST_JOBS:
        raise UserError(f"--jobs {arguments.jobs}: expected at most {MOST_JOBS:,} runs at a time on one machine")
    search = read_search(arguments.study) if is_search(arguments.study) else None
    trials = read_grid(arguments.study) if search is None else search.trials()[0]
    output = arguments.output or Path("runs") / arguments.study.stem
    if search is not None:
        check_options(search, arguments)
    if arguments.array is not None:
        run_share(arguments, trials, output)
        return
    if arguments.address is not None and arguments.engine is None:
        raise UserError("--address is of a Ray cluster; give --engine ray as well")
    cluster = RayCluster(arguments.address) if arguments.engine else None
    slots = slots_of(read_hostfile(arguments.hostfile)) if arguments.hostfile else local_slots(arguments.jobs)
    with only_sweep_in(output):
        previous = take_over(output, arguments.study, trials, keep="--plan" if arguments.plan else None)
        if previous is not None:
            print(f"{output}: the sweep of another study there is in {previous} now", flush=True)
        rows = Rows(output, trials)
        if (tasks := tasks_of(output)) is not None and not arguments.plan:
            if search is not None:
                tell_search(search, rows)
            collect(arguments, trials, rows, tasks)
            return
        with ExitStack() as stack:
            if cluster is not None:
                stack.enter_context(cluster.sharing(output, lambda text: say(f"LOST {text}")))
                slots = slots_on(cluster, trials)
            if search is not None and search.file.sampler == "optuna":
                failed: list[str] | None = run_rounds(search, rows, slots, say)
            else:
                failed = run_planned(arguments, trials, rows, slots)
        if search is not None and failed is not None:
            tell_search(search, rows)
    if failed is not None:
        tell_end(rows, failed)


def run_planned(
    arguments: argparse.Namespace, trials: "list[Trial]", rows: "Rows", slots: "list[Slot]"
) -> list[str] | None:
    """Run what fits the budget; returns the names of failed runs, None if only the plan was asked for."""
    from megarec.scaling.budget import Budget, planned
    from megarec.scaling.sweep import run_sweep

    budget = Budget(arguments.budget_gflop, arguments.hours, arguments.gflop_per_second)
    plan = planned(trials, rows, slots, budget)
    print(*in_words(plan), sep="\n", flush=True)
    if arguments.plan:
        return None
    kept = {line.model for line in plan.kept}
    return run_sweep([trial for trial in trials if trial.model in kept], rows, slots, say)


def run_share(arguments: argparse.Namespace, trials: "list[Trial]", output: Path) -> None:
    """What one task of an array runs."""
    from megarec.scaling.array import only_task_in, share_of, waiting_for_rates
    from megarec.scaling.results import Rows
    from megarec.scaling.sweep import local_slots, run_sweep, take_over

    for name in ("budget_gflop", "hours", "gflop_per_second", "hostfile", "engine", "plan"):
        if getattr(arguments, name):
            raise UserError(f"--{name.replace('_', '-')} is for a whole sweep, --array for a part; keep one of them")
    share = share_of(arguments.array, os.environ)
    with only_task_in(output, share):
        take_over(output, arguments.study, trials, keep="--array")
        rows, names = Rows(output, trials, shared=True), share.names(trials)
        todo = len(names - {*rows.of})
        print(f"task {share}: a share of {len(names)} of {len(trials)} trials, {todo} without a row", flush=True)
        failed = run_sweep(trials, rows, local_slots(arguments.jobs), say, names)
        if later := waiting_for_rates(trials, rows, names):
            print(
                f"task {share}: the other seeds of {', '.join(later)} wait for learning rates that other tasks try: "
                "once all tasks have ended, the same array again",
                flush=True,
            )
    tell_end(rows, failed)


def collect(arguments: argparse.Namespace, trials: "list[Trial]", rows: "Rows", tasks: int) -> None:
    """The rows of an array's tasks; nothing is run."""
    from megarec.scaling.array import command, missing

    rows.write_table()
    left = missing(trials, rows, tasks)
    for share, count in left.items():
        line = command(sys.argv[0], arguments.study, rows.output, share)
        print(f"MISSING task {share}: {count} runs to go: {line}", flush=True)
    tell_end(rows, [])
    if left:
        raise UserError(
            f"{rows.output}: {len(left)} of the array's {tasks} tasks have runs to go, as named above; --array 1/1 "
            "runs all that is left here"
        )


def tell_end(rows: "Rows", failed: list[str]) -> None:
    print(f"{rows.output / 'runs.parquet'}: {len(rows.of)} runs", flush=True)
    if failed:
        print(
            f"error: {len(failed)} runs failed: {', '.join(failed)}; the same command tries them again", file=sys.stderr
        )
        sys.exit(1)


def print_costs(points: Path, split: Split, plot: Path | None) -> None:
    found = costs(points, split)
    if plot is not None:
        plot_costs(found, plot)
    print(*cost_table(found), sep="\n")


def say(text: str) -> None:
    print(text, flush=True)


def print_fit(result: Study, in_json: bool) -> None:
    if in_json:
        print(json.dumps(as_json(result), allow_nan=False))
        return
    from megarec.scaling.report import sentences, title

    print(title(result))
    for heading, lines in sentences(result).items():
        print(f"\n{heading}", *lines, sep="\n  ")


def write_plot(result: Study, output: Path, tensorboard: Path | None) -> None:
    from megarec.scaling.report import (
        log_image,
        write_report,  # matplotlib, which fit does not need
    )

    for path in write_report(result, output):
        print(path)
    if tensorboard:
        log_image(result, tensorboard)


if __name__ == "__main__":
    main()
