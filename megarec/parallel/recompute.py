"""Activation checkpointing: what an interaction layer keeps for its backward pass, and what it computes again.

    none       every activation is kept
    selective  results of matrix products are kept; LayerNorm, ReLU, copies and collectives run again
    full       only the layer's input is kept; the whole layer runs again

The numbers do not change: dropout masks are functions of the examples' keys, not of a random state.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from megarec.errors import UserError
from megarec.models.gemm import fast_cpu_gemm
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
    # Re-entrant: the layer runs again with its own backward pass, so that ZeRO-3's hooks find it as they know it.
    options: dict[str, Any] = {"use_reentrant": True, "preserve_rng_state": False}
    if policy == "selective":
        contexts = functools.partial(create_selective_checkpoint_contexts, kept.choose)
        options |= {"use_reentrant": False, "context_fn": contexts}

    def again(x: Tensor, *others: Any) -> Any:
        with fast_cpu_gemm(x.device, x.dtype):  # the backward pass stands outside the model's own
            return forward(x, *others)

    @functools.wraps(forward)
    def run(*inputs: Any) -> Any:
        kept.bytes = 0
        return checkpoint(again, *inputs, **options)

    return run
