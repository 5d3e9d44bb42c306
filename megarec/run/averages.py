"""Exponential moving averages of weights, which validation, test and export use instead.

    average <- d average + (1 - d) weight after every applied step,  d = min(decay, (1 + n) / (10 + n)) at the n-th

The smaller d of the first steps forgets the first weights. Averaged are the dense model with its running statistics,
tower modules, and tables of at most `table_rows` rows, each where it lies: master weights in the parts that ZeRO and
tensor parallelism leave on a rank, tables in their shards. So nothing travels, and the numbers do not depend on the
topology. Averages are float32, whatever the weights are.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megarec.config.sections import EmaConfig
from megarec.dense.side import DenseSide
from megarec.sparse.layout import EmbeddingLayout
from megarec.sparse.side import SparseSide

WARM_UP = 10


def decay_of_step(decay: float, applied: int) -> float:
    """d after the n-th applied step, n = `applied` from 1."""
    return min(decay, (1 + applied) / (WARM_UP + applied))


class Averages:
    """The averages of one rank.

    Args:
        config: what to average; None: nothing, and every verb does nothing.
        layout: of the tables.

    Attributes:
        tables, modules: by name as the sparse side has them, the averages of tables and of tower modules.
    """

    def __init__(self, config: EmaConfig | None, dense: DenseSide, sparse: SparseSide, layout: EmbeddingLayout) -> None:
        self._config, self._dense, self._sparse = config, dense, sparse
        self._decaying: set[str] = set()  # tables whose decay must not wait for rows to be touched
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._dense_averages: dict[int, Tensor] = {}
        self.tables: dict[str, Tensor] = {}
        self.modules: dict[str, Tensor] = {}
        if config is None:
            return
        rows = {table.name: table.rows for table in layout.tables}
        for weight in dense.masters():
            self._dense_averages[id(weight)] = self._follow(weight)
        for name, (shard, tensor) in sparse.state().items():
            if name == f"{shard.table}/weight" and rows[shard.table] <= config.table_rows:
                self.tables[name] = self._follow(tensor)
                if shard.table in sparse.decaying:
                    self._decaying.add(shard.table)
        for name, parameter in sparse.modules.bank.named_parameters() if sparse.modules else ():
            self.modules[name] = self._follow(parameter)

    def _follow(self, weight: Tensor) -> Tensor:
        average = weight.detach().to(torch.float32, copy=True)
        self._pairs.append((weight.detach(), average))
        return average

    def __bool__(self) -> bool:
        return self._config is not None

    def memory_bytes(self) -> int:
        """Bytes of the averages."""
        return sum(average.nbytes for _, average in self._pairs)

    def of_master(self, master: Tensor) -> Tensor:
        """The average of a tensor of `DenseSide.masters`."""
        return self._dense_averages[id(master)]

    @torch.no_grad()
    def start(self) -> None:
        """Set every average to its weight."""
        for weight, average in self._pairs:
            average.copy_(weight)

    @torch.no_grad()
    def update(self, applied: int) -> None:
        """After an applied step.

        Args:
            applied: how many there were, this one included.
        """
        if self._config is None:
            return
        if self._decaying:
            self._sparse.settle(self._decaying)
        share = 1 - decay_of_step(self._config.decay, applied)
        for weight, average in self._pairs:
            average.lerp_(weight if weight.dtype == average.dtype else weight.float(), share)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside of `with` the averages are the weights, to the last bit those of before after it; collective."""
        if self._config is None:
            yield
            return
        kept = [weight.clone() for weight, _ in self._pairs]
        self._set(lambda index: self._pairs[index][1])
        try:
            yield
        finally:
            self._set(lambda index: kept[index])

    @torch.no_grad()
    def _set(self, source: Callable[[int], Tensor]) -> None:
        for index, (weight, _) in enumerate(self._pairs):
            weight.copy_(source(index))
        self._dense.take_over_masters()
