"""Quality of predictions: AUC, LogLoss, normalized entropy, calibration; exact over all ranks."""

import math
from dataclasses import asdict, astuple, dataclass, field, fields
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits


@dataclass(frozen=True)
class Quality:
    """Metrics of a set of predictions.

    Attributes:
        auc: area under the ROC curve, exact (no binning); NaN when one class is absent.
        logloss: mean binary cross-entropy in nats.
        ne: normalized entropy, logloss over the entropy of the set's own positive rate (He et al. 2014); NaN likewise.
        calibration: sum of predicted probabilities over the number of positives; NaN without positives.
        prediction_mean: of the predicted probabilities; NaN without predictions.
        examples: how many predictions.
        not_finite: how many logits are NaN or infinite. A single one leaves every metric undefined: it has no place in
            an order, and a mean without it would be of another model.
    """

    auc: float
    logloss: float
    ne: float
    calibration: float
    prediction_mean: float
    examples: int
    not_finite: int = 0


def described(found: Quality) -> dict[str, float | None]:
    """As JSON can say it: an undefined metric is null; `not_finite` is there where it is the reason."""
    known = {key: None if math.isnan(value) else value for key, value in asdict(found).items()}
    return known if found.not_finite else {key: value for key, value in known.items() if key != "not_finite"}


def in_words(found: Quality) -> str:
    """As a log line shows it."""
    if found.not_finite:
        return f"no metrics: {found.not_finite:,} of {found.examples:,} logits are NaN or infinite"
    return f"AUC {found.auc:.4f}  LogLoss {found.logloss:.4f}  NE {found.ne:.4f}  calibration {found.calibration:.3f}"


def why_undefined(found: Quality, metric: Literal["logloss", "auc"]) -> str | None:
    """Why a set of predictions has no such metric; None: it has one."""
    if math.isfinite(getattr(found, metric)):
        return None
    if not found.examples:
        return "it has no examples"
    if found.not_finite:
        return f"{found.not_finite:,} of {found.examples:,} logits are NaN or infinite"
    return f"all {found.examples:,} examples have one label, so there is no {metric.upper()}"


def quality(logits: Tensor, labels: Tensor) -> Quality:
    """Metrics of logits [N] against labels [N] in {0, 1}, computed in float64."""
    examples = labels.numel()
    not_finite = examples - int(logits.isfinite().sum())
    if examples == 0 or not_finite:
        return Quality(math.nan, math.nan, math.nan, math.nan, math.nan, examples, not_finite)
    logits, labels = logits.double(), labels.double()
    positives = float(labels.sum())
    logloss = float(binary_cross_entropy_with_logits(logits, labels))
    predicted = float(logits.sigmoid().sum())
    calibration, mean = predicted / positives if positives else math.nan, predicted / examples
    rate = positives / examples
    if not 0 < rate < 1:
        return Quality(math.nan, logloss, math.nan, calibration, mean, examples)
    entropy = -rate * math.log(rate) - (1 - rate) * math.log(1 - rate)
    from torchmetrics.functional.classification import binary_auroc  # seconds to load, on the rank that needs it

    # Logits, not probabilities: a sigmoid saturates and would tie what the model told apart. torchmetrics maps
    # values outside [0, 1] through a sigmoid, so hand it ranks in [0, 1] instead: the AUC depends on order alone.
    _, order = torch.unique(logits, return_inverse=True)
    auc = float(binary_auroc(order.double() / max(1, int(order.max())), labels.long()))
    return Quality(auc, logloss, logloss / entropy, calibration, mean, examples)


@dataclass
class Predictions:
    """Logits and labels of this rank since the last `gather`; every rank adds the same number of equal batches."""

    logits: list[Tensor] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)

    def add(self, logits: Tensor, labels: Tensor, valid: int | None = None) -> None:
        """Take in a batch [B]; examples from `valid` on are padding and do not count."""
        labels = labels.detach().float().clone()
        if valid is not None:
            labels[valid:] = math.nan
        self.logits.append(logits.detach().float())
        self.labels.append(labels)

    def clear(self) -> None:
        self.logits.clear()
        self.labels.clear()

    def gather(self, world: dist.ProcessGroup | None) -> Quality:
        """Metrics over all ranks, computed by rank 0, the same on each of them; forgets the predictions."""
        if not self.logits:
            return quality(torch.empty(0), torch.empty(0))
        mine = torch.stack([torch.cat(self.logits), torch.cat(self.labels)])
        self.clear()
        if world is None:
            return _quality_of([mine])
        first = dist.get_rank(world) == 0
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(world))] if first else None
        dist.gather(mine, everyone, group=world, group_dst=0)
        found = torch.zeros(len(fields(Quality)), dtype=torch.float64, device=mine.device)
        if everyone is not None:
            found.copy_(torch.tensor(astuple(_quality_of(everyone)), dtype=torch.float64))
        dist.broadcast(found, group=world, group_src=0)
        auc, logloss, ne, calibration, mean, examples, not_finite = found.tolist()
        return Quality(auc, logloss, ne, calibration, mean, int(examples), int(not_finite))


def _quality_of(ranks: list[Tensor]) -> Quality:
    """Metrics of logits and labels [2, N] of every rank, padding left out."""
    logits, labels = torch.cat(ranks, dim=1).cpu()
    counted = ~labels.isnan()
    return quality(logits[counted], labels[counted])
