"""A trial in TensorBoard's HParams, beside the scalars that the run itself wrote."""

import json
from pathlib import Path
from typing import Any

from megarec.scaling.grid import Trial

_METRICS = ("logloss", "ne", "auc", "valid_logloss", "examples_per_second")


def log_trial(directory: Path, trial: Trial, row: dict[str, Any]) -> None:
    """Add hyper-parameters and final metrics to the run's event files.

    Args:
        directory: of the run's own events, so that TensorBoard shows both as one.
    """
    from torch.utils.tensorboard import SummaryWriter  # seconds to load
    from torch.utils.tensorboard.summary import hparams

    metrics = {f"sweep/{name}": row[name] for name in _METRICS if row[name] is not None}
    with SummaryWriter(str(directory)) as writer:
        for summary in hparams(hyper_parameters(trial), dict.fromkeys(metrics, 0.0)):
            writer._get_file_writer().add_summary(summary)
        for name, value in metrics.items():
            writer.add_scalar(name, value)


def hyper_parameters(trial: Trial) -> dict[str, Any]:
    """What the study sets, a size a key: numbers and words as they are, lists as their JSON."""
    found: dict[str, Any] = {"family_and_size": trial.model, "gflop_per_example": trial.cost.flop / 1e9}
    for override in trial.overrides:
        key, _, text = override.partition("=")
        found.update(_flat(key, json.loads(text)))
    return found


def _flat(key: str, value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return {name: leaf for part, inner in value.items() for name, leaf in _flat(f"{key}.{part}", inner).items()}
    return {key: value if isinstance(value, bool | int | float | str) else json.dumps(value)}
