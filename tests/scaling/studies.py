"""A tiny study for tests: planted data, and models of a few hundred parameters."""

import json
from pathlib import Path
from typing import Any

from megarec.data.sources.planted import Shape, prepare_planted

WUKONG = {"layers": 1, "num_fm": 2, "num_lcb": 2, "rank": 4, "mlp": [16], "dim": 8, "head": [8]}
MODELS = {"wukong-tiny": {"model": WUKONG}, "lr": {"model": {"name": "lr", "dim": 4}}}


def write_study(directory: Path, **sections: Any) -> Path:
    """A study of the models above over 800 training examples, 8 steps; data and base lie beside it."""
    schema = directory / "data/schema.json"
    if not schema.is_file():
        prepare_planted(Shape(examples=1_000, features=4, rows=4, order=2, groups=1), directory / "data")
    base = {
        "model": {"name": "lr", "dim": 4},
        "data": {"path": str(directory / "data"), "batch_size": 100},
        "train": {"epochs": 1, "log_every": 4, "checkpoint_every": 2, "threads": 1},
    }
    (directory / "base.json").write_text(json.dumps(base))
    study = {"base": "base.json", "models": MODELS, "seeds": [1, 2], **sections}
    (directory / "study.json").write_text(json.dumps(study))
    return directory / "study.json"
