"""Forget the dense gradients of a step instead of taking it."""

from typing import Any

from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID, DeepSpeedZeroOptimizer


def loss_scale_can_shrink(engine: Any) -> bool:
    """Whether DeepSpeed has a remedy for gradients that overflow: fp16 with a dynamic loss scale above its least."""
    if not engine.fp16_enabled():
        return False
    if hasattr(engine.optimizer, "loss_scale_config"):  # ZeRO 0
        config = engine.optimizer.loss_scale_config
        return bool(config.dynamic_loss_scale and config.cur_scale > config.min_loss_scale)
    scaler = engine.optimizer.loss_scaler
    return bool(scaler.dynamic and scaler.cur_scale > scaler.min_scale)


def drop_step(engine: Any, *, overflow: bool) -> None:
    """In place of `engine.step()` after the last backward pass: as DeepSpeed 0.19.8 itself does after an overflow.

    Counters move on as after a step; weights, optimizer states and their step counts stay.

    Args:
        overflow: of fp16: its loss scale shrinks.
    """
    optimizer = engine.optimizer
    if overflow:
        optimizer._update_scale(True)
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        optimizer.micro_step_id = INITIAL_MICRO_STEP_ID
        optimizer.zero_grad(set_to_none=True)
        optimizer._release_preflattened_grad_buffers()
        for group in optimizer.averaged_gradients:
            optimizer.averaged_gradients[group] = optimizer.all_grad_tensors[group] = None
        if optimizer.cpu_offload:
            optimizer._offload_accumulated_param_ids = set()
            optimizer.reset_cpu_buffers()
    elif isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        optimizer._pre_step()
        optimizer._partition_all_parameters()
        optimizer._overflow_clean_up(None)
        optimizer.checkpoint_event_epilogue()  # small parameters stay whole between steps
    else:
        optimizer.zero_grad(set_to_none=True)
    engine.set_gradient_accumulation_boundary(False)
    engine.step()  # not at the boundary: it only counts
    engine.set_gradient_accumulation_boundary(None)
    engine.global_steps += 1
    engine.skipped_steps += 1
    engine.global_samples += engine.train_batch_size()
