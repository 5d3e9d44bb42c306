"""Interaction layers recomputed (activation checkpointing), compiled, and with fused kernels on a GPU.

What a layer keeps for its backward pass, and what it computes again:

    none       every activation is kept
    selective  results of matrix products are kept; LayerNorm, ReLU, copies and collectives run again
    full       only the layer's input is kept; the whole layer runs again

The numbers do not change: dropout masks are functions of the examples' keys, not of a random state.

torch.compile fuses LayerNorm, ReLU, dropout, copies and conversions. The products themselves stay with their
libraries. Tensor-parallel MLPs wait for messages, and on a CPU the projection goes through the batch in blocks: both
stay as they are, and the rest is compiled. On an accelerator the projection is in the graph, so that its
copies fuse with their neighbours and a layer without tensor parallelism is one graph.
"""

import functools
import importlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from megarec.config.sections import DenseConfig
from megarec.dense.settings import settings_of
from megarec.dense.tensor_parallel import TensorParallelMLP
from megarec.errors import UserError
from megarec.kernels.launch import triton_problem
from megarec.models.cpu_gemm import fast_cpu_gemm
from megarec.models.projection import Projection
from megarec.models.wukong import InteractionLayer

Recompute = Literal["none", "selective", "full"]
_PRODUCTS = frozenset(
    {
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten.bmm.default,
        torch.ops.aten.baddbmm.default,
    }
)


def fuse_layers(model: nn.Module, use_fused: bool, section: dict[str, Any], device: torch.device) -> str:
    """Let interaction layers with a static Y use Triton's kernels (models/fused_fm.py) where they can run, in place.

    Args:
        use_fused: take them where they are there.
        section: the DeepSpeed config.
        device: where the model will run.

    Returns:
        A sentence for the log: what was taken and why.
    """
    layers = [module for module in model.modules() if isinstance(module, InteractionLayer) and module.static]
    why_not = "train.fused_kernels=torch"
    if use_fused:
        why_not = _why_not_fused(layers, settings_of(section).dtype, device)
    if why_not:
        return f"plain FM: {why_not}"
    fused_fm = importlib.import_module("megarec.models.fused_fm")
    for layer in layers:
        fused_fm.fuse(layer)
    return f"FM and LayerNorm in Triton kernels, in {len(layers)} layers"


def _why_not_fused(layers: list[InteractionLayer], dtype: torch.dtype, device: torch.device) -> str:
    if not layers:
        return "no interaction layer has a static Y"
    if device.type != "cuda":
        return f"Triton's kernels are for GPUs, this is a {device.type}"
    if dtype == torch.float32:
        return "in fp32 Triton multiplies without tensor cores"
    return triton_problem(device.type) or ""


def compile_layers(model: nn.Module, dense: DenseConfig, section: dict[str, Any], device: torch.device) -> None:
    """Compile every interaction layer of a model, in place, at its first call; after tensor parallelism.

    Args:
        section: the DeepSpeed config.
        device: where the model will run.

    Raises:
        UserError: the model, the ZeRO stage or this machine does not support it.
    """
    if not dense.compile:
        return
    layers = [module for module in model.modules() if isinstance(module, InteractionLayer)]
    _check(layers, dense, section, device)
    # Each layer's dropouts have numbers of their own, and each is compiled for training and for evaluation; beyond
    # its limit dynamo would run them uncompiled.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 8 * len(layers))
    opaque = (Projection, TensorParallelMLP) if device.type == "cpu" else (TensorParallelMLP,)
    for layer in layers:
        for part in layer.modules():
            if isinstance(part, opaque):
                part.forward = torch.compiler.disable(part.forward)  # type: ignore[method-assign]
        layer.forward = torch.compile(layer.forward)  # type: ignore[method-assign]


def _check(layers: list[InteractionLayer], dense: DenseConfig, section: dict[str, Any], device: torch.device) -> None:
    if not layers:
        raise UserError("dense.compile=true: only Wukong's interaction layers are compiled, and this model has none")
    if settings_of(section).stage == 3:
        raise UserError(
            "dense.compile=true with deepspeed.zero_optimization.stage=3: DeepSpeed gathers parameters in hooks that a "
            "compiled layer would not run; take stage 2 or dense.compile=false"
        )
    if not has_compiler(device):
        raise UserError(
            f"dense.compile=true: torch.compile needs a C++ compiler on a CPU, and there is no {_cpu_compiler()!r} "
            "(CXX) on PATH; install one or take dense.compile=false"
        )


def has_compiler(device: torch.device) -> bool:
    """Whether torch.compile finds the program that it needs on a CPU."""
    return device.type != "cpu" or shutil.which(_cpu_compiler()) is not None


def _cpu_compiler() -> str:
    return os.environ.get("CXX", "g++")


def recompute_layers(model: nn.Module, policy: Recompute) -> None:
    """Make every interaction layer of a model forget its activations by a policy, in place.

    Raises:
        UserError: the model has no interaction layers.
    """
    if policy == "none":
        return
    layers = [module for module in model.modules() if isinstance(module, InteractionLayer)]
    if not layers:
        raise UserError(
            f"dense.recompute={policy!r}: only Wukong's interaction layers are recomputed, and this model has none; "
            "take 'none'"
        )
    for layer in layers:
        kept = layer.kept_by_selective = _Kept()  # type: ignore[assignment]
        layer.forward = _recomputed(layer.forward, policy, kept)  # type: ignore[method-assign]


def bytes_kept_by_selective(model: nn.Module) -> int:
    """Results of products that `selective` kept in the last forward pass: hooks on saved tensors do not see them."""
    kept = (getattr(layer, "kept_by_selective", None) for layer in model.modules())
    return sum(layer.bytes for layer in kept if layer is not None)


@dataclass
class _Kept:
    """Bytes that `selective` keeps of one layer's products."""

    bytes: int = 0

    def choose(self, context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op not in _PRODUCTS:
            return CheckpointPolicy.PREFER_RECOMPUTE
        if not context.is_recompute:
            a, b = args[-2:]
            self.bytes += a.numel() // a.shape[-1] * b.shape[-1] * a.element_size()
        return CheckpointPolicy.MUST_SAVE


def _recomputed(forward: Callable[..., Any], policy: Recompute, kept: _Kept) -> Callable[..., Any]:
    # Re-entrant: the layer runs again with its own backward pass, so that ZeRO-3's hooks work as usual.
    options: dict[str, Any] = {"use_reentrant": True, "preserve_rng_state": False}
    if policy == "selective":
        contexts = functools.partial(create_selective_checkpoint_contexts, kept.choose)
        options |= {"use_reentrant": False, "context_fn": contexts}

    def again(x: Tensor, *others: Any) -> Any:
        with fast_cpu_gemm(x.device, x.dtype):  # the backward pass runs outside the model's forward
            return forward(x, *others)

    @functools.wraps(forward)
    def run(*inputs: Any) -> Any:
        kept.bytes = 0
        return checkpoint(again, *inputs, **options)

    return run
