"""Is quality a power of compute? A sweep over sizes and seeds, the law with its intervals, and the figure."""

import argparse
import json
import sys
from pathlib import Path

from megarec.errors import ArgumentParser, UserError, exits_cleanly
from megarec.scaling.ladder import LADDER
from megarec.scaling.points import COLUMN, QUALITIES, read_points
from megarec.scaling.study import Study, as_json, study
from megarec.scaling.tables import Split, in_words, markdown
from megarec.scaling.towers import cost_table, costs, plot_costs
from megarec.signals import unwinding

MOST_JOBS = 4_096


@exits_cleanly
@unwinding()
def main() -> None:
    parser = ArgumentParser(description="Fit and draw quality as a power of compute.")
    commands = parser.add_subparsers(dest="command", required=True)
    sweep = commands.add_parser("sweep", help="models x learning rates x seeds; goes on where an earlier sweep ended")
    sweep.add_argument(
        "--study", type=Path, required=True, metavar="FILE", help="JSON: base, models, learning rates, seeds"
    )
    sweep.add_argument("--output", type=Path, metavar="DIR", help="default: runs/<the study's name>")
    places = sweep.add_mutually_exclusive_group()
    places.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time on this machine (default: 1)")
    places.add_argument("--hostfile", type=Path, metavar="FILE", help="run on these hosts, as many at a time as slots")
    sweep.add_argument("--budget-gflop", type=float, metavar="X", help="training GFLOP of all runs together")
    sweep.add_argument("--hours", type=float, metavar="H", help="from start to end, by the pace")
    sweep.add_argument("--gflop-per-second", type=float, metavar="R", help="a run's pace, in place of a measured one")
    sweep.add_argument("--plan", action="store_true", help="show what would run, and stop")
    table = commands.add_parser("table", help="mean and deviation over the seeds of every model, in Markdown")
    table.add_argument("--points", type=Path, required=True, metavar="FILE", help="the parquet of a sweep")
    table.add_argument("--split", choices=("test", "valid"), default="test", help="whose quality; valid to choose by")
    towers = commands.add_parser("towers", help="what models with towers lose to the flat one of their family")
    towers.add_argument("--points", type=Path, required=True, metavar="FILE", help="the parquet of a sweep")
    towers.add_argument("--split", choices=("test", "valid"), default="test", help="whose quality; valid to choose by")
    towers.add_argument("--plot", type=Path, metavar="FILE", help="a figure as well, .png or .svg")
    fit = commands.add_parser("fit", help="the law of a family, and the families beside it")
    fit.add_argument("--json", action="store_true", help="one JSON object on standard output")
    plot = commands.add_parser("plot", help="scaling_law.png, scaling_law.svg and report.html")
    plot.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the files go")
    plot.add_argument("--tensorboard", type=Path, metavar="DIR", help="log the figure there as an image too")
    for command in (fit, plot):
        command.add_argument("--points", type=Path, default=LADDER, metavar="FILE", help="CSV or parquet, a row a run")
        command.add_argument("--against", choices=COLUMN, default="gflop", help="what a size costs")
        command.add_argument("--quality", choices=QUALITIES, help="which column; by default the first there is")
        command.add_argument("--family", help="whom the others are compared with; by default that of most sizes")
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
    # torch, which counting needs and the other commands do without
    from megarec.launching.hosts import read_hostfile
    from megarec.scaling.budget import Budget, planned
    from megarec.scaling.grid import read_grid
    from megarec.scaling.results import TABLE, Rows
    from megarec.scaling.sweep import local_slots, only_sweep_in, run_sweep, slots_of, take_over

    for name in ("jobs", "budget_gflop", "hours", "gflop_per_second"):
        if (value := getattr(arguments, name)) is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} {value}: expected more than 0")
    if arguments.jobs > MOST_JOBS:
        raise UserError(f"--jobs {arguments.jobs}: expected at most {MOST_JOBS:,} runs at a time on one machine")
    trials = read_grid(arguments.study)
    slots = slots_of(read_hostfile(arguments.hostfile)) if arguments.hostfile else local_slots(arguments.jobs)
    budget = Budget(arguments.budget_gflop, arguments.hours, arguments.gflop_per_second)
    output = arguments.output or Path("runs") / arguments.study.stem
    with only_sweep_in(output):
        previous = take_over(output, arguments.study, trials, only_plan=arguments.plan)
        if previous is not None:
            print(f"{output}: the sweep of another study that was there is in {previous} now", flush=True)
        rows = Rows(output, trials)
        plan = planned(trials, rows, slots, budget)
        print(*in_words(plan), sep="\n", flush=True)
        if arguments.plan:
            return
        kept = {line.model for line in plan.kept}
        failed = run_sweep([trial for trial in trials if trial.model in kept], rows, slots, say)
    print(f"{output / TABLE}: {len(rows.of)} runs", flush=True)
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
        write_report,  # matplotlib, which fit does without
    )

    for path in write_report(result, output):
        print(path)
    if tensorboard:
        log_image(result, tensorboard)


if __name__ == "__main__":
    main()
