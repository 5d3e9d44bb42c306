"""What a sweep's trials gave: one JSON each, written when it has ended, and one parquet of them all.

A row's file appears by a rename and is never touched again; the parquet is made anew from all of them. So a sweep may
be killed at any moment.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from megarec.errors import UserError
from megarec.files import read_object, write_whole
from megarec.scaling.grid import Trial, of_models

Row = dict[str, Any]
TABLE = "runs.parquet"
_METRICS = ("auc", "logloss", "ne", "calibration")


class Rows:
    """The rows of a sweep, by trial name.

    Args:
        output: the sweep's directory.
        shared: whether others add rows at the same time.
    """

    def __init__(self, output: Path, trials: list[Trial], *, shared: bool = False) -> None:
        self.output, self.trials, self._shared = output, trials, shared
        (output / "rows").mkdir(parents=True, exist_ok=True)
        self.of: dict[str, Row] = {}
        self._read()

    def _read(self) -> None:
        for trial in self.trials:
            if trial.name not in self.of and os.path.lexists(path := self._path(trial)):
                self.of[trial.name] = _read_row(path)

    def add(self, trial: Trial, row: Row) -> None:
        """Keep a trial's row for good, then the parquet with it."""
        write_whole(self._path(trial), (json.dumps(row, indent=2) + "\n").encode())
        self.of[trial.name] = row
        if self._shared:
            self._read()
        self.write_table()

    def write_table(self) -> None:
        """`runs.parquet`: the rows in the order of the grid."""
        chosen = {model: self.chosen_rate(model) for model, _ in of_models(self.trials)}
        rows = [
            {**self.of[trial.name], "chosen": trial.rate == chosen[trial.model]}
            for trial in self.trials
            if trial.name in self.of
        ]
        sink = pa.BufferOutputStream()
        parquet.write_table(pa.Table.from_pylist(rows), sink)
        write_whole(self.output / TABLE, sink.getvalue().to_pybytes())

    def chosen_rate(self, model: str) -> int | None:
        """The learning rate whose trial with the first seed is best on validation, of those that have ended.

        Raises:
            UserError: their validation has no quality.
        """
        tried = [t for t in self.trials if t.model == model and t.tuning and t.name in self.of]
        if not tried:
            return None
        losses = [_validation_loss(trial, self.of[trial.name]) for trial in tried]
        if min(losses) == float("inf"):
            raise UserError(
                f"{model}: no validation {tried[0].config.train.best_by} to choose a learning rate by, in "
                f"{self._path(tried[0])}; the validation split needs rows of both labels"
            )
        return tried[losses.index(min(losses))].rate

    def _path(self, trial: Trial) -> Path:
        return self.output / "rows" / f"{trial.name}.json"


def row_of(trial: Trial, metrics: dict[str, Any], seconds: float | None, host: str | None) -> Row:
    """A trial's row from its metrics.json.

    Args:
        seconds: that its last start took, from process to exit; None: no sweep saw it end.
    """
    optimum = trial.schema.optimum.get("test")
    logloss = metrics["test"]["logloss"]
    return {
        "model": trial.model,
        "seed": trial.seed,
        "rate": trial.rate,
        "overrides": " ".join(trial.overrides),
        "config_hash": trial.config_hash,
        "train_gflop_per_example": trial.cost.flop / 1e9,
        "parameters": trial.cost.parameters,
        "dense_parameters": trial.cost.dense_parameters,
        "sparse_parameters": trial.cost.sparse_parameters,
        "steps": metrics["train"]["steps"],
        "examples": metrics["train"]["steps"] * trial.config.data.batch_size,
        **{key: metrics["test"][key] for key in _METRICS},
        **{f"valid_{key}": metrics["valid"][key] for key in _METRICS},
        "optimum_logloss": optimum and optimum.drawn,
        "excess_logloss": optimum and logloss and logloss - optimum.drawn,
        "examples_per_second": metrics["train"]["examples_per_second"],
        "first_step_seconds": metrics["train"]["first_step_seconds"],
        "seconds": seconds,
        "host": host,
    }


def _read_row(path: Path) -> Row:
    row = read_object(path, "the row of a trial", nan=True)
    for key in ("valid_auc", "valid_logloss"):
        if not isinstance(value := row.get(key, ""), int | float | None):
            raise UserError(
                f"{path}: {key} is {value!r}, expected a number or null, as a sweep writes it; remove the file, and "
                "the trial's metrics are read anew"
            )
    return row


def _validation_loss(trial: Trial, row: Row) -> float:
    best_by, (auc, logloss) = trial.config.train.best_by, (row["valid_auc"], row["valid_logloss"])
    both = None if auc is None or logloss is None else auc - logloss
    quality = {"auc": auc, "logloss": logloss, "auc_minus_logloss": both}[best_by]
    if quality is None or not math.isfinite(quality):  # of a split without rows or with one label, or of no numbers
        return float("inf")
    return float(quality if trial.config.train.best_by == "logloss" else -quality)
