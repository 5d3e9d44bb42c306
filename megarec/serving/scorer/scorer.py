"""The model of an export: raw rows in, probabilities out."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from .bundle import MANIFEST, Bundle, RowError, ScoringError
from .rows import Encoded, FeatureIds, Row, RowEncoder
from .tables import Floats, Table, open_tables

ROWS_AT_ONCE = 8192


@dataclass
class Scores:
    """The scores of rows.

    Attributes:
        probabilities: float64 [rows], or of several labels [rows, labels], calibrated if the export was; NaN where a
            row has an error.
        logits: float32 of the same shape, the model's own output; NaN likewise.
        errors: by place of a row, why it has no score.
    """

    probabilities: NDArray[np.float64]
    logits: Floats
    errors: dict[int, str]


class Scorer:
    """Scores raw rows; one may be used by several threads.

    Args:
        directory: what `megarec checkpoint export RUN DIR --format onnx` wrote.
        threads: of one call, in the dense model.
        check: whether the golden sample is scored first.

    Attributes:
        labels: where the model predicts several, in the order of the scores; else empty.

    Raises:
        ScoringError: a file is missing or not what was exported, or the golden sample scores differently here.
    """

    def __init__(self, directory: str | Path, threads: int = 1, check: bool = True) -> None:
        self.bundle = Bundle(Path(directory))
        try:
            self._encoder = RowEncoder(self.bundle)
            self._tables = open_tables(self.bundle)
            self.labels: list[str] = self.bundle.manifest.get("labels", [])  # an earlier version's export has one
            self._temperature = np.array(self.bundle.manifest["temperature"], np.float64)
            path = self.bundle.path(self.bundle.manifest["dense"], whole=True)
        except (KeyError, TypeError, AttributeError) as error:  # a manifest of version 1 has no seal
            what = f"{self.bundle.directory / MANIFEST}: is not the manifest of an export ({error!r})"
            raise ScoringError(f"{what}; export again") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        try:
            self._dense = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own types are not public
            raise ScoringError(f"{path}: onnxruntime cannot read it ({str(error).splitlines()[0]})") from error
        self._inputs = [entry.name for entry in self._dense.get_inputs()]
        if check:
            self._check_golden()

    def score(self, rows: Sequence[Row | RowError]) -> Scores:
        """Score raw rows, each an object with the columns of the files that the model was trained on.

        A row that cannot be scored gets an error of its own; the others are scored.
        """
        logits = np.full((len(rows), len(self.labels)) if self.labels else len(rows), np.nan, np.float32)
        errors: dict[int, str] = {}
        for start in range(0, len(rows), ROWS_AT_ONCE):
            encoded = self.encode(rows[start : start + ROWS_AT_ONCE])
            if encoded.kept:
                logits[np.array(encoded.kept) + start] = self.logits(encoded)
            errors |= {start + place: why for place, why in encoded.errors.items()}
        return Scores(self._probabilities(logits), logits, errors)

    def encode(self, rows: Sequence[Row | RowError]) -> Encoded:
        """Raw rows as ids and numbers; those that cannot be scored are left out, with their errors."""
        return self._encoder.encode(rows)

    def inputs(self, encoded: Encoded) -> dict[str, Floats]:
        """What the dense model reads, by name: float32 [rows, columns] each."""
        embedded = embeddings(self.bundle.manifest, self._tables, encoded)
        inputs = {"embedded": embedded, "numeric": encoded.numeric}
        return {name: inputs[name] for name in self._inputs}

    def logits(self, encoded: Encoded) -> Floats:
        """Float32 [rows], or of several labels [rows, labels], of rows that are encoded already."""
        (found,) = self._dense.run(None, self.inputs(encoded))
        return found

    def _probabilities(self, logits: Floats) -> NDArray[np.float64]:
        with np.errstate(over="ignore"):
            return 1 / (1 + np.exp(-logits.astype(np.float64) / self._temperature))

    def _check_golden(self) -> None:
        path = self.bundle.path(self.bundle.manifest["golden"])
        golden = json.loads(path.read_bytes())
        expected = np.array(golden["logits"], np.float32)
        found = self.score(golden["rows"])
        if found.errors:
            place, why = next(iter(found.errors.items()))
            raise ScoringError(f"{path}: row {place} of the golden sample cannot be scored: {why}")
        difference = np.abs(found.logits - expected) / np.maximum(np.abs(expected), 1)
        if not (difference <= golden["tolerance"]).all():
            at = np.unravel_index(int(np.nanargmax(difference)), difference.shape)
            raise ScoringError(
                f"{path}: row {at[0]} of the golden sample has the logit {found.logits[at]:.7g} here, "
                f"{expected[at]:.7g} where it was exported; copy the export again, or export again"
            )


def embeddings(manifest: dict[str, Any], tables: dict[str, Table], encoded: Encoded) -> Floats:
    """What the dense model reads: float32 [rows, width], every pooled feature and every sequence in its columns."""
    made = np.empty((len(encoded.kept), manifest["width"]), np.float32)
    by_name = {about["name"]: about for about in manifest["features"]}
    for name, about in by_name.items():
        if about["start"] is None:  # read position by position alone
            continue
        ids = encoded.ids[name]
        rows = tables[about["table"]].rows(ids.values)
        columns = slice(about["start"], about["start"] + about["columns"])
        made[:, columns] = rows if ids.lengths is None else _pooled(rows, ids, about["pooling"])
    for sequence in manifest.get("sequences", ()):  # earlier versions have none
        own = [by_name[name] for name in sequence["features"]]
        padded, there = _padded(own, sequence["positions"], tables, encoded)
        made[:, sequence["start"] : sequence["start"] + padded.shape[1]] = padded
        if sequence["mask"] is not None:
            made[:, sequence["mask"] : sequence["mask"] + sequence["positions"]] = there
    return made


def _padded(
    features: Sequence[dict[str, Any]], positions: int, tables: dict[str, Table], encoded: Encoded
) -> tuple[Floats, Floats]:
    """The newest rows of lists that share positions: [rows, positions x features x columns], the newest first, zeros
    where there is none; and where there is one, [rows, positions]."""
    count = len(encoded.kept)
    made = np.zeros((count, positions, len(features), features[0]["columns"]), np.float32)
    there = np.zeros((count, positions), np.float32)
    for number, about in enumerate(features):
        ids = encoded.ids[about["name"]]
        lengths = np.ones(count, np.int64) if ids.lengths is None else ids.lengths
        row = np.repeat(np.arange(count), lengths)
        place = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        newer = place if about["newest"] == "first" else lengths[row] - 1 - place
        kept = newer < positions
        at = row[kept], newer[kept]
        made[at[0], at[1], number] = tables[about["table"]].rows(ids.values[kept])
        there[at] = 1
    return made.reshape(count, -1), there


def _pooled(rows: Floats, ids: FeatureIds, pooling: str) -> Floats:
    """Sums or means of the rows of every list, [lists, columns]."""
    assert ids.lengths is not None
    if ids.weights is not None:
        rows = rows * ids.weights[:, None]
    made = np.zeros((len(ids.lengths), rows.shape[1]), np.float32)
    there = ids.lengths > 0
    if there.any():
        starts = np.concatenate([[0], np.cumsum(ids.lengths[there])[:-1]])
        made[there] = np.add.reduceat(rows, starts, axis=0)
    if pooling == "mean":
        made /= np.maximum(ids.lengths, 1).astype(np.float32)[:, None]
    return made
