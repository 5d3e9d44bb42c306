"""A scoring bundle as a predictor of prepared batches: what `megarec evaluate` takes in place of a run."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from megarec.config.sections import RunConfig
from megarec.data.batch import Batch, Ids
from megarec.data.schema import Schema
from megarec.errors import UserError
from megarec.files import read_object, write_json

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
        about = read_object(path, "the run of an export")
        try:
            self.config = RunConfig.model_validate(about["config"])
            self.schema = Schema.model_validate(about["schema"])
            self._scorer = Scorer(directory, torch.get_num_threads())
        except (KeyError, ValidationError) as error:
            raise UserError(f"{path}: is not what was exported ({error}); export the run again") from error
        except ScoringError as error:
            raise UserError(error) from error

    def predict(self, batch: Batch) -> Tensor:
        """Logits float32 [B]."""
        from megarec.serving.scorer.rows import Encoded

        ids = {name: _ids(found) for name, found in batch.ids.items()}
        return torch.from_numpy(self._scorer.logits(Encoded(list(range(batch.size)), ids, batch.numeric.numpy())))


def write_run(directory: Path, config: RunConfig, schema: Schema) -> None:
    """Write what `BundlePredictor` reads beside the scorer's files."""
    write_json(directory / RUN_FILE, {"config": config.model_dump(by_alias=True), "schema": schema.model_dump()})


def _ids(found: Ids) -> Any:
    from megarec.serving.scorer.rows import FeatureIds

    lengths: NDArray[np.int64] | None = None if found.lengths is None else found.lengths.numpy().astype(np.int64)
    weights = None if found.weights is None else found.weights.numpy()
    return FeatureIds(found.values.numpy().astype(np.int64), lengths, weights)
