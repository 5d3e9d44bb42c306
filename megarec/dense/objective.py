"""The loss of a backward pass: the mean over a rank's examples, for several labels too.

    total = sum over labels k of v_k / B sum over examples i of w_i [label known] BCE(logit_ik, label_ik)

v_k are train.label_weights, w_i the data's weight column where data.weighted. The divisor is the number of examples,
known or not: an example's weight depends on no other one, so that every rank's mean over its own examples, and
every micro-batch's, averages to that of the global batch without a message.

Of several labels, one whose loss is not finite on some rank is left out on all of them: each rank sends the others
which of its losses are finite, one message of T numbers a micro-batch, for which no host waits. What is left out adds
nothing to the total and, through the model's switch (models/multi_task.py), nothing to any gradient. If no label is
left, the loss is NaN, and the step check (training/faults) sees a faulty step.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from megarec.config.sections import RunConfig
from megarec.data.batch import Batch
from megarec.distributed.collectives import Channel, all_gather_rows
from megarec.models.multi_task import TaskHeads


class Losses(NamedTuple):
    """Of a micro-batch.

    Attributes:
        total: the loss of the backward pass.
        finite: float32 [T], 1 where the label's loss is finite on this rank, else 0; None: of one label.
    """

    total: Tensor
    finite: Tensor | None = None


def label_losses(logits_BT: Tensor, labels_BT: Tensor, weights_B: Tensor | None) -> Tensor:
    """The mean over the examples, by label: [T]. A label that is NaN is missing: it counts as 0."""
    known = labels_BT.isfinite()
    # A missing label must not be multiplied by 0: that would keep a NaN.
    each_BT = binary_cross_entropy_with_logits(
        logits_BT.where(known, 0.0), labels_BT.where(known, 0.0), reduction="none"
    )
    each_BT = each_BT.where(known, 0.0)
    return (each_BT if weights_B is None else each_BT * weights_B.unsqueeze(1)).mean(0)


class Objective:
    """The loss of a run.

    Args:
        weights: by label.
        smoothing: e of train.label_smoothing; the loss has the labels y (1 - e) + e / 2.
        heads: of several labels; None: of one.
        world: all ranks.
    """

    def __init__(self, weights: Sequence[float], smoothing: float, heads: TaskHeads | None, world: Channel) -> None:
        self._weights, self._heads, self._world = torch.tensor(weights), heads, world
        self._smoothing = smoothing
        if heads is not None:
            for task, parameter in heads.own_parameters():
                parameter.register_hook(partial(heads.switch.of_parameter, task=task))

    def __call__(self, logits: Tensor, batch: Batch, rows: slice) -> Losses:
        """Of these rows of a batch, whose logits are [rows] or [rows, T]; collective where labels are several."""
        labels = batch.labels[rows]
        if self._smoothing:
            labels = labels.lerp(labels.new_full((), 0.5), self._smoothing)
        if self._heads is None and batch.weights is None and not batch.some_missing:
            return Losses(binary_cross_entropy_with_logits(logits, labels))
        weights = None if batch.weights is None else batch.weights[rows]
        if self._heads is None:
            return Losses(label_losses(logits.unsqueeze(1), labels.unsqueeze(1), weights)[0])
        losses = label_losses(logits, labels, weights)
        finite = losses.detach().isfinite().float()
        kept = all_gather_rows(finite.unsqueeze(0), self._world, "labels").wait().amin(0) > 0
        self._heads.switch.kept = kept
        if self._weights.device != losses.device:
            self._weights = self._weights.to(losses.device)
        total = (losses * self._weights).where(kept, 0.0).sum()
        return Losses(total.where(kept.any(), torch.nan), finite)


def objective(model: nn.Module, config: RunConfig, world: Channel) -> Objective:
    """The loss of a run's config; called after everything that replaces parameters of the model."""
    heads = getattr(model, "tasks", None)
    labels = config.data.label if isinstance(config.data.label, list) else []
    weights = [config.train.label_weights.get(label, 1.0) for label in labels]
    return Objective(weights, config.train.label_smoothing, heads, world)
