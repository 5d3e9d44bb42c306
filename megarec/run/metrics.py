"""Quality of predictions: AUC, LogLoss, normalized entropy, calibration, by group GAUC, NDCG and HR; over all ranks.

Of several labels each has its own, over the examples that have the label; examples are not weighted.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from megarec.metrics.grouped import FIRST, Grouped, group_scores, known, over_groups

_NESTED = ("gauc", "ndcg", "hit_rate", "labels")  # of a Quality; its other attributes are numbers


@dataclass(frozen=True)
class Gauc:
    """AUC inside groups, where the data name one.

    Attributes:
        by_impressions, by_group: mean of the groups' AUC, weighted by their examples and with equal weights ("user
            mean"); NaN where no group has both labels.
        groups: how many there are; `one_label` of them have no AUC and are left out.
    """

    by_impressions: float
    by_group: float
    groups: int
    one_label: int


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
        gauc: by the column that the data name as group; None: they name none.
        ndcg, hit_rate: by k, the mean over the same groups that have a positive; empty: the data name no group.
        labels: of several labels the quality of each, by name; the numbers above are those of train.best_label.
    """

    auc: float
    logloss: float
    ne: float
    calibration: float
    prediction_mean: float
    examples: int
    not_finite: int = 0
    gauc: Gauc | None = None
    ndcg: dict[int, float] = field(default_factory=dict)
    hit_rate: dict[int, float] = field(default_factory=dict)
    labels: dict[str, "Quality"] = field(default_factory=dict)

    @property
    def auc_minus_logloss(self) -> float:
        """What FuxiCTR's recipes watch."""
        return self.auc - self.logloss


def described(found: Quality) -> dict[str, Any]:
    """As JSON can say it: an undefined metric is null; `not_finite` is there where it is the reason."""
    numbers = {key: value for key, value in vars(found).items() if key not in _NESTED}
    values: dict[str, Any] = {key: known(value) for key, value in numbers.items()}
    if not found.not_finite:
        del values["not_finite"]
    if found.gauc is not None:
        values["gauc"] = {key: known(value) for key, value in asdict(found.gauc).items()}
    for name, by_k in (("ndcg", found.ndcg), ("hit_rate", found.hit_rate)):
        if by_k:
            values[name] = {str(k): known(value) for k, value in by_k.items()}
    if found.labels:
        values["labels"] = {name: described(own) for name, own in found.labels.items()}
    return values


def points(found: Quality) -> dict[str, float | None]:
    """As TensorBoard draws it: metrics alone, by name."""
    names = ("auc", "logloss", "ne", "calibration", "prediction_mean")
    values = {name: getattr(found, name) for name in names}
    if found.gauc is not None:
        values |= {"gauc_by_impressions": found.gauc.by_impressions, "gauc_by_group": found.gauc.by_group}
    values |= {f"ndcg_at_{k}": value for k, value in found.ndcg.items()}  # TensorBoard has no @ in a name
    values |= {f"hit_rate_at_{k}": value for k, value in found.hit_rate.items()}
    shown = {name: known(value) for name, value in values.items()}
    for label, own in found.labels.items():
        shown |= {f"labels/{label}/{name}": value for name, value in points(own).items()}
    return shown


def in_words(found: Quality) -> str:
    """As a log line shows it."""
    if found.labels:
        return "  |  ".join(f"{name}: {in_words(own)}" for name, own in found.labels.items())
    if found.not_finite:
        return f"no metrics: {found.not_finite:,} of {found.examples:,} logits are NaN or infinite"
    words = f"AUC {found.auc:.4f}  LogLoss {found.logloss:.4f}  NE {found.ne:.4f}  calibration {found.calibration:.3f}"
    if found.gauc is None:
        return words
    return f"{words}  GAUC {found.gauc.by_impressions:.4f} by impressions, {found.gauc.by_group:.4f} by group"


def why_undefined(found: Quality, metric: Literal["logloss", "auc", "auc_minus_logloss"]) -> str | None:
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
    scores, labels = logits.detach().cpu(), labels.detach().cpu().double()
    logits = scores.double()
    positives = float(labels.sum())
    logloss = float(binary_cross_entropy_with_logits(logits, labels))
    predicted = float(logits.sigmoid().sum())
    calibration, mean = predicted / positives if positives else math.nan, predicted / examples
    rate = positives / examples
    if not 0 < rate < 1:
        return Quality(math.nan, logloss, math.nan, calibration, mean, examples)
    entropy = -rate * math.log(rate) - (1 - rate) * math.log(1 - rate)
    # Logits, not probabilities: a sigmoid saturates and would tie different logits.
    auc = float(group_scores(scores.numpy(), labels.numpy(), np.zeros(examples, np.int32)).auc[0])
    return Quality(auc, logloss, logloss / entropy, calibration, mean, examples)


