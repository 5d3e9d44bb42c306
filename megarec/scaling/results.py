"""The results of a sweep's trials: one JSON each, written when it has ended, and one parquet of them all.

A row's file appears by a rename and is never touched again; the parquet is rebuilt from all of them. So a sweep may
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
DONE, DIVERGED, FAILED = "done", "diverged", "failed"  # how a trial ended; the last two: a search's, without metrics
_METRICS = ("auc", "logloss", "ne", "calibration")


class Rows:
    """The rows of a sweep, by trial name.

    Args:
        output: the sweep's directory.
        shared: whether others add rows at the same time.
    """

    def __init__(self, output: Path, trials: list[Trial], *, shared: bool = False) -> None:
        self.output, self._shared = output, shared
        (output / "rows").mkdir(parents=True, exist_ok=True)
        self.of: dict[str, Row] = {}
        self.take(trials)

    def take(self, trials: list[Trial]) -> None:
        """Set the sweep's trials; their existing rows are read."""
        self.trials = trials
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
            {
                "status": DONE,  # of rows that an earlier version wrote
                **self.of[trial.name],
                "chosen": trial.rate == chosen[trial.model] and not trial.searching,
            }
            for trial in self.trials
            if trial.name in self.of
        ]
        sink = pa.BufferOutputStream()
        parquet.write_table(pa.Table.from_pylist(rows), sink)
        write_whole(self.output / TABLE, sink.getvalue().to_pybytes())

    def chosen_rate(self, model: str) -> int | None:
        """The learning rate, or draw, that is best on validation with the first seed, of those that have ended.

        None also if a search must not choose: most of its trials failed, or none finished.

        Raises:
            UserError: their validation has no quality.
        """
        tuning = [trial for trial in self.trials if trial.model == model and trial.tuning]
        tried = [trial for trial in tuning if trial.name in self.of]
        if not tried or 2 * sum(self.status(trial) == FAILED for trial in tried) > len(tuning):
            return None
        losses = [validation_loss(trial, self.of[trial.name]) for trial in tried]
        if min(losses) == math.inf:
            if tried[0].searching:
                return None
            raise UserError(
                f"{model}: no validation {tried[0].config.train.best_by} to choose a learning rate by, in "
                f"{self._path(tried[0])}; the validation split needs rows of both labels"
            )
        return tried[losses.index(min(losses))].rate

    def status(self, trial: Trial) -> str | None:
        """How a trial ended; None: it has not."""
        return self.of[trial.name].get("status", DONE) if trial.name in self.of else None

    def _path(self, trial: Trial) -> Path:
        return self.output / "rows" / f"{trial.name}.json"


def row_of(trial: Trial, metrics: dict[str, Any], seconds: float | None, host: str | None) -> Row:
    """A trial's row from its metrics.json.

    Args:
        seconds: that its last start took, from process to exit; None: no sweep saw it end.
    """
    optimum = trial.schema.optimum.get("test")
    test = metrics["test"] if trial.config.train.test else dict.fromkeys(_METRICS)
    logloss = test["logloss"]
    return {
        **_which(trial),
        "status": DONE,
        "steps": metrics["train"]["steps"],
        "examples": metrics["train"]["steps"] * trial.config.data.batch_size,
        **{key: test[key] for key in _METRICS},
        **{f"valid_{key}": metrics["valid"][key] for key in _METRICS},
        "optimum_logloss": optimum and optimum.drawn,
        "excess_logloss": optimum and logloss and logloss - optimum.drawn,
        "examples_per_second": metrics["train"]["examples_per_second"],
        "first_step_seconds": metrics["train"]["first_step_seconds"],
        "seconds": seconds,
        "host": host,
    }


def lost_row(trial: Trial, status: str, steps: int | None, seconds: float | None, host: str | None) -> Row:
    """The row of a search's trial without metrics: it still used its part of the budget.

    Args:
        status: DIVERGED or FAILED.
        steps: that it made; None: unknown.
    """
    optimum = trial.schema.optimum.get("test")
    return {
        **_which(trial),
        "status": status,
        "steps": steps,
        "examples": None if steps is None else steps * trial.config.data.batch_size,
        **dict.fromkeys([*_METRICS, *(f"valid_{key}" for key in _METRICS)]),
        "optimum_logloss": optimum and optimum.drawn,
        **dict.fromkeys(("excess_logloss", "examples_per_second", "first_step_seconds")),
        "seconds": seconds,
        "host": host,
    }


def _which(trial: Trial) -> Row:
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
    }


def _read_row(path: Path) -> Row:
    row = read_object(path, "the row of a trial", nan=True)
    for key in ("valid_auc", "valid_logloss"):
        if not isinstance(value := row.get(key, ""), int | float | None):
            raise UserError(
                f"{path}: {key} is {value!r}, expected a number or null, as a sweep writes it; remove the file, and "
                "the trial's metrics are read again"
            )
    return row


def validation_loss(trial: Trial, row: Row) -> float:
    """The validation metric of `train.best_by`, with less being better; infinite: the row has none."""
    best_by, (auc, logloss) = trial.config.train.best_by, (row["valid_auc"], row["valid_logloss"])
    both = None if auc is None or logloss is None else auc - logloss
    quality = {"auc": auc, "logloss": logloss, "auc_minus_logloss": both}[best_by]
    if quality is None or not math.isfinite(quality):  # of a split without rows or with one label, or of no numbers
        return math.inf
    return float(quality if trial.config.train.best_by == "logloss" else -quality)
