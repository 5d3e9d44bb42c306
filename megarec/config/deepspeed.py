"""The deepspeed section, before DeepSpeed sees it: keys that it or this project would ignore, and strings in place of
values. Version 0.19.8 accepts both silently, or with different meanings in different places. Below the top
level DeepSpeed's own pydantic models refuse unknown keys (dense/settings.py).
"""

import difflib
import importlib.util
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megarec.config.sections import RunConfig
from megarec.errors import UserError

MONITORS = ("tensorboard", "csv_monitor", "wandb", "comet")
PRECISIONS = ("bf16", "bfloat16", "fp16")
OBJECTS = frozenset({"zero_optimization", *PRECISIONS, *MONITORS, "optimizer", "aio", "data_types"})
BATCH_SIZES = ("train_batch_size", "train_micro_batch_size_per_gpu")
"""Here "auto" means what users expect: the value is derived."""
SWITCHES = frozenset(
    {"prescale_gradients", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "disable_python_gc"}
)
NUMBERS = {"gradient_clipping": (0, 1e30), "gradient_predivide_factor": (1e-30, 1e30)}
KNOWN_KEYS = (
    OBJECTS | SWITCHES | NUMBERS.keys() | {*BATCH_SIZES, "communication_data_type", "gradient_accumulation_steps"}
)

REMOVED_KEYS = frozenset({"amp", "curriculum_learning", "elasticity", "nebula", "sparse_gradients"})
"""DeepSpeed 0.19.8 raises on these; say so before any rank starts."""

REPLACED_KEYS = {
    "scheduler": "use the schedule section: it drives the dense and the sparse side together",
    "activation_checkpointing": "it acts on models that call DeepSpeed's checkpoint function; use dense.recompute",
    "autotuning": "the launcher's --autotuning alone reads it; see tools/rehearse.py and tools/scaling_law.py sweep",
    "checkpoint": "DeepSpeed writes no checkpoints here; use train.checkpoint_every and the keys beside it",
    "load_universal_checkpoint": "every checkpoint here loads on any topology; use --resume",
    "comms_logger": "TensorBoard has every message's bytes under workload/, tools/rehearse.py by operation",
    "compile": "use dense.compile",
    "compression_training": "it needs calls that this project does not make; embedding.weights=fp16 halves tables",
    "data_efficiency": "it acts on DeepSpeed's own loader; batches come from the data section",
    "dataloader_drop_last": "it acts on DeepSpeed's own loader; batches come from the data section",
    "disable_allgather": "DeepSpeed reads it and does nothing with it",
    "dump_state": "config.json of a run and --print-config have every setting",
    "eigenvalue": "it acts on compression_training alone",
    "flops_profiler": "use tools/flops.py for counts and train.trace for times",
    "gradient_allreduce_op": "gradients are those of the mean over the global batch, on every topology",
    "hybrid_engine": "it generates text with language models",
    "log_level": "log lines are the trainer's own, on the console and in log.txt",
    "memory_breakdown": "TensorBoard has memory by part under workload/, tools/rehearse.py predicts it",
    "pipeline": "there are no pipeline stages here; use parallel.tensor and zero_optimization",
    "progressive_layer_drop": "it acts on DeepSpeed's own transformer layers",
    "seq_parallel_communication_data_type": "examples are not sequences here; see parallel.messages",
    "sequence_parallel_size": "examples are not sequences here; use parallel.tensor",
    "steps_per_print": "use train.log_every",
    "tensor_parallel": "use parallel.tensor",
    "timers": "TensorBoard has the time of every part of a step under workload/time_ms",
    "torch_autocast": "use bf16 or fp16",
    "use_data_before_expert_parallelism": "there are no experts here",
    "wall_clock_breakdown": "TensorBoard has the time of every part of a step under workload/time_ms",
    "weight_quantization": "it acts on inference engines of language models",
}
"""DeepSpeed has these keys, and in this project they do nothing, or act on one side of the model alone."""

