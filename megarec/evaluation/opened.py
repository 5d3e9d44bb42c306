"""What is evaluated: a trained model, on a prepared split or on raw rows."""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from megarec.checkpoint.offline import MODEL_FILE, locate
from megarec.checkpoint.pointers import BEST, LATEST
from megarec.data.columns import read_column
from megarec.data.loader import EvalLoader
from megarec.data.schema import SCHEMA_FILE, Schema, Split, identity_difference, load_schema
from megarec.data.store import open_split
from megarec.distributed.process import rank_device
from megarec.errors import UserError, did_you_mean
from megarec.evaluation.prediction_table import PredictionTable
from megarec.evaluation.raw_rows import RawRows, score_raw_rows
from megarec.serving.bundle_predictor import BundlePredictor
from megarec.serving.predictor import BatchModel, load_checkpoint, load_model
from megarec.serving.scorer.bundle import MANIFEST

MOST_EXAMPLES = 4096  # of a batch: a run's own batch is sized for all of its ranks


@dataclass(frozen=True)
class Opened:
    """A model and the rows to score.

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

    def score(self, table: PredictionTable | None) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Logits and labels float32 of all rows, [N] or of several labels [N, T]; into the table as well, in order."""
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
    """An export and its scores of the raw rows of a file.

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

    def score(self, table: PredictionTable | None) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Logits and labels float32 of all rows, [N] or of several labels [N, T]; into the table as well, in order."""
        if table is not None:
            table.add(torch.from_numpy(self.rows.logits), torch.from_numpy(self.rows.labels))
        return self.rows.logits, self.rows.labels


def open_file(run: Path, file: Path, columns: list[str], option: str) -> OpenedFile:
    """An export, and the scores of the raw rows of a file.

    Args:
        columns: those that are asked for.
        option: that the export was given by, for messages.

    Raises:
        UserError: it is not an export, or a row cannot be scored.
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
    store.arrange([], [sequence.features for sequence in model.config.model.sequences])
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


def find_model(run: Path, option: str = "--run") -> Path:
    """The export or checkpoint that a path means: an export, or what `offline.locate` finds.

    Args:
        option: that the path was given by, for messages.

    Raises:
        UserError: there is none.
    """
    if (run / MODEL_FILE).is_file() or (run / MANIFEST).is_file():
        return run
    if not run.is_dir() and run.name not in (LATEST, BEST):
        raise UserError(f"{option} {run}: is not a directory; train first, or correct the path")
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
    of_data = {key: getattr(found, key) for key in keys} | {"weighted": False}  # metrics weight all examples equally
    for name in trained.tasks:
        if found.labelled and name not in (found.labels or (found.label,)):
            what = f"the model predicts {list(trained.tasks)}, and the label {name!r} is missing"
            raise UserError(f"{path}: {what} ({did_you_mean(name, found.labels)}); {remedy}")
    label = trained.label if trained.tasks or trained.label in found.labels else found.label
    return trained.model_copy(update=of_data | {"label": label})
