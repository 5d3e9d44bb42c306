"""An export as a model of NVIDIA Triton's repository: its python backend runs the scorer.

The export's directory is the model's directory: config.pbtxt, and 1/model.py. Triton names a model by its directory.
"""

from pathlib import Path

CONFIG = """\
backend: "python"
max_batch_size: 4096
input [
  { name: "row", data_type: TYPE_STRING, dims: [ 1 ] }
]
output [
  { name: "probability", data_type: TYPE_FP64, dims: [ LABELS ] },
  { name: "error", data_type: TYPE_STRING, dims: [ 1 ] }
]
dynamic_batching { max_queue_delay_microseconds: 500 }
instance_group [ { kind: KIND_CPU, count: 1 } ]
"""

MODEL = '''\
"""Rows as JSON objects -> probabilities, by the scorer of this export."""

import json
import sys
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb

EXPORT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(EXPORT))
from scorer import Scorer  # noqa: E402


class TritonPythonModel:
    def initialize(self, args):
        self.scorer = Scorer(EXPORT)

    def execute(self, requests):
        texts = [pb.get_input_tensor_by_name(request, "row").as_numpy().reshape(-1) for request in requests]
        scores = self.scorer.score([_row(text) for some in texts for text in some])
        errors = np.array([scores.errors.get(i, "") for i in range(len(scores.probabilities))], dtype=object)
        answers, start = [], 0
        for some in texts:
            end = start + len(some)
            tensors = [
                pb.Tensor("probability", scores.probabilities[start:end].reshape(end - start, -1)),
                pb.Tensor("error", errors[start:end].reshape(-1, 1)),
            ]
            answers.append(pb.InferenceResponse(output_tensors=tensors))
            start = end
        return answers


def _row(text):
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
'''


def write_triton(directory: Path, labels: int) -> None:
    """Write config.pbtxt and 1/model.py into an export of a model that predicts that many labels."""
    (directory / "config.pbtxt").write_text(CONFIG.replace("LABELS", str(labels)))
    (directory / "1").mkdir()
    (directory / "1" / "model.py").write_text(MODEL)