@dataclass
class Predictions:
    """Logits and labels of this rank since the last `gather`, [B] each or of several labels [B, T]; every rank adds the
    same number of equal batches.

    Attributes:
        names: of several labels, in order.
        main: the one that represents all (train.best_label); None: the first.
    """

    names: tuple[str, ...] = ()
    main: str | None = None
    logits: list[Tensor] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)

    def add(self, logits: Tensor, labels: Tensor, valid: int | None = None, left_out: Sequence[str] = ()) -> None:
        """Take in a batch; examples from `valid` on are padding and do not count, nor do labels that are left out."""
        labels = labels.detach().float().clone()
        if valid is not None:
            labels[valid:] = math.nan
        if places := [self.names.index(name) for name in left_out]:
            labels[:, places] = math.nan
            logits = logits.index_fill(1, torch.tensor(places, device=logits.device), 0.0)
        self.logits.append(logits.detach().float())
        self.labels.append(labels)

    def clear(self) -> None:
        self.logits.clear()
        self.labels.clear()

    def packed(self) -> Tensor:
        """Logits and labels, [2, N], or of several labels [2 T, N]: all logits, then all labels."""
        both = torch.stack([torch.cat(self.logits), torch.cat(self.labels)])
        return both if both.dim() == 2 else both.permute(0, 2, 1).reshape(-1, both.shape[1])

    def unpack(self, packed: Tensor) -> None:
        """Take in what `packed` made."""
        logits, labels = packed.chunk(2)
        for mine, found in ((self.logits, logits), (self.labels, labels)):
            mine.append(found[0] if len(found) == 1 else found.T.contiguous())

    def gather(self, world: dist.ProcessGroup | None, groups: NDArray[Any] | None = None) -> Quality:
        """Metrics over all ranks, computed by rank 0, the same on each of them; forgets the predictions.

        Args:
            groups: of rank 0: what group each row of the split belongs to, whole numbers [examples], -1: none; for the
                GAUC, NDCG and HR of batches that an EvalLoader made. None: without them.
        """
        if not self.logits:
            return self.of_labels([quality(torch.empty(0), torch.empty(0))] * max(1, len(self.names)))
        share, mine = len(self.logits[0]), self.packed()
        self.clear()
        labels = len(mine) // 2
        if world is None:
            return self.of_labels([_quality_of([mine[k::labels]], share, groups) for k in range(labels)])
        first = dist.get_rank(world) == 0
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(world))] if first else None
        dist.gather(mine, everyone, group=world, group_dst=0)
        found = torch.zeros(labels, _NUMBERS, dtype=torch.float64, device=mine.device)
        if everyone is not None:
            of_label = [[rank[label::labels] for rank in everyone] for label in range(labels)]
            numbers = [_numbers(_quality_of(ranks, share, groups)) for ranks in of_label]
            found.copy_(torch.tensor(numbers, dtype=torch.float64))
        dist.broadcast(found, group=world, group_src=0)
        return self.of_labels([_from_numbers(numbers) for numbers in found.tolist()])

    def of_labels(self, found: Sequence[Quality]) -> Quality:
        """The quality of all labels, as that of the main one; of one label alone its own."""
        if len(found) == 1:
            return found[0]
        by_name = dict(zip(self.names, found, strict=True))
        return replace(by_name[self.main or self.names[0]], labels=by_name)


_OWN = 7  # numbers of a Quality that are there with groups or without
_NUMBERS = _OWN + len(fields(Gauc)) + 2 + 1


def _numbers(found: Quality) -> list[float]:
    """Of fixed length, the last whether there are metrics by group."""
    numbers = [float(value) for name, value in vars(found).items() if name not in _NESTED]
    if found.gauc is None:
        return [*numbers, *(0.0,) * (_NUMBERS - _OWN)]
    return [*numbers, *astuple(found.gauc), found.ndcg[FIRST], found.hit_rate[FIRST], 1.0]


def _from_numbers(numbers: list[float]) -> Quality:
    auc, logloss, ne, calibration, mean, examples, not_finite = numbers[:_OWN]
    found = Quality(auc, logloss, ne, calibration, mean, int(examples), int(not_finite))
    by_impressions, by_group, groups, one_label, ndcg, hit_rate, has = numbers[_OWN:]
    if not has:
        return found
    gauc = Gauc(by_impressions, by_group, int(groups), int(one_label))
    return replace(found, gauc=gauc, ndcg={FIRST: ndcg}, hit_rate={FIRST: hit_rate})


def _quality_of(ranks: list[Tensor], share: int, groups: NDArray[Any] | None) -> Quality:
    """Metrics of logits and labels [2, N] of every rank, padding and missing labels left out.

    Args:
        share: rows of a batch.
        groups: in the order of the split, which is by batch, then by rank.
    """
    logits, labels = torch.cat(ranks, dim=1).cpu()
    counted = ~labels.isnan()
    found = quality(logits[counted], labels[counted])
    if groups is None:
        return found
    in_order = torch.stack(ranks).cpu().view(len(ranks), 2, -1, share).permute(1, 2, 0, 3).reshape(2, -1)
    logits, labels = in_order[:, : len(groups)]  # padding comes last
    there = ~labels.isnan()
    own = groups[there.numpy()]
    return with_groups(found, over_groups_of(logits[there].numpy(), labels[there].numpy(), own, (FIRST,)))


def over_groups_of(
    logits: NDArray[np.float32], labels: NDArray[Any], groups: NDArray[Any], ks: tuple[int, ...] = ()
) -> Grouped:
    """Metrics of groups; undefined if some logit is not finite, and all groups count."""
    assert len(logits) == len(groups), f"{len(logits)} predictions and {len(groups)} rows with a group"
    finite = bool(np.isfinite(logits).all())
    found = over_groups(group_scores(logits if finite else np.zeros_like(logits), labels, groups, ks))
    if finite:
        return found
    undefined = dict.fromkeys(ks, math.nan)
    return replace(
        found, gauc_by_impressions=math.nan, gauc_by_group=math.nan, ndcg=undefined, hit_rate=dict(undefined)
    )


def with_groups(found: Quality, grouped: Grouped) -> Quality:
    """The same predictions, with their metrics by group."""
    gauc = Gauc(grouped.gauc_by_impressions, grouped.gauc_by_group, grouped.groups, grouped.one_label)
    return replace(found, gauc=gauc, ndcg=grouped.ndcg, hit_rate=grouped.hit_rate)
