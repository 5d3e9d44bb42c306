"""A trained model on a prepared split: metrics with intervals, by group and by slice, calibration, a comparison."""

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

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
from megarec.evaluation.raw_rows import RawRows, score_raw_rows
from megarec.evaluation.report import Report, Scored, as_json, as_lines, is_finite, make_report
from megarec.files import whole_file
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
    rows = arguments.data if arguments.data.is_file() else f"{arguments.data}, {arguments.split}"
    print(f"{model_path} on {rows}: {report.quality.examples:,} examples")
    print("\n".join(as_lines(report)))


def _parser() -> ArgumentParser:
    parser = ArgumentParser(description="Score a trained model on a split of prepared data.")
    add = parser.add_argument
    add("--run", type=Path, required=True, help="a run's directory (its best checkpoint), a checkpoint, or an export")
    add("--data", type=Path, required=True, help="a prepared data set; for an export also a file of labelled raw rows")
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
    if data.is_file() and arguments.calibrate:
        remedy = "leave it out, or prepare the file (prepare_data.py table --like)"
        raise UserError(f"--calibrate with --data {data}: a file has no split valid to fit on; {remedy}")

    def opened_by(run: Path, option: str) -> "Opened | OpenedFile":
        if data.is_file():
            return open_file(run, data, [*filter(None, [arguments.group]), *arguments.slice], option)
        return open_model(run, data, split, cache, option)

    opened = opened_by(arguments.run, "--run")
    column = arguments.group or opened.group
    groups = None if column is None else opened.column(column)
    sliced = {name: opened.column(name) for name in arguments.slice}  # a wrong name ends it before long work
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

    @property
    def labels(self) -> tuple[str, ...]:
        """That the model predicts."""
        return self.rows.schema.predicted

    @property
    def title(self) -> str:
        """Of the rows, for people."""
        return f"{self.rows.schema.name}, {self.split}"

    @property
    def group(self) -> str | None:
        """The column that the data name as group."""
        return self.rows.schema.group

    def column(self, name: str) -> pa.ChunkedArray:
        """Values of a column, row by row."""
        return read_column(self.data, self.split, name, self.rows.schema, bool(self.rows.store.skipped))

    def score(self, table: "PredictionTable | None") -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Logits and labels float32 of all rows, [N] or of several labels [N, T]; they go into the table, in order."""
        logits, labels = [], []
        for batch in self.rows.batches():
            batch = batch.to(self.device)
            found = self.model.predict(batch)[: batch.valid].float().cpu()
            logits.append(found)
            labels.append(batch.labels[: batch.valid].cpu())
            if table is not None:
                table.add(found, labels[-1])
        return torch.cat(logits).numpy(), torch.cat(labels).numpy()


@dataclass(frozen=True)
class OpenedFile:
    """An export and what it says of the raw rows of a file.

    Attributes:
        path: of the export.
        title: of the rows, for people.
    """

    path: Path
    model: BatchModel
    rows: RawRows
    title: str

    @property
    def labels(self) -> tuple[str, ...]:
        """That the model predicts."""
        return self.model.schema.predicted

    @property
    def group(self) -> str | None:
        """The column that the data name as group, if the file has it."""
        name = self.model.schema.group
        return name if name in self.rows.columns else None

    def column(self, name: str) -> pa.ChunkedArray:
        """Values of a column, row by row."""
        return self.rows.columns[name]

    def score(self, table: "PredictionTable | None") -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Logits and labels float32 of all rows, [N] or of several labels [N, T]; they go into the table, in order."""
        if table is not None:
            table.add(torch.from_numpy(self.rows.logits), torch.from_numpy(self.rows.labels))
        return self.rows.logits, self.rows.labels


def open_file(run: Path, file: Path, columns: list[str], option: str) -> OpenedFile:
    """An export, and the scores of the raw rows of a file.

    Args:
        columns: those that are asked for.
        option: that the export was given by, for messages.

    Raises:
        UserError: it is no export, or a row cannot be scored.
    """
    path = find_model(run, option)
    if not (path / MANIFEST).is_file():
        raise UserError(
            f"{option} {run}: only an export scores raw rows: checkpoint.py export {run} DIR --format onnx; or prepare "
            f"{file} (prepare_data.py table --like) and give that data set as --data"
        )
    model = BundlePredictor(path)
    rows = score_raw_rows(model, file, columns, model.schema.group)
    if rows.skipped:
        print(f"data.bad_rows=skip: left out of {file}: {rows.skipped}", file=sys.stderr)
    return OpenedFile(path, model, rows, file.name)


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


def by_label(
    names: Sequence[str],
    logits: NDArray[np.float32],
    labels: NDArray[np.float32],
    groups: NDArray[np.int32] | None = None,
    column: str | None = None,
) -> dict[str, Scored]:
    """What was made of the rows that have a label, for each label; arguments as of `Opened.score` and of `Scored`."""
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
    keys = ("name", "labels", "labelled", "optional", "weight", "group", "time", "rows")
    of_data = {key: getattr(found, key) for key in keys} | {"weighted": False}  # metrics count all examples alike
    for name in trained.tasks:
        if found.labelled and name not in (found.labels or (found.label,)):
            what = f"the model predicts {list(trained.tasks)}, and the label {name!r} is missing"
            raise UserError(f"{path}: {what} ({did_you_mean(name, found.labels)}); {remedy}")
    label = trained.label if trained.tasks or trained.label in found.labels else found.label
    return trained.model_copy(update=of_data | {"label": label})


def check_output_file(path: Path, option: str, kind: str) -> None:
    """Before long work.

    Raises:
        UserError: it is a directory, a device or the like, or lies in no directory.
    """
    if path.is_dir():
        raise UserError(f"--{option} {path}: is a directory; expected the name of a file ({kind}), new or to replace")
    if path.exists() and not path.is_file():
        raise UserError(f"--{option} {path}: is no regular file; expected the name of a file ({kind})")
    if not path.parent.is_dir():
        raise UserError(f"--{option} {path}: {path.parent} is no directory; make it, or choose another path")


class PredictionTable:
    """A parquet file with one row an example, in row groups: only one group is in memory.

    Args:
        groups: what group each row of the split belongs to; None: rows have no groups.
        labels: that are predicted; the columns of several are "<label>:label" and so on.
    """

    def __init__(self, file: BinaryIO, groups: pa.ChunkedArray | None = None, labels: Sequence[str] = ()) -> None:
        self._groups = groups
        named = [field.with_name(f"{label}:{field.name}") for label in labels for field in COLUMNS if len(labels) > 1]
        self._columns = pa.schema(named) if named else COLUMNS
        if groups is not None:
            self._columns = self._columns.append(pa.field("group", groups.type))
        self._writer = pq.ParquetWriter(file, self._columns, compression="zstd")
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._rows = self._written = 0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Append B examples: logits float32 [B] or [B, T], labels likewise, 0 or 1, NaN: missing."""
        self._waiting.append((logits.float().cpu(), labels.cpu()))
        self._rows += len(logits)
        if self._rows >= ROWS_PER_GROUP:
            self._write_group()

    def _write_group(self) -> None:
        logits, labels = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        # In float64 a sigmoid tells apart what it would tie in float32.
        columns: list[Any] = []
        for x, y in zip(logits.view(len(logits), -1).T, labels.view(len(labels), -1).T, strict=True):
            there = y.isfinite()
            columns.append(pa.array(y.where(there, 0).to(torch.int8).numpy(), mask=(~there).numpy()))
            columns += [x.numpy(), x.double().sigmoid().numpy()]
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
