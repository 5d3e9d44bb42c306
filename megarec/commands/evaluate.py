"""A trained model on a prepared split: AUC, LogLoss, NE and calibration; predictions as a file."""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from megarec.checkpoint.offline import MODEL_FILE, locate
from megarec.checkpoint.pointers import BEST, LATEST
from megarec.data.loader import EvalLoader
from megarec.data.schema import SCHEMA_FILE, SPLITS, Schema, Split, identity_difference, load_schema
from megarec.data.store import open_split
from megarec.data.writing import ROWS_PER_GROUP
from megarec.distributed.process import quiet_libraries, rank_device
from megarec.errors import ArgumentParser, UserError, did_you_mean, exits_cleanly
from megarec.files import whole_file
from megarec.run.metrics import Predictions, Quality, described, in_words
from megarec.serving.predictor import Predictor, load_checkpoint, load_model
from megarec.signals import unwinding

MOST_EXAMPLES = 4096  # of a batch: a run's own batch is sized for all of its ranks
COLUMNS = pa.schema([("label", pa.int8()), ("logit", pa.float32()), ("prediction", pa.float64())])


@exits_cleanly
@unwinding()
def main() -> None:
    parser = ArgumentParser(description="Score a trained model on a split of prepared data.")
    parser.add_argument(
        "--run", type=Path, required=True, help="a run's directory (its best checkpoint), a checkpoint, or an export"
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="a prepared data set")
    parser.add_argument("--split", choices=SPLITS, default="test", help="default: test")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="for the cached rows (default: the run's data.cache)")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument(
        "--predictions", type=Path, metavar="F.parquet", help="write label, logit and prediction of every example"
    )
    arguments = parser.parse_args()
    # With --json, whatever a library prints goes to standard error as well.
    with contextlib.redirect_stdout(sys.stderr) if arguments.json else contextlib.nullcontext():
        model_path, found = evaluate(
            arguments.run, arguments.data, arguments.split, arguments.predictions, arguments.cache
        )
    if arguments.json:
        print(json.dumps(described(found)))
        return
    print(f"{model_path} on {arguments.data}, {arguments.split}: {found.examples:,} examples")
    print(in_words(found))


def evaluate(
    run: Path, data: Path, split: Split, predictions: Path | None, cache: Path | None = None
) -> tuple[Path, Quality]:
    """Score the model that `run` means, batch by batch, in this process.

    Args:
        run: a run's directory, a checkpoint or pointer of it, or an export.
        data: what tools/prepare_data.py wrote.
        predictions: where the predictions go; None: nowhere.
        cache: where the cached rows go; None: where the run's data.cache says.

    Returns:
        What was scored, and its metrics.

    Raises:
        UserError: there is no model, the data do not fit it, or the predictions cannot be written.
    """
    quiet_libraries()
    if predictions is not None:
        check_predictions_file(predictions)
    device = rank_device()
    path = find_model(run)
    model = load_model(path, device) if (path / MODEL_FILE).is_file() else load_checkpoint(path, device)
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
    with predictions_file(predictions) if predictions is not None else contextlib.nullcontext() as table:
        return path, score(model, rows, device, table)


def score(model: Predictor, rows: EvalLoader, device: torch.device, table: "PredictionTable | None") -> Quality:
    """Metrics of all rows; their predictions go into the table, in order."""
    seen = Predictions()
    for batch in rows.batches():
        batch = batch.to(device)
        logits = model.predict(batch)
        seen.add(logits, batch.labels, batch.valid)
        if table is not None:
            table.add(logits[: batch.valid], batch.labels[: batch.valid])
    return seen.gather(None)


def find_model(run: Path) -> Path:
    """The export or checkpoint that a path means: an export, or as every tool understands it (`offline.locate`).

    Raises:
        UserError: there is none.
    """
    if (run / MODEL_FILE).is_file():
        return run
    if not run.is_dir() and run.name not in (LATEST, BEST):
        raise UserError(f"--run {run}: is no directory; train first, or correct the path")
    try:
        return locate(run)
    except UserError as error:
        raise UserError(f"--run {error}, or an export with {MODEL_FILE}; train first, or correct the path") from None


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


def check_predictions_file(path: Path) -> None:
    """Before long work.

    Raises:
        UserError: it is a directory, a device or the like, or lies in no directory.
    """
    if path.is_dir():
        raise UserError(f"--predictions {path}: is a directory; expected the name of a parquet file, new or to replace")
    if path.exists() and not path.is_file():
        raise UserError(f"--predictions {path}: is no regular file; expected the name of a parquet file")
    if not path.parent.is_dir():
        raise UserError(f"--predictions {path}: {path.parent} is no directory; make it, or choose another path")


class PredictionTable:
    """A parquet file with one row an example, in row groups: only one group is in memory."""

    def __init__(self, file: BinaryIO) -> None:
        self._writer = pq.ParquetWriter(file, COLUMNS, compression="zstd")
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._rows = 0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Append B examples: logits float32 [B], labels [B] in {0, 1}."""
        self._waiting.append((logits.float().cpu(), labels.cpu()))
        self._rows += len(logits)
        if self._rows >= ROWS_PER_GROUP:
            self._write_group()

    def _write_group(self) -> None:
        logits, labels = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        # In float64 a sigmoid tells apart what it would tie in float32.
        columns = [labels.to(torch.int8), logits, logits.double().sigmoid()]
        self._writer.write_table(pa.table([column.numpy() for column in columns], COLUMNS))
        self._waiting.clear()
        self._rows = 0

    def close(self) -> None:
        """Write the last rows and the footer."""
        if self._rows:
            self._write_group()
        self._writer.close()


@contextlib.contextmanager
def predictions_file(path: Path) -> Iterator[PredictionTable]:
    """A table that is at `path`, whole, once the block has ended without an error; else nothing has changed there.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        with whole_file(path) as file:
            table = PredictionTable(file)
            yield table
            table.close()
    except OSError as error:
        why = error.strerror or error
        raise UserError(
            f"--predictions {path}: cannot be written ({why}); free space, or choose another path"
        ) from error


if __name__ == "__main__":
    main()
