"""The top-level keys of a DeepSpeed config. DeepSpeed 0.19.8 accepts unknown ones silently, so we check them here;
below the top level DeepSpeed's own pydantic models refuse them."""

import difflib
from pathlib import Path
from typing import Any

from megarec.config.sections import RunConfig
from megarec.errors import UserError

KNOWN_KEYS = frozenset(
    """
    activation_checkpointing aio autotuning bf16 bfloat16 checkpoint comet comms_logger communication_data_type
    compile compression_training csv_monitor data_efficiency data_types dataloader_drop_last disable_allgather
    disable_python_gc dump_state eigenvalue flops_profiler fp16 gradient_accumulation_steps
    gradient_allreduce_op gradient_clipping gradient_predivide_factor hybrid_engine load_universal_checkpoint
    log_level memory_breakdown optimizer pipeline prescale_gradients progressive_layer_drop
    seq_parallel_communication_data_type sequence_parallel_size steps_per_print tensor_parallel tensorboard
    timers torch_autocast train_batch_size train_micro_batch_size_per_gpu use_data_before_expert_parallelism
    wall_clock_breakdown wandb weight_quantization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
    zero_optimization
    """.split()  # noqa: SIM905 (one a line would fill a screen)
)

# DeepSpeed 0.19.8 raises on these; say so before any rank starts.
REMOVED_KEYS = frozenset({"amp", "curriculum_learning", "elasticity", "nebula", "sparse_gradients"})

# The loop drives these for both sides at once.
REPLACED_KEYS = {"scheduler": "use the schedule section: it drives the dense and the sparse side together"}


def check_deepspeed_section(section: dict[str, Any], path: Path) -> None:
    """Refuse keys that DeepSpeed would ignore, has removed, or that would drive one side of the model alone."""
    for key in section:
        if key in REMOVED_KEYS:
            raise UserError(f"{path}: deepspeed.{key}: removed from DeepSpeed; delete it")
        if key in REPLACED_KEYS:
            raise UserError(f"{path}: deepspeed.{key}: {REPLACED_KEYS[key]}")
        if key not in KNOWN_KEYS:
            near = difflib.get_close_matches(key, sorted(KNOWN_KEYS), n=1)
            hint = f"did you mean {near[0]!r}?" if near else "DeepSpeed knows no such key and would ignore it"
            raise UserError(f"{path}: unknown key 'deepspeed.{key}'; {hint}")
    stage = zero_stage(section)
    if stage not in (0, 1, 2, 3):
        raise UserError(f"{path}: deepspeed.zero_optimization.stage={stage!r}: expected 0, 1, 2 or 3")


def zero_stage(section: dict[str, Any]) -> Any:
    """The ZeRO stage that a DeepSpeed config asks for; None when its zero_optimization is no object."""
    zero = section.get("zero_optimization", {})
    return zero.get("stage", 0) if isinstance(zero, dict) else None


def set_defaults(section: dict[str, Any], **defaults: Any) -> dict[str, Any]:
    """A copy of the section with keys added where the user gave none (or 'auto')."""
    return {**section, **{key: value for key, value in defaults.items() if section.get(key, "auto") == "auto"}}


def micro_batch_size(config: RunConfig, world_size: int) -> int:
    """Examples of one rank in one micro-batch: data.batch_size / (ranks x accumulation).

    Raises:
        UserError: the division leaves a remainder, or the deepspeed section states other sizes.
    """
    accumulation = config.deepspeed.get("gradient_accumulation_steps", 1)
    if not isinstance(accumulation, int) or accumulation < 1:
        raise UserError(f"deepspeed.gradient_accumulation_steps={accumulation!r}: expected a positive integer")
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


def monitor_sections(section: dict[str, Any], output_dir: Path) -> dict[str, Any]:
    """The deepspeed section of a run that is to be watched: TensorBoard is on unless switched off, files lie in the
    run's own directory where the user named none, and comet gets every point (it counts steps here, not examples)."""
    defaults: dict[str, dict[str, Any]] = {
        "tensorboard": {"enabled": True, "output_path": str(output_dir), "job_name": "tensorboard"},
        "csv_monitor": {"output_path": str(output_dir), "job_name": "csv"},
        "comet": {"samples_log_interval": 1},
    }
    asked = {"tensorboard": {}, **section}
    filled = {key: {**default, **asked[key]} for key, default in defaults.items() if isinstance(asked.get(key), dict)}
    return {**asked, **filled}
