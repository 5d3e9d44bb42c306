"""The DeepSpeed engine around a dense model: what it is built from, and where version 0.19.8 needs help."""

import importlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import deepspeed
import deepspeed.ops
import deepspeed.runtime.zero.utils as zero_utils
import torch
import torch.distributed as dist
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID, DeepSpeedZeroOptimizer
from torch import nn

from megarec.config.deepspeed import micro_batch_size, set_defaults
from megarec.config.sections import DenseConfig, RunConfig
from megarec.dense.groups import ModelParallelUnit
from megarec.dense.settings import refusals_of_deepspeed, settings_of
from megarec.dense.tensor_parallel import is_sharded
from megarec.distributed.topology import Topology
from megarec.models.wukong import LayerNormFactory, torch_layer_norm

_log = logging.getLogger(__name__)


def loss_scale_can_shrink(engine: Any) -> bool:
    """Whether DeepSpeed has a remedy for gradients that overflow: fp16 with a dynamic loss scale above its least."""
    if not engine.fp16_enabled():
        return False
    if hasattr(engine.optimizer, "loss_scale_config"):  # ZeRO 0
        config = engine.optimizer.loss_scale_config
        return bool(config.dynamic_loss_scale and config.cur_scale > config.min_loss_scale)
    scaler = engine.optimizer.loss_scaler
    return bool(scaler.dynamic and scaler.cur_scale > scaler.min_scale)


def loss_scale(engine: Any) -> float | None:
    """What fp16 scales the loss by; None in other precisions."""
    return float(engine.optimizer.loss_scale) if engine.fp16_enabled() else None


def backward(engine: Any, loss: torch.Tensor) -> None:
    """The backward pass of a micro-batch: every gradient is that of `loss_scale(engine)` x the loss, at every stage.

    The optimizer divides by that scale at every stage; but at ZeRO 0 DeepSpeed 0.19.8 does not scale the loss.
    """
    scale = loss_scale(engine)
    engine.backward(loss if scale is None or isinstance(engine.optimizer, ZeROOptimizer) else loss * scale)


