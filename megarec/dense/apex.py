"""NVIDIA apex where it is truly there. PyPI's `apex` is an unrelated web toolkit and counts as absent."""

import importlib
from collections.abc import Callable

import torch

from megarec.models.wukong import LayerNormFactory, torch_layer_norm


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


def layer_norm_factory(use_apex: bool) -> tuple[LayerNormFactory, str]:
    """apex's FusedLayerNorm or torch's LayerNorm, and a sentence for the log.

    Args:
        use_apex: take apex's where it is there. It always has a bias, so a model without biases cannot use it.
    """
    found, why = probe_apex() if use_apex else (False, "train.fused_kernels=torch or model.bias=false")
    if not found:
        return torch_layer_norm, f"torch LayerNorm: {why}"
    fused = importlib.import_module("apex.normalization").FusedLayerNorm
    return lambda width, bias: fused(width), f"apex FusedLayerNorm: {why}"
