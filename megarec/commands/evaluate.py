"""A trained model on a prepared split: metrics with intervals, by group and by slice, calibration, a comparison."""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from megarec.checkpoint.offline import MODEL_FILE, locate
from megarec.checkpoint.pointers import BEST, LATEST
from megarec.data.columns import coded, read_column
from megarec.data.loader import EvalLoader
from megarec.data.schema import SCHEMA_FILE, SPLITS, Schema, Split, identity_difference, load_schema
from megarec.data.store import open_split
from megarec.data.writing import ROWS_PER_GROUP
from megarec.distributed.process import quiet_libraries, rank_device
from megarec.errors import ArgumentParser, UserError, did_you_mean, exits_cleanly
from megarec.evaluation.page import page
from megarec.evaluation.report import Report, Scored, as_json, as_lines, is_finite, make_report
from megarec.files import check_output_file, whole_file
from megarec.metrics.slices import Slices, in_tenths, slices_of
from megarec.serving.bundle_predictor import BundlePredictor
from megarec.serving.predictor import BatchModel, load_checkpoint, load_model
from megarec.serving.scorer.bundle import MANIFEST
from megarec.signals import unwinding

MOST_EXAMPLES = 4096  # of a batch: a run's own batch is sized for all of its ranks
COLUMNS = pa.schema([("label", pa.int8()), ("logit", pa.float32()), ("prediction", pa.float64())])
_MANY = 50  # distinct numbers of a column; slices of more are tenths


@exits_cleanly
@unwinding()
def main() -> None:
    arguments = _parser().parse_args()
    # With --json, whatever a library prints goes to standard error as well.
    with contextlib.redirect_stdout(sys.stderr) if arguments.json else contextlib.nullcontext():
        model_path, report = evaluate(arguments)
    if arguments.json:
        print(json.dumps(as_json(report)))
        return
    print(f"{model_path} on {arguments.data}, {arguments.split}: {report.quality.examples:,} examples")
    print("\n".join(as_lines(report)))


def _parser() -> ArgumentParser:
    parser = ArgumentParser(description="Score a trained model on a split of prepared data.")
    add = parser.add_argument
    add("--run", type=Path, required=True, help="a run's directory (its best checkpoint), a checkpoint, or an export")
    add("--data", type=Path, required=True, metavar="DIR", help="a prepared data set")
    add("--split", choices=SPLITS, default="test", help="default: test")
    add("--cache", type=Path, metavar="DIR", help="for the cached rows (default: the run's data.cache)")
    add("--group", metavar="COLUMN", help="for GAUC, NDCG and HR (default: the one that the data name, if any)")
    add("--k", type=_count, nargs="+", default=[10], help="of NDCG@k and HR@k (default: 10)")
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
    opened = open_model(arguments.run, data, split, cache)
    column = arguments.group or opened.rows.schema.group
    groups = None if column is None else opened.column(column)
    sliced = {name: opened.column(name) for name in arguments.slice}  # a wrong name ends it before long work
    rival = None if arguments.compare is None else open_model(arguments.compare, data, split, cache, "--compare")
    with _file(predictions, "predictions") as file:
        table = None if file is None else PredictionTable(file, groups)
        logits, labels = score(opened, table)
        if table is not None:
            table.close()
    codes = None if groups is None else coded(groups).codes
    scored = Scored(logits, labels, codes, column)
    validation = None
    if arguments.calibrate:
        own = scored if split == "valid" else Scored(*score(open_model(arguments.run, data, "valid", cache), None))
        validation = ("valid", own)
    other = None
    if rival is not None:
        logits, labels = score(rival, None)
        if not np.array_equal(labels, scored.labels):
            raise UserError(f"--compare {arguments.compare}: was scored on other rows (data.bad_rows differs?)")
        other = (str(rival.path), Scored(logits, labels, codes, column))
    report = make_report(
        scored,
        ks=tuple(dict.fromkeys(arguments.k)),
        draws=arguments.bootstrap,
        seed=opened.model.config.train.seed,
        slices=[_slices(name, values, scored) for name, values in sliced.items()] if is_finite(scored) else (),
        validation=validation,
        other=other,
    )
    with _file(arguments.html, "html") as file:
        if file is not None:
            file.write(page(report, str(opened.path), f"{opened.rows.schema.name}, {split}").encode())
    return opened.path, report


@dataclass(frozen=True)
class Opened:
    """A model and the rows that it is asked about.

    Attributes:
        path: of the model.
    """

    path: Path
    model: BatchModel
    rows: EvalLoader
    device: torch.device
    data: Path
    split: Split

    def column(self, name: str) -> pa.ChunkedArray:
        """Values of a column, row by row."""
        return read_column(self.data, self.split, name, self.rows.schema, bool(self.rows.store.skipped))


def open_model(run: Path, data: Path | None, split: Split, cache: Path | None, option: str = "--run") -> Opened:
    """A trained model, and a split that fits it.

    Args:
        run: a run's directory, a checkpoint or pointer of it, or an export; named by `option`.
        data: what tools/prepare_data.py wrote; None: what the run was trained on.
        cache: where the cached rows go; None: where the run's data.cache says.

    Raises:
        UserError: there is no model, or the data do not fit it.
    """
    device = rank_device()
    path = find_model(run, option)
    model: BatchModel
    if (path / MANIFEST).is_file():
        device, model = torch.device("cpu"), BundlePredictor(path)
    else:
        model = load_model(path, device) if (path / MODEL_FILE).is_file() else load_checkpoint(path, device)
    data = data or Path(model.config.data.path)
    schema = fitting_schema(model.schema, load_schema(data), data / SCHEMA_FILE)
    store = open_split(data, split, schema, model.config.data.bad_rows, cache or model.config.data.cache)
    if store.skipped:
        print(f"data.bad_rows=skip: left out of {split}: {store.skipped}", file=sys.stderr)
    rows = EvalLoader(
        store,
        schema,
        batch_size=min(MOST_EXAMPLES, model.config.data.batch_size),
        rank=0,
        world_size=1,
        seed=model.config.train.seed,
        prefetch=model.config.data.prefetch,
        pin_memory=device.type != "cpu",
    )
    return Opened(path, model, rows, device, data, split)


