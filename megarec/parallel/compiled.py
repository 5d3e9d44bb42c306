"""torch.compile for interaction layers: LayerNorm, ReLU, dropout, copies and conversions between products fused.

The products themselves stay with their libraries. The projection has blocks and a backward pass of its own, and
tensor-parallel MLPs wait for messages in theirs: both stay as they are, and what lies between them is compiled.
"""

import os
import shutil
from typing import Any

import torch
from torch import nn

from megarec.config.deepspeed_keys import zero_stage
from megarec.config.sections import DenseConfig
from megarec.errors import UserError
from megarec.models.projection import Projection
from megarec.models.wukong import InteractionLayer
from megarec.parallel.tensor import TensorParallelMLP


def compile_layers(model: nn.Module, dense: DenseConfig, section: dict[str, Any], device: torch.device) -> None:
    """Compile every interaction layer of a model, in place, at its first call; after tensor parallelism.

    Args:
        section: the DeepSpeed config.
        device: where the model will run.

    Raises:
        UserError: the model, the ZeRO stage, or this machine cannot be compiled for.
    """
    if not dense.compile:
        return
    layers = [module for module in model.modules() if isinstance(module, InteractionLayer)]
    _check(layers, dense, section, device)
    # Each layer's dropouts have numbers of their own, and each is compiled for training and for evaluation; beyond
    # its limit dynamo would run them uncompiled.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 8 * len(layers))
    for layer in layers:
        for part in layer.modules():
            if isinstance(part, (Projection, TensorParallelMLP)):
                part.forward = torch.compiler.disable(part.forward)  # type: ignore[method-assign]
        layer.forward = torch.compile(layer.forward)  # type: ignore[method-assign]


def _check(layers: list[InteractionLayer], dense: DenseConfig, section: dict[str, Any], device: torch.device) -> None:
    if not layers:
        raise UserError("dense.compile=true: only Wukong's interaction layers are compiled, and this model has none")
    if zero_stage(section) == 3:
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
