"""A run as launch/train.py makes it, on synthetic examples: rates, MFU, milliseconds by part, one save."""

import time
from typing import Any
from unittest.mock import patch

from megarec.config.sections import RunConfig
from megarec.data.schema import schema_of
from megarec.data.sources.synthetic import prepare_like
from megarec.training.profiling import StepTimer
from megarec.training.trainer import train
from tools.gpu.context import ALONE, Context, ladder_row

STEPS = 12


def prepare(context: Context) -> None:
    """The data, prepared early: otherwise the device waits minutes for the CPU."""
    sizes = context.sizes
    config, _ = ladder_row(sizes, sizes.run_row)
    data = context.directory / "data"
    prepare_like(schema_of(config.data), data, examples=sizes.run_examples, seed=1, max_rows=sizes.run_rows)
    overrides = [f"data.path={data}", "data.schema=null", f"data.batch_size={sizes.run_batch}"]
    overrides += ["train.epochs=100", f"train.max_steps={STEPS}", f"train.checkpoint_every={STEPS}"]
    overrides += [f"train.evaluate_every={STEPS}", "train.log_every=4", f"train.output_dir={context.directory / 'run'}"]
    context.kept["config"] = ladder_row(sizes, sizes.run_row, *ALONE, *overrides)[0]


def run(context: Context) -> None:
    config: RunConfig = context.kept["config"]
    reported: list[dict[str, float]] = []
    milliseconds = StepTimer.milliseconds

    def noted(timer: StepTimer) -> dict[str, float]:
        reported.append(milliseconds(timer))
        return reported[-1]

    started = time.time()
    with patch.object(StepTimer, "milliseconds", noted):
        metrics: dict[str, Any] = train(config, resume=False, started=started)
    of_train = metrics["train"]
    context.emit(f"{context.sizes.run_row} examples/s", of_train["examples_per_second"], "1/s")
    context.emit(f"{context.sizes.run_row} MFU", 100 * of_train["mfu"], "%")
    context.emit("first step after", of_train["first_step_seconds"], "s")
    for part, value in (reported[-1] if reported else {}).items():
        context.emit(f"step: {part}", value, "ms")
    context.emit("whole run, with its save and its test", time.time() - started, "s")
