"""megarec: Wukong-class recommendation models on DeepSpeed. One model, any topology, the same numbers.

config = megarec.load_config("ds_configs/movielens-100k.json", ["train.epochs=1"])
metrics = megarec.train(config)                  # on every rank of a job, or on one alone
model = megarec.load_model("exported")           # written by `megarec checkpoint export`
logits = model.predict(batch)

Names are imported at first use: torch takes seconds.
"""

import sys

# `python -m megarec...`: Python looks for every module in the working directory first, and would run a json.py that
# somebody has put there. What it imported before this line is not covered (docs/multihost.md).
if sys.argv[:1] == ["-m"] and not sys.flags.safe_path:
    _module = sys.orig_argv[-len(sys.argv)].removeprefix("-m")
    if _module.partition(".")[0] == "megarec" and sys.path[0] != __path__[0].rpartition("/")[0]:
        del sys.path[0]  # but the directory of this very package, in a checkout

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megarec.config.load import load_config
    from megarec.config.sections import RunConfig
    from megarec.data.batch import Batch, Ids
    from megarec.data.schema import Schema, load_schema
    from megarec.errors import RunEnded, UserError
    from megarec.serving.predictor import Predictor, load_model

__version__ = "0.1.0"
__all__ = [
    "Batch", "Ids", "Predictor", "RunConfig", "RunEnded", "Schema", "UserError", "load_config", "load_model",
    "load_schema", "train",
]  # fmt: skip

_HOMES = {
    "Batch": "megarec.data.batch",
    "Ids": "megarec.data.batch",
    "Predictor": "megarec.serving.predictor",
    "RunConfig": "megarec.config.sections",
    "RunEnded": "megarec.errors",
    "Schema": "megarec.data.schema",
    "UserError": "megarec.errors",
    "load_config": "megarec.config.load",
    "load_model": "megarec.serving.predictor",
    "load_schema": "megarec.data.schema",
}


def train(config: "RunConfig", resume: bool = False) -> dict[str, Any]:
    """Train one run; every rank of a job calls it.

    Args:
        resume: continue from the latest checkpoint under train.output_dir, or start from scratch if there is none.

    Returns:
        What metrics.json holds.

    Raises:
        UserError: what the user can fix.
        RunEnded: stopped by the fault policy, or asked to end by a signal, with everything saved.
    """
    import time

    from megarec.training.trainer import train as run

    return run(config, resume, time.time())


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
