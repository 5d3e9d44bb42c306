"""Activation checkpointing: what an interaction layer keeps for its backward pass, and what it computes again.

    none       every activation is kept
    selective  results of matrix products are kept; LayerNorm, ReLU, copies and collectives run again
    full       only the layer's input is kept; the whole layer runs again

The numbers do not change: dropout masks are functions of the examples' keys, not of a random state.
"""

import functools
from collections.abc import Callable
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
        layer.forward = _recomputed(layer.forward, policy)  # type: ignore[method-assign]


def _recomputed(forward: Callable[..., Any], policy: Recompute) -> Callable[..., Any]:
    # Re-entrant: the layer runs again with its own backward pass, so that ZeRO-3's hooks find it as they know it.
    options: dict[str, Any] = {"use_reentrant": True, "preserve_rng_state": False}
    if policy == "selective":
        contexts = functools.partial(create_selective_checkpoint_contexts, _keep_products)
        options |= {"use_reentrant": False, "context_fn": contexts}

    def again(x: Tensor, *others: Any) -> Any:
        with fast_cpu_gemm(x.device, x.dtype):  # the backward pass stands outside the model's own
            return forward(x, *others)

    @functools.wraps(forward)
    def run(*inputs: Any) -> Any:
        return checkpoint(again, *inputs, **options)

    return run


def _keep_products(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE
