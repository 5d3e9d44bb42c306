"""Bytes of the dense side: parameters, gradients, optimizer state, and what a step saves for its backward pass."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from megarec.dense.layers import bytes_kept_by_selective

Parts = dict[str, int]


def dense_bytes(engine: Any, messages: Iterable[Tensor] = ()) -> Parts:
    """Bytes that this rank holds now, by part, each storage counted once.

    Args:
        messages: tensors of a collective that is about to run; their storage that no other part holds is communication.

    Parts:
        parameters: what the model computes with, as ZeRO shards it.
        gradients: what the optimizer will step with: at ZeRO 0 all gradients, else those of this rank's partition.
        optimizer: its state, and master weights where they are a copy.
        step: float32 copies of the gradients, which live while the optimizer steps.
        communication: buckets, gradients that wait to be reduced, parameters that ZeRO-3 has gathered, and messages.
    """
    optimizer = engine.optimizer
    model = list(engine.module.parameters())
    stepped = getattr(optimizer, "optimizer", optimizer)  # the torch optimizer inside of DeepSpeed's
    masters = [p for group in stepped.param_groups for p in group["params"]]
    masters += getattr(optimizer, "fp32_partitioned_groups_flat", [])  # ZeRO-3 hands them out one at a time
    zero = {name: getattr(optimizer, name, None) for name in _ZERO_GRADIENTS}
    whole = [[p.grad, getattr(p, "grad_accum", None)] for p in model]
    claims = [
        ("parameters", [getattr(p, "ds_tensor", p) for p in model]),
        ("parameters", [getattr(p, "ds_secondary_tensor", None) for p in model]),
        ("parameters", [p.data for p in model if getattr(p, "ds_persist", False)]),
        ("gradients", zero if hasattr(optimizer, "ipg_buckets") else whole),
        ("communication", [bucket.buffer for bucket in getattr(optimizer, "ipg_buckets", {}).values()]),
        ("communication", [[p.data for p in model], whole, list(messages)]),
        ("optimizer", [masters, list(stepped.state.values())]),
        ("optimizer", getattr(optimizer, "param_buffer_of_bit16_for_cpu_offload_groups", None)),
        ("step", [p.grad for p in masters]),
    ]
    return _bytes_of_storages(claims)


_ZERO_GRADIENTS = ("averaged_gradients", "all_grad_tensors", "grads_in_partition", "grad_partitions_flat_buffer")


def _bytes_of_storages(claims: Iterable[tuple[str, Any]]) -> Parts:
    """Each storage belongs to the first part that claims it."""
    parts: Parts = {}
    seen: set[int] = set()
    for part, claimed in claims:
        parts.setdefault(part, 0)
        for tensor in _tensors(claimed):
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                parts[part] += storage.nbytes()
    return parts


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)


@contextmanager
def saved_activations(result: dict[str, int], model: nn.Module | None = None) -> Iterator[dict[int, int]]:
    """Put into result["bytes"] what the forward passes inside save for their backward pass, each storage once.

    Parameters and views of them are not activations, nor is what a backward pass computes again. Works on the meta
    device.

    Args:
        model: whose layers may be recomputed selectively; what these keep of their last forward pass counts as well.

    Yields:
        The bytes of what is saved, by storage, as it is saved; a name (`_cdata`) holds while its storage is there.
    """
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        in_backward = torch._C._current_graph_task_id() != -1
        if not in_backward and not isinstance(tensor, nn.Parameter) and not isinstance(tensor._base, nn.Parameter):
            storage = tensor.untyped_storage()
            seen[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield seen
    result["bytes"] = sum(seen.values()) + (0 if model is None else bytes_kept_by_selective(model))
