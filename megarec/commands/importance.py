"""What each feature is worth to a trained model: AUC and LogLoss lost when its values change places.

megarec importance runs/movielens-100k
megarec importance runs/movielens-100k --split valid --repeats 10 --json
"""

import argparse
import contextlib
import json
import sys
from pathlib import Path

from megarec.data.schema import SPLITS
from megarec.distributed.process import quiet_libraries
from megarec.errors import ArgumentParser, exits_cleanly
from megarec.evaluation.importance import Importances, Lost, importances
from megarec.evaluation.opened import MOST_EXAMPLES, find_model, open_model
from megarec.evaluation.report import aligned, number


@exits_cleanly
def main() -> None:
    arguments = _parser().parse_args()
    with contextlib.redirect_stdout(sys.stderr) if arguments.json else contextlib.nullcontext():
        quiet_libraries()
        path = find_model(arguments.run, "RUN")
        opened = open_model(arguments.run, arguments.data, arguments.split, None, "RUN")
        found = importances(
            opened.model,
            opened.rows.store,
            opened.device,
            repeats=arguments.repeats,
            most=arguments.examples,
            batch_size=MOST_EXAMPLES,
            seed=opened.model.config.train.seed,
        )
    if arguments.json:
        print(json.dumps(as_json(found, opened.model.config.train.best_label)))
        return
    scored = min(arguments.examples, len(opened.rows.store))
    print(f"{path} on {opened.data}, {arguments.split}: {scored:,} examples, {arguments.repeats} repeats")
    for name, own in found.items():
        if len(found) > 1:
            print(f"\nlabel {name}, {own.examples:,} examples:")
        print(f"AUC {number(own.auc)}  LogLoss {number(own.logloss)}")
        print("\n".join(["", *as_lines(own)]))


def _parser() -> ArgumentParser:
    parser = ArgumentParser(description="Permute one feature after the other, and see what a trained model loses.")
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="a run's directory (its best checkpoint), a checkpoint, or an export")
    add("--data", type=Path, metavar="DIR", help="a prepared data set (default: the run's data.path)")
    add("--split", choices=SPLITS, default="test", help="default: test")
    add("--repeats", type=_positive, default=5, help="permutations; their spread gives the intervals (default: 5)")
    add("--examples", type=_positive, default=100_000, help="at most this many, drawn at random (default: 100,000)")
    add("--json", action="store_true", help="one JSON object on standard output")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) < 1 << 31:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 1")
    return int(text)


def as_json(found: dict[str, Importances], main: str | None = None) -> dict[str, object]:
    """What --json prints: of several labels the main one's numbers, the first one's if there is none, and all."""
    of_main = _label_as_json(found[main or next(iter(found))])
    return (
        of_main if len(found) == 1 else of_main | {"labels": {name: _label_as_json(own) for name, own in found.items()}}
    )


def _label_as_json(found: Importances) -> dict[str, object]:
    features = [
        {"feature": own.feature, "auc_lost": own.auc.described(), "logloss_lost": own.logloss.described()}
        for own in found.features
    ]
    whole = {"examples": found.examples, "repeats": found.repeats, "auc": found.auc, "logloss": found.logloss}
    return {**{name: None if value != value else value for name, value in whole.items()}, "features": features}


def as_lines(found: Importances) -> list[str]:
    """One line a feature."""
    rows = [[own.feature, *_cells(own.logloss), *_cells(own.auc)] for own in found.features]
    return aligned(["feature", "LogLoss lost", "95 % interval", "AUC lost", "95 % interval"], rows)


def _cells(lost: Lost) -> list[str]:
    if lost.mean != lost.mean:
        return ["-", ""]
    low, high = lost.interval.low, lost.interval.high
    return [f"{lost.mean:+.5f}", "" if low != low else f"{low:+.5f} to {high:+.5f}"]


if __name__ == "__main__":
    main()
