"""Settings that changed when a run continues a checkpoint: which are refused, and which are logged.

A setting that decides a shape is refused with the tensor (compatibility.py). What is left: the model as a function
must be the same, since the weights were trained for it; where and how a run computes changes no numbers and is not
logged; everything else may change, with a line.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megarec.checkpoint.compatibility import differences, short
from megarec.checkpoint.format import Index
from megarec.config.sections import RunConfig
from megarec.errors import UserError, one_line
from megarec.run.build import Run

SPOKEN_OF = (
    "model.dropout",
    "data.path",
    "data.stream_rows",
    "data.batch_size",
    "data.bad_rows",
    "data.weighted",
    "embedding.optimizer",
    "embedding.learning_rate",
    "embedding.eps",
    "embedding.l2",
    "embedding.update_rows",
    "embedding.rounding",
    "embedding.tables",
    "embedding.gradient_clipping",
    "embedding.dropout",
    "dense.learning_rate",
    "dense.betas",
    "dense.eps",
    "dense.weight_decay",
    "parallel.messages",
    "tower_module",
    "schedule",
    "train.epochs",
    "train.max_steps",
    "train.seed",
    "train.label_smoothing",
    "train.ema",
    "train.best_label",
    "train.label_weights",
    "deepspeed.optimizer",
    "deepspeed.gradient_clipping",
    "deepspeed.bf16",
    "deepspeed.fp16",
)


def check_model(directory: Path, index: Index, config: RunConfig) -> None:
    """Raise a UserError that names the first key by which the model is another function of the same weights."""
    for key, there, here in _changes(index, config):
        if key.startswith("model.") and key != "model.dropout":
            raise UserError(
                f"{directory}: {key} is {short(there)} there, {short(here)} in this run, and its weights were trained "
                f"for {short(there)}; resume with its model, or start from scratch in another train.output_dir"
            )


def changed_settings(run: Run, index: Index) -> Iterator[str]:
    """A line for every other setting that changes the numbers from here on."""
    for key, there, here in _changes(index, run.config):
        if any(key == known or key.startswith(known + ".") for known in SPOKEN_OF):
            yield one_line(
                f"CHANGED BY --resume: {key} is {short(here)} now, {short(there)} until step {index.step}"
                f"{_consequence(key, there, run, index)}"
            )


def _consequence(key: str, there: Any, run: Run, index: Index) -> str:
    if key in ("train.seed", "data.stream_rows"):
        return "; examples come in another order from here, so this epoch has some of them twice and others never"
    if key == "data.batch_size" and isinstance(there, int) and there > 0:
        examples = len(run.train.store)
        epochs = index.step / max(1, examples // there), index.step / run.train.steps_per_epoch
        return f"; the place in the data counts steps: it was epoch {epochs[0]:.2f}, and is {epochs[1]:.2f}"
    return ""


def _changes(index: Index, config: RunConfig) -> Iterator[tuple[str, Any, Any]]:
    """(key, value there, value here); a key that an earlier version did not have has its default there."""
    here, there = config.model_dump(mode="json"), index.config
    try:
        there = RunConfig.model_validate(there).model_dump(mode="json")
    except ValidationError:  # of another version, with keys or values that this one refuses: the common ones
        there = {section: _known(there.get(section), values) for section, values in here.items()}
    for config_of in (there, here):
        config_of["embedding"] = _of_updates(config_of["embedding"])
    for section, values in here.items():
        for key, before, now in differences(there[section], values, section):
            if not _alike(before, now):
                yield key, before, now


def _known(there: Any, here: dict[str, Any]) -> dict[str, Any]:
    return {key: there.get(key, value) if isinstance(there, dict) else value for key, value in here.items()}


def _of_updates(embedding: dict[str, Any]) -> dict[str, Any]:
    """Without the tables' placement and initial values."""
    tables = embedding["tables"] if isinstance(embedding["tables"], dict) else {}
    started = ("placement", "initial_std")
    own = {name: {key: v for key, v in table.items() if key not in started and v} for name, table in tables.items()}
    return embedding | {"tables": {name: table for name, table in own.items() if table}}


def _alike(a: Any, b: Any) -> bool:
    """A size for all layers, or a list with one for each."""
    return any(isinstance(many, list) and many and all(part == one for part in many) for many, one in ((a, b), (b, a)))
