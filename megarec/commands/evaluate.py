"""A trained model on a prepared split: metrics with intervals, by group and by slice, calibration, a comparison."""

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from megarec.data.columns import coded
from megarec.data.schema import SPLITS
from megarec.distributed.process import quiet_libraries
from megarec.errors import ArgumentParser, UserError, exits_cleanly
from megarec.evaluation.opened import Opened, OpenedFile, open_file, open_model
from megarec.evaluation.page import page
from megarec.evaluation.prediction_table import PredictionTable
from megarec.evaluation.report import Report, Scored, as_json, as_lines, is_finite, make_report
from megarec.files import check_output_file, whole_file
from megarec.metrics.grouped import FIRST
from megarec.metrics.slices import Slices, in_tenths, slices_of
from megarec.signals import unwinding

_MANY = 50  # distinct numbers of a column; slices of more are tenths


@exits_cleanly
@unwinding()
def main() -> None:
    arguments = _parser().parse_args()
    # With --json, output of libraries goes to standard error as well.
    with contextlib.redirect_stdout(sys.stderr) if arguments.json else contextlib.nullcontext():
        model_path, report = evaluate(arguments)
    if arguments.json:
        print(json.dumps(as_json(report)))
        return
    rows = arguments.data if arguments.data.is_file() else f"{arguments.data}, {arguments.split}"
    print(f"{model_path} on {rows}: {report.quality.examples:,} examples")
    print("\n".join(as_lines(report)))


def _parser() -> ArgumentParser:
    parser = ArgumentParser(description="Score a trained model on a split of prepared data.")
    add = parser.add_argument
    add("--run", type=Path, required=True, help="a run's directory (its best checkpoint), a checkpoint, or an export")
    add("--data", type=Path, required=True, help="a prepared data set; for an export also a file of labelled raw rows")
    add("--split", choices=SPLITS, default="test", help="default: test")
    add("--cache", type=Path, metavar="DIR", help="directory of the cached rows (default: the run's data.cache)")
    add("--group", metavar="COLUMN", help="groups for GAUC, NDCG and HR (default: the one that the data name, if any)")
    add("--k", type=_count, nargs="+", default=[FIRST], help=f"k of NDCG@k and HR@k (default: {FIRST})")
    add("--slice", nargs="+", default=[], metavar="COLUMN", help="metrics for each value of a column")
    add("--calibrate", action="store_true", help="also LogLoss with calibration fitted on the split valid")
    add("--bootstrap", type=_draws, default=200, metavar="N", help="draws for intervals; 0: none (default: 200)")
    add("--compare", type=Path, metavar="OTHER", help="another run, checkpoint or export, on the same rows")
    add("--json", action="store_true", help="one JSON object on standard output")
    add("--html", type=Path, metavar="PAGE.html", help="write one page with tables, reliability curve and slices")
    add(
        "--predictions",
        type=Path,
        metavar="F.parquet",
        help="write label, logit and prediction of every example, and its group",
    )
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 10_000:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 1 to 10,000")
    return int(text)


def _draws(text: str) -> int:
    if not text.isdecimal() or int(text) > 100_000:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 0 to 100,000")
    return int(text)


