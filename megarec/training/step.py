"""One optimizer step and one prediction: where the sparse and the dense side meet.

The sparse side looks up and updates once a step, over all of the rank's examples: the dense side takes the embeddings
of a micro-batch as a leaf, whose gradient goes back through the exchange. So accumulation divides only the dense work
and what travels, a micro-batch beside the compute of another, and its numbers are exact for every table optimizer.

Nothing has changed before the check has seen every gradient; then all of it changes, or nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megarec.data.batch import Batch
from megarec.dense.side import DenseResult, DenseSide
from megarec.sparse.exchange.group import Distributed
from megarec.sparse.side import SparseSide, StepLookup
from megarec.training.profiling import StepTimer


@dataclass(frozen=True)
class StepResult:
    """What one step leaves for the log.

    Attributes:
        logits: [B], or of several labels [B, T], of this rank, before the update.
        gradient_norm: of the dense side before clipping, over all ranks; None when it was not asked for or is not kept.
        cause: why nothing was changed, the same on all ranks: the check's, or "overflow" (fp16) or "gradient" when
            DeepSpeed refused the step; None: the step was applied.
    """

    logits: Tensor
    gradient_norm: float | None
    cause: str | None = None


@dataclass(frozen=True)
class StepTensors:
    """What one step has made on this rank before anything is changed.

    Attributes:
        made: by micro-batch.
    """

    batch: Batch
    lookup: StepLookup
    made: list[DenseResult]


Check = Callable[[StepTensors], Callable[[], str | None]]
"""Asks all ranks about a step. What it returns waits for their answers, and says why the step must not be applied, the
same on all ranks, or None."""


def train_step(
    dense: DenseSide,
    sparse: SparseSide,
    batch: Batch,
    *,
    timer: StepTimer,
    ids: Distributed | None = None,
    after_lookup: Callable[[], object] = lambda: None,
    meanwhile: Callable[[], object] = lambda: None,
    want_norm: bool = False,
    check: Check = lambda tensors: lambda: None,
) -> StepResult:
    """One optimizer step over the rank's part of the global batch.

    Args:
        batch: B examples of this rank; B x the number of ranks is the global batch.
        ids: those of the batch, where they are with the owners of the tables already.
        after_lookup: called once the embeddings are here.
        meanwhile: called once the backward passes are made, on an accelerator: queued, and the check is asked but not
            answered. One of the two starts the next batch's ids on their way.
        want_norm: return the norm of the dense gradient; at ZeRO 0 in fp32 it costs a pass over the gradients.
        check: asked once; collective.
    """
    made: list[DenseResult] = []
    with timer.part("exchange"):
        lookup = sparse.forward(sparse.distribute(batch) if ids is None else ids, dense.accumulation)
    after_lookup()
    for micro in range(dense.accumulation):
        with timer.part("exchange"):
            values = lookup.micro_batch(micro)  # those of the next one start on their way
        with timer.part("dense"):
            made.append(dense.forward_backward(micro, batch, values))
        with timer.part("exchange"):
            lookup.send_back(micro, made[micro].gradient)  # after the last: tower modules; nothing has changed yet
    with timer.part("check"):
        answer = check(StepTensors(batch, lookup, made))
    meanwhile()
    with timer.part("check"):
        cause = answer()
    with timer.part("optimizer"):
        update = dense.apply(want_norm) if cause is None else dense.skip(cause)
    with timer.part("exchange"):
        if update.cause is None:
            lookup.apply()
        else:
            lookup.skip()
    return StepResult(torch.cat([result.logits for result in made]), update.gradient_norm, update.cause)


@torch.no_grad()
def predict(dense: DenseSide, sparse: SparseSide, batch: Batch) -> Tensor:
    """Logits [B], or of several labels [B, T], of a batch, in evaluation mode."""
    return dense.predict(batch, sparse.look_up(batch).values)
