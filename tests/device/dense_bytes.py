"""Bytes and kernels of a dense step on the simulated accelerator, as one JSON: what planning/op_counts.py is held to.

Counted apart from it, from the tensors that hold the numbers. A process of its own, as measure.py.
"""

import json
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megarec.models.initial import initialize, materialize
from megarec.models.wukong import Wukong
from tests.device.simulated import DEVICE, VIEWS, SimulatedTensor, simulated
from tests.device.small_wukong import EMBEDDINGS, EXAMPLES, WUKONG

MAKES_NOTHING = ("empty", "empty_like", "new_empty", "new_zeros", "empty_strided")


class Watch(TorchDispatchMode):
    """Every tensor that goes into a kernel or comes out of it, once."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.kernels = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in VIEWS and name not in MAKES_NOTHING and (made := held(result)):
            self.kernels += 1
            given = [] if name in ("copy_", "zero_") else held((args, kwargs))
            given = held(args[1]) if name == "copy_" else given
            written = {id(t) for t in held((kwargs or {}).get("out"))}
            self.bytes[name] += sum(size(t) for t in made) + sum(size(t) for t in given if id(t) not in written)
        return result


def held(value: Any) -> list[Tensor]:
    found = {id(t.on_cpu): t.on_cpu for t in tree_leaves(value) if isinstance(t, SimulatedTensor)}
    return list(found.values())


def size(tensor: Tensor) -> int:
    """Of the numbers that are there: a stride of 0 repeats them."""
    elements = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= length if stride else 1
    return elements * tensor.element_size()


def main() -> None:
    with simulated():
        with torch.device("meta"):
            model = Wukong(EMBEDDINGS, WUKONG)
        materialize(model, DEVICE)
        initialize(model, 0)
        x = torch.zeros(EXAMPLES, EMBEDDINGS, WUKONG.dim, device=DEVICE).requires_grad_()
        with Watch() as seen:
            model(x).sum().backward()
    print(json.dumps({"bytes": seen.bytes, "kernels": seen.kernels}))


if __name__ == "__main__":
    main()
