"""One optimizer step and one prediction: where the sparse and the dense side meet.

The sparse side runs once a step over all of the rank's examples, whatever the gradient accumulation: its output is
cut off as a leaf, the engine takes the micro-batches one by one, and the leaf's gradient then goes back through the
exchange into the tables. So accumulation divides only the dense work, its numbers are exact for every table
optimizer, and tables change only after the dense side has accepted the step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from megarec.data.batch import Batch
from megarec.embeddings.exchange import SparseSide
from megarec.embeddings.group import Distributed
from megarec.training.clock import Clock
from megarec.training.engine import gradient_norm


@dataclass(frozen=True)
class StepResult:
    """What one step leaves for the log.

    Attributes:
        logits: [B] of this rank, before the update.
        gradient_norm: of the dense side before clipping, over all ranks; None when it was not asked for or is not kept.
        applied: False when DeepSpeed skipped the step (overflow, NaN); the tables are then left alone as well.
    """

    logits: Tensor
    gradient_norm: float | None
    applied: bool


def train_step(
    engine: Any,
    sparse: SparseSide,
    batch: Batch,
    *,
    world_size: int,
    clock: Clock,
    ids: Distributed | None = None,
    meanwhile: Callable[[], object] = lambda: None,
    want_norm: bool = False,
) -> StepResult:
    """One optimizer step over the rank's part of the global batch.

    Args:
        batch: B examples of this rank; B x world_size is the global batch.
        ids: those of the batch, where they are with the owners of the tables already.
        meanwhile: called once the embeddings are here and before the dense work (starts the next batch on its way).
        want_norm: return the norm of the dense gradient; at ZeRO 0 in fp32 it costs a pass over the gradients.
    """
    engine.train()
    with clock.part("exchange"):
        embedded = sparse.pool(sparse.distribute(batch) if ids is None else ids)
    meanwhile()
    leaf = embedded.detach().requires_grad_()
    accumulation = engine.gradient_accumulation_steps()
    rows_per_micro = batch.size // accumulation
    logits = []
    norm = None
    loss_scale = float(engine.optimizer.loss_scale) if engine.fp16_enabled() else 1.0
    for micro in range(accumulation):
        rows = slice(micro * rows_per_micro, (micro + 1) * rows_per_micro)
        with clock.part("dense"):
            out = engine(batch.numeric[rows], leaf if accumulation == 1 else leaf[rows], batch.keys[rows])
            engine.backward(binary_cross_entropy_with_logits(out, batch.labels[rows]))
        logits.append(out.detach())
        with clock.part("optimizer"):
            if want_norm and micro == accumulation - 1:
                norm = gradient_norm(engine)
            engine.step()
    applied = bool(engine.was_step_applied())
    if applied:
        assert leaf.grad is not None
        with clock.part("exchange"):
            # A rank's gradient is that of its own mean loss; the objective is the mean over the global batch.
            sparse.update(embedded, leaf.grad.div_(loss_scale * world_size))
    if want_norm and norm is None:
        norm = engine.get_global_grad_norm()
    return StepResult(torch.cat(logits), None if norm is None else float(norm), applied)


@torch.no_grad()
def predict(engine: Any, sparse: SparseSide, batch: Batch) -> Tensor:
    """Logits [B] of a batch, in evaluation mode."""
    engine.eval()
    return engine(batch.numeric, sparse.forward(batch), batch.keys)