def skip_step(engine: Any, *, overflow: bool) -> None:
    """In place of `engine.step()` after the last backward pass: as DeepSpeed 0.19.8 itself does after an overflow.

    Counters advance as after a step; weights, optimizer states and their step counts stay.

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


def build_engine(
    model: nn.Module, config: RunConfig, topology: Topology, mpu: ModelParallelUnit | None
) -> tuple[Any, str]:
    """Wrap the dense model in a DeepSpeed engine; after `check_precision` and `set_deepspeed_groups`.

    Args:
        mpu: the tensor and data groups; None when there is no tensor parallelism.

    Returns:
        The engine, and a sentence that says which optimizer was taken and why.

    Raises:
        UserError: the batch does not divide, or DeepSpeed refuses its section; the message carries its reason.
    """
    micro = micro_batch_size(config, topology.world_size)
    section = set_defaults(
        config.deepspeed,
        train_micro_batch_size_per_gpu=micro,
        zero_allow_untested_optimizer=True,  # SGD is untested by DeepSpeed; our parity tests cover it
        zero_force_ds_cpu_optimizer=False,  # DeepSpeedCPUAdam compiles C++ at first use
        steps_per_print=10**9,
        timers={"throughput": {"enabled": False}},  # it waits for the device twice a micro-batch; StepTimer is ours
    )
    for name in ("bf16", "bfloat16"):
        if section.get(name, {}).get("enabled"):
            # The step check has seen every gradient already; DeepSpeed would make the host wait twice more.
            section[name] = {"check_grad_overflow": False, **section[name]}
    # DeepSpeed counts the ranks of a data group; here every rank of a tensor group has examples of its own as well.
    section["train_batch_size"] = config.data.batch_size // topology.tensor_size
    optimizer, reason = None, "DeepSpeed's own (deepspeed.optimizer)"
    if "optimizer" not in section:
        optimizer, reason = _dense_optimizer(model, config)
    elif _compiles_cpu_adam(section):
        _log.info("DeepSpeed's CPU Adam: its C++ is compiled at first use, which takes minutes")
    with refusals_of_deepspeed():
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=section, mpu=mpu)
    if isinstance(engine.optimizer, FP16_UnfusedOptimizer | FP16_Optimizer):
        _forget_warm_up_step(engine.optimizer.optimizer)
    if engine.fp16_enabled() and not isinstance(engine.optimizer, ZeROOptimizer):
        _grow_scale_after_step(engine.optimizer)
    return engine, reason


def _compiles_cpu_adam(section: dict[str, Any]) -> bool:
    """Whether DeepSpeed takes DeepSpeedCPUAdam for its `optimizer`."""
    offload = settings_of(section).zero.offload_optimizer
    given = section["optimizer"]
    adam = given["type"].lower() in ("adam", "adamw") and not given.get("params", {}).get("torch_adam")
    return adam and offload is not None and offload.device != "none"


def _dense_optimizer(model: nn.Module, config: RunConfig) -> tuple[torch.optim.Optimizer, str]:
    dense = config.dense
    # The rate is set before every step; 0 keeps an optimizer step that DeepSpeed may take while it starts harmless.
    if dense.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.0, weight_decay=dense.weight_decay), "torch SGD"
    decoupled = dense.optimizer == "adamw"
    apex_adam, why = fused_adam() if config.train.fused_kernels == "auto" else (None, "train.fused_kernels=torch")
    if apex_adam is not None:
        return apex_adam(
            model.parameters(), lr=0.0, adam_w_mode=decoupled, **_adam_arguments(dense)
        ), f"apex FusedAdam: {why}"
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    return kind(model.parameters(), lr=0.0, fused=True, **_adam_arguments(dense)), f"torch fused {kind.__name__}: {why}"


def _adam_arguments(dense: DenseConfig) -> dict[str, Any]:
    return {"betas": dense.betas, "eps": dense.eps, "weight_decay": dense.weight_decay}


def _forget_warm_up_step(optimizer: torch.optim.Optimizer) -> None:
    """At stage 0 in bf16 and fp16 DeepSpeed 0.19.8 takes an optimizer step with zero gradients to allocate state, so
    that Adam's bias correction starts at t = 2 and the first updates come out 26 % too small. Fused optimizers, apex's
    and DeepSpeed's own, count the steps of a group in the group."""
    optimizer.state.clear()
    for group in optimizer.param_groups:
        if "step" in group:
            group["step"] = 0


def _grow_scale_after_step(optimizer: Any) -> None:
    """At stage 0 in fp16 DeepSpeed 0.19.8 raises the loss scale before it divides the gradients by it: a step whose
    scale grows would come out half as large. Its unfused optimizer leaves the norm scaled, besides."""
    update, unscale = optimizer._update_scale, optimizer.unscale_and_clip_grads
    norm_is_scaled = isinstance(optimizer, FP16_UnfusedOptimizer)

    def unscale_then_update(*arguments: Any, **named: Any) -> Any:
        divisor = unscale(*arguments, **named)
        if norm_is_scaled:
            optimizer._global_grad_norm = optimizer._global_grad_norm / optimizer.loss_scale
        update(False)
        return divisor

    def update_after_skip(skip: bool) -> None:
        if skip:
            update(True)

    optimizer._update_scale, optimizer.unscale_and_clip_grads = update_after_skip, unscale_then_update


def mark_gradients_of_shards(engine: Any) -> None:
    """At stage 0 in bf16 DeepSpeed 0.19.8 looks for the mark of a shard on the gradients instead of the parameters;
    without it the norm omits every shard but the first. Called after every hook that replaces gradients."""
    if not isinstance(engine.optimizer, FP16_UnfusedOptimizer):
        return

    def mark(parameter: nn.Parameter) -> None:
        parameter.grad.tensor_model_parallel = True  # type: ignore[union-attr]

    for parameter in engine.module.parameters():
        if is_sharded(parameter):
            parameter.register_post_accumulate_grad_hook(mark)