WORDS = frozenset({"true", "false", "yes", "no", "on", "off", "null"})
AUTO = frozenset({*BATCH_SIZES, "data_types.keep_in_fp32_modules"})


def check_deepspeed_section(section: dict[str, Any], path: Path) -> None:
    """Refuse keys that DeepSpeed would ignore, has removed, or that would drive one side of the model alone, and words
    in place of values, which DeepSpeed and this project could understand in two ways.

    Raises:
        UserError: one line that names the key, the value and the remedy.
    """

    def fail(key: str, message: str) -> None:
        raise UserError(f"{path}: deepspeed.{key}{message}")

    for key, value in section.items():
        if key in REMOVED_KEYS:
            fail(key, ": removed from DeepSpeed; delete it")
        if key in REPLACED_KEYS:
            fail(key, f": {REPLACED_KEYS[key]}")
        if key not in KNOWN_KEYS:
            near = difflib.get_close_matches(key, sorted(KNOWN_KEYS), n=1)
            hint = f"did you mean {near[0]!r}?" if near else "DeepSpeed knows no such key and would ignore it"
            raise UserError(f"{path}: unknown key 'deepspeed.{key}'; {hint}")
        _check_words(key, value, fail)
        if key in OBJECTS and not isinstance(value, dict):
            example = {"zero_optimization": '{"stage": 2}', "optimizer": '{"type": "AdamW"}'}.get(
                key, '{"enabled": true}'
            )
            fail(key, f"={value!r}: expected an object, such as {example}")
        if key in SWITCHES and not isinstance(value, bool):
            fail(key, f"={value!r}: expected true or false")
        if key in NUMBERS and not _is_number(value, *NUMBERS[key]):
            fail(key, f"={value!r}: expected a number from {NUMBERS[key][0]:g} to {NUMBERS[key][1]:g}")
    for key in (*PRECISIONS, *MONITORS):
        enabled = section.get(key, {}).get("enabled", False)
        if not isinstance(enabled, bool):
            fail(f"{key}.enabled", f"={enabled!r}: expected true or false")
    stage = section.get("zero_optimization", {}).get("stage", 0)
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        fail("zero_optimization.stage", f"={stage!r}: expected 0, 1, 2 or 3")
    if "bf16" in section and "bfloat16" in section:
        fail("bfloat16", ": the old name of bf16, which is there as well; keep bf16")
    on = [key for key in PRECISIONS if section.get(key, {}).get("enabled")]
    if len(on) > 1:
        fail(f"{on[0]}.enabled", f"=true and deepspeed.{on[1]}.enabled=true: keep one of them")
    _check_others(section, fail)


def _check_others(section: dict[str, Any], fail: Any) -> None:
    if "optimizer" in section:
        given = section["optimizer"]
        if not isinstance(given.get("type"), str):
            fail("optimizer.type", f'={given.get("type")!r}: expected the name of an optimizer, such as "AdamW"')
        if not isinstance(given.get("params", {}), dict):
            fail("optimizer.params", f'={given["params"]!r}: expected an object, such as {{"lr": 0.001}}')
    types = ("fp32", "fp16", "bf16", None)
    if (given := section.get("communication_data_type")) not in types:
        fail("communication_data_type", f"={given!r}: expected one of fp32, fp16, bf16")
    for key in ("tensorboard", "csv_monitor"):
        for name in ("output_path", "job_name"):
            value = section.get(key, {}).get(name, "named")
            if not isinstance(value, str) or not value:
                fail(f"{key}.{name}", f"={value!r}: expected a name; leave it out for one in train.output_dir")
        job = Path(section.get(key, {}).get("job_name", "named"))
        if job.is_absolute() or ".." in job.parts:
            fail(f"{key}.job_name", f"={str(job)!r}: leads out of the directory; expected a name, and put the rest in "
                 f"deepspeed.{key}.output_path")  # fmt: skip


