"""Sequences in front of the dense model: rows that arrived one by one come to lie padded behind the pooled columns.

    pooled columns [B, columns] | of every sequence [B, positions, features, columns] and its mask [B, positions]

Position 0 is the newest, so that a row's place does not depend on the lengths of other lists. What no row came to is 0
and its gradient is left behind: padding never travels.
"""

import dataclasses
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from megarec.data.batch import Batch, Ids
from megarec.sparse.exchange.group import Exchanged
from megarec.sparse.exchange.parts import joined, rows_of
from megarec.sparse.exchange.unpooled import Rows, RowsLookup
from megarec.sparse.layout import EmbeddingLayout, Feature


def newest(ids: Ids, feature: Feature) -> Ids:
    """The newest ids of every list, as many as the feature has positions, in their order."""
    if ids.lengths is None:
        return ids
    kept = ids.lengths.clamp(max=feature.positions)
    if torch.equal(kept, ids.lengths):
        return ids
    return Ids(ids.values[_ages(ids, ids.lengths, feature) < feature.positions], kept)


def newest_of(batch: Batch, layout: EmbeddingLayout) -> dict[str, Ids]:
    """The ids of a batch, of sequences the newest alone; lists that share positions are equally long."""
    by_name = {feature.name: feature for feature in layout.unpooled}
    found = dict(batch.ids)
    for sequence in layout.sequences:
        for name in sequence.features:
            found[name] = newest(batch.ids[name], by_name[name])
    return found


def _ages(ids: Ids, lengths: Tensor, feature: Feature) -> Tensor:
    """Of every id, how many of its list are newer."""
    stops = lengths.cumsum(0)
    place = torch.arange(ids.values.numel(), device=ids.values.device)
    count = ids.values.numel()
    if feature.newest_first:
        return place - (stops - lengths).repeat_interleave(lengths, output_size=count)
    return stops.repeat_interleave(lengths, output_size=count) - 1 - place


class Padding:
    """Where the rows of sequences belong in [B, columns]."""

    def __init__(self, layout: EmbeddingLayout) -> None:
        self._sequences, self.columns = layout.sequences, layout.sequence_columns
        self._features = {feature.name: feature for feature in layout.unpooled}

    def places(self, ids: Mapping[str, Ids], size: int) -> list[Tensor]:
        """By sequence, where each of its rows belongs, counted over all positions of `size` examples: int64 [rows]."""
        found = []
        for sequence in self._sequences:
            name = sequence.features[0]
            own, examples = ids[name], torch.arange(size, device=ids[name].values.device)
            if own.lengths is None:
                found.append(examples)
                continue
            first = (sequence.positions * examples).repeat_interleave(own.lengths, output_size=own.values.numel())
            found.append(first + _ages(own, own.lengths, self._features[name]))
        return found

    def pad(
        self, rows: Rows, places: Iterable[Tensor], size: int, dtype: torch.dtype, device: torch.device
    ) -> list[Tensor]:
        """[size, columns], in parts side by side."""
        parts = []
        for sequence, place in zip(self._sequences, places, strict=True):
            own = [rows[name] for name in sequence.features]
            row = own[0] if len(own) == 1 else torch.cat(own, dim=1)
            block = torch.zeros(size * sequence.positions, row.shape[1], dtype=dtype, device=device)
            parts.append(block.index_copy_(0, place, row.to(dtype)).view(size, -1))
            if sequence.masked:
                mask = torch.zeros(size * sequence.positions, dtype=dtype, device=device)
                parts.append(mask.index_fill_(0, place, 1).view(size, -1))
        return parts

    def by_feature(self, values: Tensor) -> tuple[Tensor, list[Feature]]:
        """[B, columns of all] with the columns of each unpooled feature side by side; and those features, placed so."""
        before = values.shape[1] - self.columns
        parts, features, start = [values[:, :before]], list[Feature](), before
        for sequence in self._sequences:
            shape = (sequence.positions, len(sequence.features), sequence.columns)
            block = values[:, before + sequence.start : before + sequence.mask].unflatten(1, shape)
            for index, name in enumerate(sequence.features):
                parts.append(block[:, :, index].flatten(1))
                columns = parts[-1].shape[1]
                features.append(dataclasses.replace(self._features[name], start=start, columns=columns))
                start += columns
        return torch.cat(parts, dim=1), features

    def unpad(self, gradient: Tensor, places: Iterable[Tensor]) -> Rows:
        """The gradient of `pad`, float32."""
        rows: Rows = {}
        for sequence, place in zip(self._sequences, places, strict=True):
            width = len(sequence.features) * sequence.columns
            block = gradient[:, sequence.start : sequence.mask].reshape(-1, width)
            found = block.index_select(0, place).float().split(sequence.columns, dim=1)
            rows |= zip(sequence.features, found, strict=True)
        return rows


class SequenceLookup:
    """An `Exchanged` with sequences behind what it brings; they arrive all at once, whatever the parts.

    Args:
        inner: of what is pooled.
        rows: of sequences.
        ids: of this rank's examples.
        size: examples of a part.
        parts: how many there are.
        divide: what the gradient is divided by besides.
        l2: embedding.l2 x 2 / global batch, by feature.
    """

    def __init__(
        self,
        inner: Exchanged,
        rows: RowsLookup,
        padding: Padding,
        ids: Mapping[str, Ids],
        size: int,
        *,
        parts: int,
        dtype: torch.dtype,
        divide: int,
        l2: Mapping[str, float],
    ) -> None:
        self._inner, self._rows, self._padding, self._parts = inner, rows, padding, parts
        self._size, self._dtype, self._divide, self._l2 = size, dtype, divide, l2
        self._places = padding.places(ids, size * parts)
        self._arrived: Rows = {}
        self._padded: list[Tensor] = []
        self._gradients: list[Tensor] = []

    def arrive(self, part: int) -> Tensor:
        pooled = self._inner.arrive(part)
        if not self._padded:
            self._arrived = self._rows.arrive()
            size = self._size * self._parts
            self._padded = self._padding.pad(self._arrived, self._places, size, self._dtype, pooled.device)
        return torch.cat([pooled, *(rows_of(own, part, self._parts) for own in self._padded)], dim=1)

    def leave(self, part: int, gradient: Tensor) -> Tensor | None:
        pooled, own = gradient.split([gradient.shape[1] - self._padding.columns, self._padding.columns], dim=1)
        total = self._inner.leave(part, pooled)
        self._gradients.append(own)
        if part + 1 == self._parts:
            rows = self._padding.unpad(joined(self._gradients), self._places)
            for name, row in rows.items():
                row.div_(self._divide)
                if self._l2[name]:
                    row.add_(self._arrived[name], alpha=self._l2[name])
            self._rows.leave(rows)
        return None if total is None else total + own.sum(dtype=torch.float32)

    def update(self) -> None:
        self._rows.finish()
        self._inner.update()

    def forget(self) -> None:
        self._rows.finish()
        self._inner.forget()