def score(opened: Opened, table: "PredictionTable | None") -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Logits and labels float32 [N] of all rows; they go into the table as well, in order."""
    logits, labels = [], []
    for batch in opened.rows.batches():
        batch = batch.to(opened.device)
        found = opened.model.predict(batch)[: batch.valid].float().cpu()
        logits.append(found)
        labels.append(batch.labels[: batch.valid].cpu())
        if table is not None:
            table.add(found, labels[-1])
    return torch.cat(logits).numpy(), torch.cat(labels).numpy()


def _slices(name: str, values: pa.ChunkedArray, scored: Scored) -> Slices:
    """By value; of a column of many different numbers with fractions by tenths."""
    found = coded(values)
    if pa.types.is_floating(values.type) and len(found.values) > _MANY:
        codes, names = in_tenths(values.to_numpy().astype(np.float64))
        return slices_of(name, scored.logits, scored.labels, codes, names)
    return slices_of(name, scored.logits, scored.labels, found.codes, found.values.to_pylist())


def find_model(run: Path, option: str = "--run") -> Path:
    """The export or checkpoint that a path means: an export, or as every tool understands it (`offline.locate`).

    Args:
        option: that the path was given by, for messages.

    Raises:
        UserError: there is none.
    """
    if (run / MODEL_FILE).is_file() or (run / MANIFEST).is_file():
        return run
    if not run.is_dir() and run.name not in (LATEST, BEST):
        raise UserError(f"{option} {run}: is no directory; train first, or correct the path")
    try:
        return locate(run)
    except UserError as error:
        what = f"an export with {MODEL_FILE} or {MANIFEST}"
        raise UserError(f"{option} {error}, or {what}; train first, or correct the path") from None


def fitting_schema(trained: Schema, found: Schema, path: Path) -> Schema:
    """The model's features, with the label and the numbers of rows of these data.

    Args:
        trained: the features that the model was trained on.
        found: schema.json of the data.
        path: of that file, for messages.

    Raises:
        UserError: names the first feature that is missing, of another kind, or has more rows than its table.
    """
    there = {feature.name: feature for feature in found.categorical}
    names = [*there, *found.numeric]
    remedy = "prepare the data as those that the run was trained on"
    for feature in trained.categorical:
        name, other = feature.name, there.get(feature.name)
        if other is None:
            what = "is numeric" if name in found.numeric else f"is missing ({did_you_mean(name, names)})"
            raise UserError(f"{path}: {name} {what}, the model has it as a categorical feature; {remedy}")
        for key in ("multi_valued", "weighted"):
            if getattr(other, key) != getattr(feature, key):
                here = f"{name}.{key}={str(getattr(other, key)).lower()}"
                wanted = str(getattr(feature, key)).lower()
                raise UserError(f"{path}: {here}, the model was trained with {wanted}; {remedy}")
        if other.rows > feature.rows:
            raise UserError(
                f"{path}: {name}.rows={other.rows}, the model's table has {feature.rows} rows, so expected at most "
                f"that many; {remedy}, or train on these"
            )
    for name in trained.numeric:
        if name not in found.numeric:
            what = "is categorical" if name in there else f"is missing ({did_you_mean(name, names)})"
            raise UserError(f"{path}: {name} {what}, the model has it as a numeric feature; {remedy}")
    if difference := identity_difference(trained.identity, found.identity):
        raise UserError(f"{path}: the model was trained on other data: {difference}")
    of_data = {key: getattr(found, key) for key in ("name", "labels", "labelled", "weight", "group", "time", "rows")}
    label = trained.label if trained.label in found.labels else found.label
    return trained.model_copy(update=of_data | {"label": label})


class PredictionTable:
    """A parquet file with one row an example, in row groups: only one group is in memory.

    Args:
        groups: what group each row of the split belongs to; None: rows have no groups.
    """

    def __init__(self, file: BinaryIO, groups: pa.ChunkedArray | None = None) -> None:
        self._groups = groups
        self._columns = COLUMNS if groups is None else COLUMNS.append(pa.field("group", groups.type))
        self._writer = pq.ParquetWriter(file, self._columns, compression="zstd")
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._rows = self._written = 0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Append B examples: logits float32 [B], labels [B] in {0, 1}."""
        self._waiting.append((logits.float().cpu(), labels.cpu()))
        self._rows += len(logits)
        if self._rows >= ROWS_PER_GROUP:
            self._write_group()

    def _write_group(self) -> None:
        logits, labels = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        # In float64 a sigmoid tells apart what it would tie in float32.
        columns = [c.numpy() for c in (labels.to(torch.int8), logits, logits.double().sigmoid())]
        groups = [] if self._groups is None else [self._groups.slice(self._written, self._rows)]
        self._writer.write_table(pa.table([*columns, *groups], self._columns))
        self._waiting.clear()
        self._written, self._rows = self._written + self._rows, 0

    def close(self) -> None:
        """Write the last rows and the footer."""
        if self._rows:
            self._write_group()
        self._writer.close()


@contextlib.contextmanager
def _file(path: Path | None, option: str) -> Iterator[BinaryIO | None]:
    """A file that is at `path`, whole, once the block has ended without an error; else nothing has changed there.

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