def _check_words(key: str, value: Any, fail: Any) -> None:
    for name, leaf in _leaves(key, value):
        if leaf == "auto" and name not in AUTO:
            fail(name, '="auto": only Hugging Face\'s trainer fills it in; state a value, or leave the key '
                 "out for DeepSpeed's default")  # fmt: skip
        text = key in MONITORS and not name.endswith(".enabled")
        if isinstance(leaf, str) and not text and (leaf.lower() in WORDS or leaf == "None"):
            fail(name, f"={leaf!r}: a string; write {leaf.lower()} without quotes, or leave the key out")
        if type(leaf) in (int, float) and not _is_number(leaf, -1e30, 1e30):
            fail(name, f"={leaf!r}: expected a number of at most 1e30")


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every value below a key that is neither object nor list."""
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(f"{name}.{key}", part)
    else:
        yield name, value


def _is_number(value: Any, least: float, most: float) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and least <= value <= most
    )


def set_defaults(section: dict[str, Any], **defaults: Any) -> dict[str, Any]:
    """A copy of the section with keys added where the user gave none (or 'auto')."""
    return {**section, **{key: value for key, value in defaults.items() if section.get(key, "auto") == "auto"}}


def micro_batch_size(config: RunConfig, world_size: int) -> int:
    """Examples of one rank in one micro-batch: data.batch_size / (ranks x accumulation).

    Raises:
        UserError: the division leaves a remainder, or the deepspeed section states other sizes.
    """
    accumulation = config.deepspeed.get("gradient_accumulation_steps", 1)
    if type(accumulation) is not int or not 1 <= accumulation <= 1_000_000:
        raise UserError(
            f"deepspeed.gradient_accumulation_steps={accumulation!r}: expected an integer from 1 to 1000000"
        )
    total = config.data.batch_size
    micro, rest = divmod(total, world_size * accumulation)
    if rest or micro == 0:
        raise UserError(
            f"data.batch_size={total} does not divide: {world_size} ranks x "
            f"{accumulation} (deepspeed.gradient_accumulation_steps) = {world_size * accumulation}; "
            f"try data.batch_size={max(1, round(total / (world_size * accumulation))) * world_size * accumulation}"
        )
    for key, expected in (("train_batch_size", total), ("train_micro_batch_size_per_gpu", micro)):
        stated = config.deepspeed.get(key, expected)
        if stated not in (expected, "auto"):
            raise UserError(
                f"deepspeed.{key}={stated}, but data.batch_size={total} on {world_size} ranks x {accumulation} "
                f"accumulation steps makes it {expected}; leave deepspeed.{key} out"
            )
    return micro


def without_monitors(section: dict[str, Any]) -> dict[str, Any]:
    """The deepspeed section of a run that writes nothing."""
    return {key: value for key, value in section.items() if key not in MONITORS}


def monitor_sections(section: dict[str, Any], output_dir: Path) -> dict[str, Any]:
    """The deepspeed section of a run with monitors: TensorBoard is on unless switched off, files lie in the
    run's own directory where the user named none, and comet gets every point (it counts steps here, not examples).

    Raises:
        UserError: a service whose package is not installed.
    """
    defaults: dict[str, dict[str, Any]] = {
        "tensorboard": {"enabled": True, "output_path": str(output_dir), "job_name": "tensorboard"},
        "csv_monitor": {"output_path": str(output_dir), "job_name": "csv"},
        "comet": {"samples_log_interval": 1},
    }
    for key, module in {"wandb": "wandb", "comet": "comet_ml"}.items():
        if section.get(key, {}).get("enabled") and module not in sys.modules and not importlib.util.find_spec(module):
            raise UserError(f"deepspeed.{key}.enabled=true: {module} is not installed; pip install {module}, or false")
    asked = {"tensorboard": {}, **section}
    filled = {key: {**default, **asked[key]} for key, default in defaults.items() if isinstance(asked.get(key), dict)}
    return {**asked, **filled}
