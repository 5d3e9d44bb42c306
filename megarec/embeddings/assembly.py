"""The local shuffle: blocks of pooled embeddings from every owner -> one matrix in layout order, and back."""

from typing import Any

import torch
from torch import Tensor

from megarec.data.batch import Batch
from megarec.embeddings.layout import EmbeddingLayout
from megarec.embeddings.routes import Routes, Slot

Divisors = dict[str, Tensor]
"""By feature with mean pooling: the length of every bag as float32 [B, 1], at least 1."""


class Assembly:
    """Puts columns where the layout wants them, and turns the owners' sums into means where a feature asks for it.

    Means are made here, where the lengths are known, so that owners and their backends only ever sum.
    """

    def __init__(self, routes: Routes, layout: EmbeddingLayout) -> None:
        self.slots = routes.slots
        self.in_layout_order: list[tuple[int, Slot]] = sorted(
            ((owner, slot) for owner, slots in enumerate(routes.slots) for slot in slots),
            key=lambda pair: pair[1].start,
        )
        self._mean = [f.name for f in layout.features if f.multi_valued and f.pooling == "mean"]
        offsets = [slot.offset for _, slot in self.in_layout_order]
        self._in_place = len(self.slots) == 1 and not self._mean and offsets == sorted(offsets)
        self._width = layout.width

    def __call__(self, blocks: Tensor, batch: Batch) -> Tensor:
        """[sum over owners of B x columns(owner)] -> [B, layout.width]."""
        if self._in_place:
            return blocks.view(batch.size, self._width)
        divisors: Divisors = {}
        for name in self._mean:
            lengths = batch.ids[name].lengths
            assert lengths is not None
            divisors[name] = lengths.clamp(min=1).to(torch.float32).unsqueeze(1)
        assembled: Tensor = _Assemble.apply(blocks, self, batch.size, divisors)
        return assembled

    def split(self, blocks: Tensor, size: int) -> list[Tensor]:
        """Views [B, columns(owner)] of the owners' blocks."""
        columns = [sum(slot.columns for slot in slots) for slots in self.slots]
        parts = blocks.split([size * width for width in columns])
        return [part.view(size, width) for part, width in zip(parts, columns, strict=True)]


class _Assemble(torch.autograd.Function):
    """One copy each way."""

    @staticmethod
    def forward(ctx: Any, blocks: Tensor, assembly: Assembly, size: int, divisors: Divisors) -> Tensor:
        ctx.assembly, ctx.divisors = assembly, divisors
        owners = assembly.split(blocks, size)
        out = torch.cat(
            [owners[owner][:, slot.offset : slot.offset + slot.columns] for owner, slot in assembly.in_layout_order],
            dim=1,
        )
        for _, slot in assembly.in_layout_order:
            if slot.feature.name in divisors:
                out[:, slot.start : slot.start + slot.columns].div_(divisors[slot.feature.name])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        grad, slots, divisors = grads[0], ctx.assembly.slots, ctx.divisors

        def columns(slot: Slot) -> Tensor:
            part = grad[:, slot.start : slot.start + slot.columns]
            return part / divisors[slot.feature.name] if slot.feature.name in divisors else part

        size = grad.shape[0]
        blocks = grad.new_empty(size * sum(slot.columns for owner in slots for slot in owner))
        for block, owner in zip(ctx.assembly.split(blocks, size), slots, strict=True):
            torch.cat([columns(slot) for slot in owner], dim=1, out=block)
        return blocks, None, None, None
