"""One optimizer step and one prediction: where the sparse and the dense side meet.

The sparse side runs once a step over all of the rank's examples, whatever the gradient accumulation: its output is
cut off as a leaf, the engine takes the micro-batches one by one, and the leaf's gradient then goes back through the
exchange into the tables. So accumulation divides only the dense work, and its numbers are exact for every table
optimizer.

    forward and backward of both sides, down to the tables' door -> judge -> dense step -> tower modules, tables

Nothing has changed before the judge has seen every gradient; then all of it changes, or nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from megarec.data.batch import Batch
from megarec.dense.engine import gradient_norm, loss_scale_can_shrink, skip_step
from megarec.sparse.exchange.group import Distributed
from megarec.sparse.side import SparseSide
from megarec.training.profiling import StepTimer


@dataclass(frozen=True)
class StepResult:
    """What one step leaves for the log.

    Attributes:
        logits: [B] of this rank, before the update.
        gradient_norm: of the dense side before clipping, over all ranks; None when it was not asked for or is not kept.
        cause: why nothing was changed, the same on all ranks: the judge's, or "overflow" (fp16) or "gradient" when
            DeepSpeed refused the step; None: the step was applied.
    """

    logits: Tensor
    gradient_norm: float | None
    cause: str | None = None


@dataclass(frozen=True)
class StepTensors:
    """What one step has made on this rank before anything is changed.

    Attributes:
        embedded: [B, columns] that the over-arch saw.
        gradient: [B, columns], its gradient, divided by the ranks.
        losses: mean loss of each micro-batch.
        logits: [B].
    """

    batch: Batch
    embedded: Tensor
    gradient: Tensor
    losses: list[Tensor]
    logits: Tensor


Check = Callable[[StepTensors], str | None]
"""Says why a step must not be applied, the same on all ranks, or None."""


def train_step(
    engine: Any,
    sparse: SparseSide,
    batch: Batch,
    *,
    world_size: int,
    clock: StepTimer,
    ids: Distributed | None = None,
    meanwhile: Callable[[], object] = lambda: None,
    want_norm: bool = False,
    judge: Check = lambda evidence: None,
) -> StepResult:
    """One optimizer step over the rank's part of the global batch.

    Args:
        batch: B examples of this rank; B x world_size is the global batch.
        ids: those of the batch, where they are with the owners of the tables already.
        meanwhile: called once the embeddings are here and before the dense work (starts the next batch on its way).
        want_norm: return the norm of the dense gradient; at ZeRO 0 in fp32 it costs a pass over the gradients.
        judge: asked once; collective.
    """
    engine.train()
    with clock.part("exchange"):
        embedded = sparse.pool(sparse.distribute(batch) if ids is None else ids)
    meanwhile()
    leaf = embedded.detach().requires_grad_()
    accumulation = engine.gradient_accumulation_steps()
    rows_per_micro = batch.size // accumulation
    logits, losses = [], []
    loss_scale = float(engine.optimizer.loss_scale) if engine.fp16_enabled() else 1.0
    for micro in range(accumulation):
        if micro:
            engine.step()  # not at the boundary: it only counts
        rows = slice(micro * rows_per_micro, (micro + 1) * rows_per_micro)
        with clock.part("dense"):
            out = engine(batch.numeric[rows], leaf if accumulation == 1 else leaf[rows], batch.keys[rows])
            loss = binary_cross_entropy_with_logits(out, batch.labels[rows])
            engine.backward(loss)
        logits.append(out.detach())
        losses.append(loss.detach())
    assert leaf.grad is not None
    with clock.part("exchange"):
        # A rank's gradient is that of its own mean loss; the objective is the mean over the global batch.
        sparse.backward(embedded, leaf.grad.div_(loss_scale * world_size))
    seen = torch.cat(logits)
    with clock.part("vote"):
        cause = judge(StepTensors(batch, embedded, leaf.grad, losses, seen))
    norm = None
    with clock.part("optimizer"):
        if cause is None:
            norm = gradient_norm(engine) if want_norm else None
            overflow = loss_scale_can_shrink(engine)
            engine.step()
            if not engine.was_step_applied():
                cause = "overflow" if overflow else "gradient"
        else:
            skip_step(engine, overflow=cause == "overflow")
    with clock.part("exchange"):
        if cause is None:
            sparse.apply()
        else:
            sparse.discard()
    if want_norm and norm is None and cause is None:
        norm = engine.get_global_grad_norm()
    return StepResult(seen, None if norm is None else float(norm), cause)


@torch.no_grad()
def predict(engine: Any, sparse: SparseSide, batch: Batch) -> Tensor:
    """Logits [B] of a batch, in evaluation mode."""
    engine.eval()
    return engine(batch.numeric, sparse.forward(batch), batch.keys)