def evaluate(arguments: argparse.Namespace) -> tuple[Path, Report]:
    """Score models batch by batch in this process, and write what is asked for.

    Args:
        arguments: of the command.

    Returns:
        What was scored, and its metrics.

    Raises:
        UserError: there is no model, the data do not fit it or have no such column, or a file cannot be written.
    """
    quiet_libraries()
    data, split, cache, predictions = arguments.data, arguments.split, arguments.cache, arguments.predictions
    for option, kind, path in (("predictions", "parquet", predictions), ("html", "HTML", arguments.html)):
        if path is not None:
            check_output_file(path, option, kind)
    if arguments.compare is not None and not arguments.bootstrap:
        raise UserError("--compare with --bootstrap 0: a comparison needs draws; leave --bootstrap out")
    if data.is_file() and arguments.calibrate:
        remedy = "leave it out, or prepare the file (prepare_data.py table --like)"
        raise UserError(f"--calibrate with --data {data}: a file has no split valid to fit on; {remedy}")

    def opened_by(run: Path, option: str) -> Opened | OpenedFile:
        if data.is_file():
            return open_file(run, data, [*filter(None, [arguments.group]), *arguments.slice], option)
        return open_model(run, data, split, cache, option)

    opened = opened_by(arguments.run, "--run")
    column = arguments.group or opened.group
    groups = None if column is None else opened.column(column)
    sliced = {name: opened.column(name) for name in arguments.slice}  # fail on a wrong name before long work
    rival = None if arguments.compare is None else opened_by(arguments.compare, "--compare")
    with _file(predictions, "predictions") as file:
        table = None if file is None else PredictionTable(file, groups, opened.labels)
        logits, labels = opened.score(table)
        if table is not None:
            table.close()
    codes = None if groups is None else coded(groups).codes
    scored = by_label(opened.labels, logits, labels, codes, column)
    validation = scored
    if arguments.calibrate and split != "valid":
        validation = by_label(opened.labels, *open_model(arguments.run, data, "valid", cache).score(None))
    other: dict[str, Scored] = {}
    if rival is not None:
        other = by_label(rival.labels, *rival.score(None), codes, column)
        for name in opened.labels:
            if name not in other:
                raise UserError(f"--compare {arguments.compare}: does not predict {name!r}; compare a model that does")
            if not np.array_equal(other[name].labels, scored[name].labels):
                raise UserError(f"--compare {arguments.compare}: was scored on other rows (data.bad_rows differs?)")
    reports = {
        name: make_report(
            own,
            ks=tuple(dict.fromkeys(arguments.k)),
            draws=arguments.bootstrap,
            seed=opened.model.config.train.seed,
            slices=[_slices(column, values, own) for column, values in sliced.items()] if is_finite(own) else (),
            validation=("valid", validation[name]) if arguments.calibrate else None,
            other=None if rival is None else (str(rival.path), other[name]),
        )
        for name, own in scored.items()
    }
    report = reports[opened.model.config.train.best_label or opened.labels[0]]
    if len(reports) > 1:
        report = dataclasses.replace(report, labels=reports)
    with _file(arguments.html, "html") as file:
        if file is not None:
            file.write(page(report, str(opened.path), opened.title).encode())
    return opened.path, report


def by_label(
    names: Sequence[str],
    logits: NDArray[np.float32],
    labels: NDArray[np.float32],
    groups: NDArray[np.int32] | None = None,
    column: str | None = None,
) -> dict[str, Scored]:
    """The scores of the rows that have a label, for each label; arguments as of `Opened.score` and of `Scored`."""
    found = {}
    for name, x, y in zip(names, logits.reshape(len(logits), -1).T, labels.reshape(len(labels), -1).T, strict=True):
        there = np.isfinite(y)
        own = None if groups is None else groups[there]
        found[name] = Scored(x[there], y[there], own, column, None if there.all() else there)
    return found


def _slices(name: str, values: pa.ChunkedArray, scored: Scored) -> Slices:
    """By value; of a column of many different numbers with fractions by tenths."""
    if scored.there is not None:
        values = values.filter(pa.array(scored.there))
    found = coded(values)
    if pa.types.is_floating(values.type) and len(found.values) > _MANY:
        codes, names = in_tenths(values.to_numpy().astype(np.float64))
        return slices_of(name, scored.logits, scored.labels, codes, names)
    return slices_of(name, scored.logits, scored.labels, found.codes, found.values.to_pylist())


@contextlib.contextmanager
def _file(path: Path | None, option: str) -> Iterator[BinaryIO | None]:
    """A file that appears at `path`, whole, if the block ends without an error; else nothing changes there.

    Raises:
        UserError: the file cannot be written.
    """
    if path is None:
        yield None
        return
    try:
        with whole_file(path) as file:
            yield file
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"--{option} {path}: cannot be written ({why}); free space, or choose another path") from error


if __name__ == "__main__":
    main()
