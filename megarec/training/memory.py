"""Bytes of the dense side: parameters, gradients, optimizer state, and what a step saves for its backward pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def dense_state_bytes(engine: Any) -> int:
    """Bytes of parameters and optimizer state that this rank holds (ZeRO shards them), gradients left out."""
    seen: dict[int, int] = {}
    tensors: list[Tensor] = [getattr(p, "ds_tensor", p.data) for p in engine.module.parameters()]
    for group in engine.optimizer.param_groups:
        tensors += group["params"]
    for state in engine.optimizer.state.values():
        if isinstance(state, dict):
            tensors += [value for value in state.values() if isinstance(value, Tensor)]
    for tensor in tensors:
        storage = tensor.detach().untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


@contextmanager
def saved_activations(result: dict[str, int]) -> Iterator[None]:
    """Put into result["bytes"] what the forward passes inside save for their backward pass, each storage once."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield
    result["bytes"] = sum(seen.values())
