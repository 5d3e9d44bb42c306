"""Tables in Triton kernels (kernels/tables.py): any width, any output type, deterministic, on CUDA and ROCm.

Neither lookup nor update makes the host wait: the number of touched rows is known only on the device.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megarec.config.sections import EmbeddingConfig
from megarec.kernels import tables as kernels
from megarec.kernels.launch import launch
from megarec.sparse.tables.base import LocalIds, LocalShard, Pooled, State
from megarec.sparse.tables.optimizers import ROW_OPTIMIZERS

_TILE = 2048  # elements of a program that holds several rows
_BLOCK = 1024  # bags or occurrences of a program that only looks at indices


@dataclass(frozen=True)
class _Stack:
    """Shards of equal width in one tensor.

    Attributes:
        weight: [rows, columns].
        state: of the optimizer, by name: float32 [rows, columns] or [rows, 1].
        shards: with their first rows in `weight`.
        slots: that look these shards up.
        slots_on_device: the same, int32.
        first_key: of the first row among all rows of the rank.
        align: power of two that divides the slots' first columns in the output, and its width.
    """

    weight: Tensor
    state: dict[str, Tensor]
    shards: list[tuple[LocalShard, int]]
    slots: list[int]
    slots_on_device: Tensor
    first_key: int
    align: int

    @property
    def columns(self) -> int:
        return self.weight.shape[1]

    def tile(self) -> dict[str, int]:
        """Rows of a program that holds several, elements of a row, and warps: 16 elements a thread, wide rows 32."""
        block = _power_of_two(self.columns)
        rows = min(max(1, _TILE // block), 64)
        return {"ROWS": rows, "BLOCK": block, "warps": 4 if block <= 2048 else 8}

    def row_tile(self) -> dict[str, int]:
        """Elements of a row and warps of a program that holds one row: 8 elements a thread, wide rows 32."""
        block = _power_of_two(self.columns)
        return {"BLOCK": block, "warps": min(8, max(1, block // 256))}


class TritonTables:
    """Shards of this rank.

    Ids are not checked here: the kernels read and write out of bounds for an id outside its table.

    Args:
        output: of what type the summed rows are; sums are float32.
    """

    def __init__(
        self,
        shards: Sequence[LocalShard],
        config: EmbeddingConfig,
        device: torch.device,
        output: torch.dtype = torch.float32,
    ) -> None:
        self._optimizer, self._rate, self._eps = config.optimizer, config.learning_rate, config.eps
        self._output = output
        of_slot = [local for local in shards for _ in local.slots]
        columns = [local.shard.columns for local in of_slot]
        starts = [0, *itertools.accumulate(columns)]
        self._slots, self._width = len(of_slot), starts.pop()
        self._jagged = any(local.jagged for local in shards)
        rows = sum(local.shard.rows for local in shards)
        self._key_type = torch.int32 if rows < 2**31 else torch.int64  # sorted by half as many passes
        dtype = torch.float16 if config.weights == "fp16" else torch.float32
        self._stacks: list[_Stack] = []
        first_rows: dict[LocalShard, int] = {}  # in their stacks
        first_keys: dict[LocalShard, int] = {}
        key = 0
        for width in dict.fromkeys(columns):
            same = [local for local in shards if local.shard.columns == width]
            ends = list(itertools.accumulate(local.shard.rows for local in same))
            for local, end in zip(same, ends, strict=True):
                first_rows[local] = end - local.shard.rows
                first_keys[local] = key + first_rows[local]
            slots = [slot for slot, of in enumerate(columns) if of == width]
            weight = torch.empty(ends[-1], width, dtype=dtype, device=device)
            state = ROW_OPTIMIZERS[config.optimizer].new_state(weight)
            align = _shared_power_of_two([self._width, *(starts[slot] for slot in slots)])
            placed = [(local, first_rows[local]) for local in same]
            self._stacks.append(
                _Stack(weight, state, placed, slots, torch.tensor(slots, dtype=torch.int32, device=device), key, align)
            )
            key += ends[-1]
        self._starts = torch.tensor(starts, dtype=torch.int32, device=device)
        self._first_rows = torch.tensor([first_rows[local] for local in of_slot], dtype=torch.int64, device=device)
        self._first_keys = torch.tensor([first_keys[local] for local in of_slot], dtype=torch.int64, device=device)

    @torch.no_grad()
    def pool(self, ids: LocalIds) -> Pooled:
        return Pooled(self.look_up(ids), lambda gradient: self.update(ids, gradient))

    def set_learning_rate(self, rate: float) -> None:
        self._rate = rate

    def state(self) -> State:
        named: State = {}
        for stack in self._stacks:
            for local, first in stack.shards:
                shard = local.shard
                rows = slice(first, first + shard.rows)
                named[f"{shard.table}/weight"] = (shard, stack.weight[rows])
                for name, tensor in stack.state.items():
                    per_row = ROW_OPTIMIZERS[self._optimizer].state[name] == "row"
                    named[f"{shard.table}/{name}"] = (shard.per_row if per_row else shard, tensor[rows])
        return named

    def look_up(self, ids: LocalIds) -> Tensor:
        """Summed rows of every bag, [examples, columns of all slots] in the output's type."""
        examples = ids.examples
        assert self._slots * examples < 2**31 > ids.values.numel(), "bags and values are counted in int32"
        output = torch.empty(examples, self._width, dtype=self._output, device=ids.values.device)
        for stack in self._stacks if examples else ():
            tile = stack.tile()
            blocks = _blocks(examples, tile["ROWS"])
            launch(
                kernels.look_up, len(stack.slots) * blocks, stack.weight, *self._inputs(ids), stack.slots_on_device,
                self._first_rows, self._starts, output, examples, blocks, COLUMNS=stack.columns, WIDTH=self._width,
                ALIGN=stack.align, JAGGED=self._jagged, WEIGHTED=ids.weights is not None, **tile,
            )  # fmt: skip
        return output

    @torch.no_grad()
    def update(self, ids: LocalIds, grad: Tensor) -> None:
        """One optimizer step, given the gradient [examples, columns of all slots] of `look_up`, of any type."""
        if not ids.values.numel():
            return
        grad = grad.contiguous()
        keys, order, bag_of = self._sorted(ids)
        runs, run_starts = _runs(keys)
        first = 0
        for stack in self._stacks:
            last = first + sum(ids.counts[slot] for slot in stack.slots)
            if first < last:
                occurrences = (order, bag_of, self._inputs(ids)[2], self._starts, grad)
                self._update_stack(stack, keys, runs, run_starts, occurrences, first, last, ids)
            first = last

    def _update_stack(
        self, stack: _Stack, keys: Tensor, runs: Tensor, run_starts: Tensor, occurrences: tuple[Tensor, ...],
        first: int, last: int, ids: LocalIds,
    ) -> None:  # fmt: skip
        """The update of one stack, whose occurrences are the positions first .. last of the sorted order."""
        (state,) = stack.state.values() or (stack.weight,)  # SGD has none, and does not look at it
        width = {"COLUMNS": stack.columns, "LONGEST": kernels.PIECE}
        read = {"WIDTH": self._width, "ALIGN": stack.align, "JAGGED": self._jagged, "WEIGHTED": ids.weights is not None}
        tile = stack.tile()
        launch(
            kernels.update_short_runs, _blocks(last - first, tile["ROWS"]), keys, runs, run_starts, *occurrences,
            stack.weight, state, first, last, stack.first_key, ids.examples, self._rate, self._eps,
            OPTIMIZER=self._optimizer, **width, **read, **tile,
        )  # fmt: skip
        if last - first <= kernels.PIECE:
            return  # no run is longer
        pieces, tile = 2 * _blocks(last - first, kernels.PIECE), stack.row_tile()
        sums = torch.empty(pieces, stack.columns, device=keys.device)
        launch(
            kernels.sum_pieces, pieces, runs, run_starts, *occurrences, sums, first, last, ids.examples,
            FLIGHT=kernels.UNROLL, **width, **read, **tile,
        )  # fmt: skip
        launch(
            kernels.update_long_runs, pieces, keys, runs, run_starts, sums, stack.weight, state, first, last,
            stack.first_key, self._rate, self._eps, OPTIMIZER=self._optimizer, **width, **tile,
        )  # fmt: skip

    def _inputs(self, ids: LocalIds) -> tuple[Tensor, Tensor, Tensor]:
        """Values, offsets and weights, as kernels take them: absent ones are not read."""
        return ids.values, ids.offsets, ids.values if ids.weights is None else ids.weights

    def _sorted(self, ids: LocalIds) -> tuple[Tensor, Tensor, Tensor]:
        """Keys in order, where in `ids.values` each comes from, and the bag of every value (read if jagged)."""
        bags, device = self._slots * ids.examples, ids.values.device
        keys = torch.empty(ids.values.shape, dtype=self._key_type, device=device)
        bag_of = torch.empty(ids.values.shape if self._jagged else 1, dtype=torch.int32, device=device)
        launch(
            kernels.find_keys, _blocks(bags, _BLOCK), ids.values, ids.offsets, self._first_keys, keys, bag_of, bags,
            ids.examples, BLOCK=_BLOCK, JAGGED=self._jagged,
        )  # fmt: skip
        in_order, order = keys.sort(stable=True)
        return in_order, order, bag_of


def _runs(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Of sorted keys: the number of the run of each, and where every run starts (`kernels.find_runs`)."""
    total = keys.numel()
    runs = torch.zeros(total, dtype=torch.int32, device=keys.device)
    torch.cumsum(keys[1:] != keys[:-1], 0, dtype=torch.int32, out=runs[1:])
    run_starts = torch.empty(total + 1, dtype=torch.int32, device=keys.device)
    launch(kernels.find_runs, _blocks(total, _BLOCK), runs, run_starts, total, BLOCK=_BLOCK)
    return runs, run_starts


def _blocks(total: int, size: int) -> int:
    return -(-total // size)


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not below it."""
    return 1 << (number - 1).bit_length()


def _shared_power_of_two(numbers: Sequence[int]) -> int:
    """The largest up to 16 that divides all."""
    return next(power for power in (16, 8, 4, 2, 1) if all(number % power == 0 for number in numbers))
