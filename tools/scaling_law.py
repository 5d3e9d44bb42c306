"""Is quality a power of compute? The law with its intervals, families compared, and the figure.

python tools/scaling_law.py fit                                   # the published ladder
python tools/scaling_law.py fit --points runs.parquet --against parameters --family wukong --json
python tools/scaling_law.py plot --points runs.csv --output figures --tensorboard runs/tensorboard
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megarec.errors import exits_cleanly
from megarec.scaling.points import COLUMN, QUALITIES, read_points
from megarec.scaling.published import LADDER
from megarec.scaling.study import Study, as_json, study


@exits_cleanly
def main() -> None:
    parser = argparse.ArgumentParser(description="Fit and draw quality as a power of compute.")
    commands = parser.add_subparsers(dest="command", required=True)
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
    result = study(read_points(arguments.points, arguments.against, arguments.quality), arguments.family)
    if arguments.command == "fit":
        print_fit(result, arguments.json)
    else:
        write_plot(result, arguments.output, arguments.tensorboard)


def print_fit(result: Study, in_json: bool) -> None:
    if in_json:
        print(json.dumps(as_json(result), allow_nan=False))
        return
    from megarec.scaling.report import sentences, title

    print(title(result))
    for heading, lines in sentences(result).items():
        print(f"\n{heading}", *lines, sep="\n  ")


def write_plot(result: Study, output: Path, tensorboard: Path | None) -> None:
    from megarec.scaling.output import log_image, write_report  # matplotlib, which fit does without

    for path in write_report(result, output):
        print(path)
    if tensorboard:
        log_image(result, tensorboard)


if __name__ == "__main__":
    main()
