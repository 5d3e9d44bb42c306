"""A scoring bundle as a predictor of prepared batches: what `megarec evaluate` takes in place of a run."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from megarec.config.sections import RunConfig
from megarec.data.batch import Batch, Ids
from megarec.data.loader import EvalLoader
from megarec.data.schema import Schema
from megarec.data.store import open_split
from megarec.errors import UserError
from megarec.files import read_object, write_json
from megarec.metrics.calibrated import fit_temperature

if TYPE_CHECKING:
    from megarec.serving.scorer.bundle import RowError
    from megarec.serving.scorer.rows import Row
    from megarec.serving.scorer.scorer import Scores

RUN_FILE = "run.json"


class BundlePredictor:
    """Scores encoded batches by a bundle's own scorer.

    Attributes:
        config: of the run that was exported.
        schema: the features that a batch must have.

    Raises:
        UserError: the bundle cannot be used, or onnxruntime is not installed.
    """

    def __init__(self, directory: Path) -> None:
        try:
            from megarec.serving.scorer import Scorer, ScoringError
        except ImportError as error:
            what = f"{directory}: scoring an export needs the packages of the extra 'serve' ({error})"
            raise UserError(f"{what}: pip install 'megarec[serve]'") from error
        path = directory / RUN_FILE
        try:
            self._scorer = Scorer(directory, torch.get_num_threads())
            about = read_object(self._scorer.bundle.path(RUN_FILE), "the run of an export")
            self.config = RunConfig.model_validate(about["config"])
            self.schema = Schema.model_validate(about["schema"])
        except (KeyError, ValidationError) as error:
            raise UserError(f"{path}: is not what was exported ({error}); export the run again") from error
        except ScoringError as error:
            raise UserError(error) from error

    def predict(self, batch: Batch) -> Tensor:
        """Logits float32 [B], or of several labels [B, T]."""
        from megarec.serving.scorer.rows import Encoded

        ids = {name: _ids(found) for name, found in batch.ids.items()}
        return torch.from_numpy(self._scorer.logits(Encoded(list(range(batch.size)), ids, batch.numeric.numpy())))

    def raw_rows(self, file: Path) -> "Iterator[list[Row | RowError]]":
        """The rows of a file, as the export's score.py reads them.

        Raises:
            ScoringError: it cannot be read.
        """
        from megarec.serving.scorer.files import rows_of

        return rows_of(file, self._scorer.bundle.manifest["text"])

    def score(self, rows: "Sequence[Row | RowError]") -> "Scores":
        """Logits and errors of raw rows."""
        return self._scorer.score(rows)


def write_run(directory: Path, config: RunConfig, schema: Schema) -> None:
    """Write what `BundlePredictor` reads beside the scorer's files."""
    write_json(directory / RUN_FILE, {"config": config.model_dump(by_alias=True), "schema": schema.model_dump()})


def fitted_temperature(directory: Path, data: Path) -> float | list[float]:
    """The temperature of a bundle for the least LogLoss on the split valid; with several labels one for each.

    Args:
        data: the prepared data set.

    Raises:
        UserError: the split cannot be read.
    """
    model = BundlePredictor(directory)
    store = open_split(data, "valid", model.schema, model.config.data.bad_rows, model.config.data.cache)
    rows = EvalLoader(
        store, model.schema, batch_size=4096, rank=0, world_size=1, seed=1, prefetch=1, pin_memory=False
    )  # fmt: skip
    scored = [(model.predict(batch)[: batch.valid], batch.labels[: batch.valid]) for batch in rows.batches()]
    logits, labels = (torch.cat(parts).numpy() for parts in zip(*scored, strict=True))
    if not model.schema.tasks:
        return fit_temperature(logits, labels).temperature
    there = np.isfinite(labels)
    pairs = ((logits[own, place], labels[own, place]) for place, own in enumerate(there.T))
    return [fit_temperature(x, y).temperature for x, y in pairs]


def _ids(found: Ids) -> Any:
    from megarec.serving.scorer.rows import FeatureIds

    lengths: NDArray[np.int64] | None = None if found.lengths is None else found.lengths.numpy().astype(np.int64)
    weights = None if found.weights is None else found.weights.numpy()
    return FeatureIds(found.values.numpy().astype(np.int64), lengths, weights)
