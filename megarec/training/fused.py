"""NVIDIA apex where it is truly there. PyPI's `apex` is an unrelated web toolkit and counts as absent."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def probe_apex() -> tuple[bool, str]:
    """Whether NVIDIA apex's fused kernels can run here, and why (not)."""
    if not torch.cuda.is_available():
        return False, "apex needs CUDA, there is none"
    try:
        importlib.import_module("amp_C")
        importlib.import_module("apex.optimizers")
    except ImportError as error:
        return False, f"NVIDIA apex is not installed ({error})"
    return True, "NVIDIA apex is installed"


def fused_adam() -> tuple[Callable[..., torch.optim.Optimizer] | None, str]:
    """apex's FusedAdam in its AdamW mode (the default), or None; and the reason."""
    found, why = probe_apex()
    return (importlib.import_module("apex.optimizers").FusedAdam if found else None), why


def layer_norm_class(use_apex: bool) -> tuple[type[nn.Module], str]:
    """apex's FusedLayerNorm or torch's LayerNorm, and the reason.

    apex's always has a bias; it is taken only for models that keep theirs (model.bias).
    """
    if not use_apex:
        return nn.LayerNorm, "train.fused_kernels=torch or model.bias=false"
    found, why = probe_apex()
    if not found:
        return nn.LayerNorm, why
    normalization: Any = importlib.import_module("apex.normalization")
    return normalization.FusedLayerNorm, why
