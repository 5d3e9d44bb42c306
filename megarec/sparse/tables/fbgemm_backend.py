"""Tables in FBGEMM's table-batched embeddings: one fused lookup, and one fused gradient and update, for all tables."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor

from megarec.config.sections import EmbeddingConfig
from megarec.errors import UserError
from megarec.sparse.tables.base import LocalIds, LocalShard, Pooled, State

OPTIMIZERS = {
    "rowwise_adagrad": (EmbOptimType.EXACT_ROWWISE_ADAGRAD, "rowwise_square_sum"),
    "adagrad": (EmbOptimType.EXACT_ADAGRAD, "square_sum"),
    "sgd": (EmbOptimType.EXACT_SGD, None),
}
BOUNDS_CHECK = "FBGEMM_TBE_BOUNDS_CHECK_MODE"
WEIGHTS = {"fp32": SparseType.FP32, "fp16": SparseType.FP16}


def bounds_check() -> BoundsCheckMode:
    """How FBGEMM checks ids: not at all, unless its variable says so.

    Raises:
        UserError: the variable is not one of its modes.
    """
    given = os.environ.get(BOUNDS_CHECK)
    if given is None:
        return BoundsCheckMode.NONE
    modes = {str(mode.value): mode for mode in BoundsCheckMode}
    if given not in modes:
        known = ", ".join(f"{number} ({mode.name.lower()})" for number, mode in modes.items())
        raise UserError(f"{BOUNDS_CHECK}={given!r}: expected one of {known}; or unset it: ids are not checked then")
    return modes[given]


class FbgemmTables:
    """Shards of this rank; "exact" optimizers: the gradients of a row are summed before its one update.

    Ids are not checked here: FBGEMM reads and writes out of bounds for an id outside its table, unless its own variable
    FBGEMM_TBE_BOUNDS_CHECK_MODE asks for a check: 0 ends the run there, 1 warns, 2 takes row 0 silently.
    """

    def __init__(self, shards: Sequence[LocalShard], config: EmbeddingConfig, device: torch.device) -> None:
        self._shards = [local.shard for local in shards]
        # Its CUDA kernels sort an id behind the rows of all tables before it, in the type of the ids.
        self._many_rows = sum(shard.rows for shard in self._shards) >= 2**31
        optimizer, self._state_name = OPTIMIZERS[config.optimizer]
        place = (EmbeddingLocation.DEVICE, ComputeDevice.CUDA)
        if device.type == "cpu":
            place = (EmbeddingLocation.HOST, ComputeDevice.CPU)
        self._module: Any = SplitTableBatchedEmbeddingBagsCodegen(
            [(shard.rows, shard.columns, *place) for shard in self._shards],
            feature_table_map=[table for table, local in enumerate(shards) for _ in local.slots],
            optimizer=optimizer,
            learning_rate=config.learning_rate,
            eps=config.eps,
            weights_precision=WEIGHTS[config.weights],
            output_dtype=SparseType.FP32,
            stochastic_rounding=False,
            pooling_mode=PoolingMode.SUM,
            bounds_check_mode=bounds_check(),  # FBGEMM reads the variable by itself as well
            device=device,
        )

    def pool(self, ids: LocalIds) -> Pooled:
        values, offsets = ids.values, ids.offsets
        if self._many_rows:
            values, offsets = values.long(), offsets.long()
        pooled: Tensor = self._module(values, offsets, ids.weights)
        # Its update is its backward pass, which only takes a gradient of the output's type: so float32.
        return Pooled(pooled.detach(), lambda gradient: pooled.backward(gradient.to(pooled.dtype)))

    def set_learning_rate(self, rate: float) -> None:
        self._module.set_learning_rate(rate)

    def state(self) -> State:
        named = {
            f"{shard.table}/weight": (shard, weight)
            for shard, weight in zip(self._shards, self._module.split_embedding_weights(), strict=True)
        }
        if self._state_name is not None:
            states = self._module.split_optimizer_states()
            for shard, (state,) in zip(self._shards, states, strict=True):
                rows = state.view(shard.rows, -1)  # [rows, 1] when row-wise
                named[f"{shard.table}/{self._state_name}"] = (shard if state.dim() > 1 else shard.per_row, rows)
        return named