@contextmanager
def agreement_by(from_rank_0: Callable[[list[int]], list[int]]) -> Iterator[None]:
    """ZeRO-3 checks that rank 0 has the same integers; inside `with` this function takes the place of the check.

    For a process that plays one rank of a larger job (planning.fake_job).
    """
    with (
        patch.object(zero_utils, "assert_lst_len_same_as_other_ranks", lambda ints: from_rank_0([len(ints)])),
        patch.object(zero_utils, "get_lst_from_rank0", from_rank_0),
    ):
        yield


def prepare_deepspeed() -> None:
    """Let DeepSpeed use the existing process groups; before any other call of it."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Its C++ build takes a minute, and every rank of every run would leave 66 MiB in /dev/shm.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)


def compute_dtype(engine: Any) -> torch.dtype:
    """The type in which the dense model computes."""
    if engine.bfloat16_enabled():
        return torch.bfloat16
    return torch.float16 if engine.fp16_enabled() else torch.float32


def base_learning_rate(engine: Any, config: RunConfig) -> float:
    """The dense side's rate that the schedule scales: dense.learning_rate, or that of deepspeed.optimizer.

    Ask right after `build_engine`: the schedule and a checkpoint write their own rates into the optimizer.
    """
    if "optimizer" in config.deepspeed:
        return float(engine.optimizer.param_groups[0]["lr"])
    return config.dense.learning_rate


def gradient_norm(engine: Any) -> float | None:
    """Norm of the averaged dense gradient before clipping; call between the last backward and step.

    DeepSpeed keeps it from ZeRO 1 on and in low precision, and has it after the step; at stage 0 in fp32 it keeps
    none, but the averaged gradients are there in full before the step.
    """
    if engine.zero_optimization_stage() == 0 and compute_dtype(engine) is torch.float32:
        gradients = [p for p in engine.module.parameters() if p.grad is not None]
        squares = torch.stack([_square(gradients, of_shards) for of_shards in (False, True)])
        if engine.mpu is not None:
            dist.all_reduce(squares[1:], group=engine.mpu.get_model_parallel_group())
        return float(squares.sum().sqrt())
    return None


def _square(parameters: list[nn.Parameter], of_shards: bool) -> torch.Tensor:
    """Sum of the squared gradients of the parameters that tensor parallelism shards, or of the others."""
    norm = torch.nn.utils.get_total_norm(
        [p.grad for p in parameters if p.grad is not None and is_sharded(p) == of_shards]
    )
    return norm.square()


def probe_apex() -> tuple[bool, str]:
    """Whether NVIDIA apex's fused kernels can run here, and why (not).

    PyPI's `apex` is an unrelated web toolkit and counts as absent.
    """
    if not torch.cuda.is_available():
        return False, "apex needs CUDA, there is none"
    try:
        importlib.import_module("amp_C")
        importlib.import_module("apex.optimizers")
    except ImportError as error:
        return False, f"NVIDIA apex is not installed ({error})"
    return True, "NVIDIA apex is installed"


def fused_adam() -> tuple[Callable[..., torch.optim.Optimizer] | None, str]:
    """apex's FusedAdam, or None; and the reason."""
    found, why = probe_apex()
    return (importlib.import_module("apex.optimizers").FusedAdam if found else None), why


def layer_norm_factory(use_apex: bool) -> tuple[LayerNormFactory, str]:
    """apex's FusedLayerNorm or torch's LayerNorm, and a sentence for the log.

    Args:
        use_apex: take apex's where it works. It always has a bias: a LayerNorm without one stays torch's.
    """
    found, why = probe_apex() if use_apex else (False, "train.fused_kernels=torch or model.bias=false")
    if not found:
        return torch_layer_norm, f"torch LayerNorm: {why}"
    fused = importlib.import_module("apex.normalization").FusedLayerNorm
    return lambda width, bias: fused(width) if bias else torch_layer_norm(width, bias), f"apex FusedLayerNorm: {why}"
