"""Permutation importance (Breiman 2001): what a model loses when the values of one feature are permuted among rows.

The model is not trained again, so a feature whose duplicate stays in place may seem worth little.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from megarec.data.batch import Batch
from megarec.data.loader import example_keys
from megarec.data.store import Store
from megarec.metrics.bootstrap import Interval
from megarec.metrics.grouped import group_scores, known
from megarec.metrics.weighted import losses_of
from megarec.serving.predictor import BatchModel

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Lost:
    """By permuting, over the repeats.

    Attributes:
        interval: of the mean, 95 %, by Student's t; it says what another permutation would change, not what other rows
            would. NaN where there is one repeat.
    """

    mean: float
    interval: Interval

    def described(self) -> dict[str, Any]:
        """As JSON can say it."""
        return {"mean": known(self.mean), "interval": [known(self.interval.low), known(self.interval.high)]}


@dataclass(frozen=True)
class Importance:
    """Of one feature.

    Attributes:
        auc: lost; above 0: the model needs the feature.
        logloss: by how much it grew, in nats.
    """

    feature: str
    auc: Lost
    logloss: Lost


@dataclass(frozen=True)
class Importances:
    """Of all features of a model, for one of its labels.

    Attributes:
        examples: that were scored and have the label.
        auc, logloss: with every value in its place.
        features: by falling growth of the LogLoss.
    """

    examples: int
    repeats: int
    auc: float
    logloss: float
    features: list[Importance]


def importances(
    model: BatchModel, store: Store, device: torch.device, *, repeats: int, most: int, batch_size: int, seed: int
) -> dict[str, Importances]:
    """Score rows with one feature after the other permuted; a repeat uses the same permutation for all features.

    Returns:
        By label that the model predicts, over the rows that have it.

    Args:
        store: of the model's features.
        repeats: at least 1.
        most: rows that are scored; of more, that many are drawn.
    """
    generator = np.random.default_rng([seed, 17])
    rows = np.arange(len(store), dtype=np.int64)
    if len(rows) > most:
        rows = np.sort(generator.choice(len(rows), most, replace=False))
    names = [*(feature.name for feature in model.schema.categorical), *model.schema.numeric]
    labels = model.schema.predicted
    lost = {label: np.empty((repeats, len(names), 2)) for label in labels}
    base = dict.fromkeys(labels, (math.nan, math.nan))
    for repeat in range(repeats):
        places = generator.permutation(len(rows))
        logits = np.empty((len(names), len(labels), len(rows)), np.float32)
        true, wanted = np.empty((2, len(labels), len(rows)), np.float32)
        for start in range(0, len(rows), batch_size):
            part = slice(start, start + batch_size)
            batch, others = (_read(store, own, seed, device) for own in (rows[part], rows[places[part]]))
            wanted[:, part] = _by_label(batch.labels)
            if repeat == 0:
                true[:, part] = _by_label(model.predict(batch))
            for place, changed in enumerate(_each_permuted(batch, others, names)):
                logits[place, :, part] = _by_label(model.predict(changed))
        for number, label in enumerate(labels):
            if repeat == 0:
                base[label] = _metrics(true[number], wanted[number])
            for place, own in enumerate(logits[:, number]):
                auc, logloss = _metrics(own, wanted[number])
                lost[label][repeat, place] = base[label][0] - auc, logloss - base[label][1]
    examples = np.isfinite(wanted).sum(axis=1)
    return {
        label: Importances(int(own), repeats, *base[label], _by_growth(names, lost[label]))
        for label, own in zip(labels, examples, strict=True)
    }


def _by_growth(names: list[str], lost: NDArray[np.float64]) -> list[Importance]:
    """Of what every repeat lost [repeats, features, AUC and LogLoss]; where it is undefined, last."""
    found = [
        Importance(name, *(_lost(lost[:, place, metric]) for metric in (0, 1))) for place, name in enumerate(names)
    ]
    return sorted(found, key=lambda own: (math.isnan(own.logloss.mean), -own.logloss.mean))


def _read(store: Store, rows: NDArray[np.int64], seed: int, device: torch.device) -> Batch:
    return store.read(rows, example_keys(rows, seed, 0), len(rows), pinned=False).to(device)


def _each_permuted(batch: Batch, others: Batch, names: list[str]) -> Iterator[Batch]:
    """The batch with the values of one feature from the other rows: weights and lengths go with the ids."""
    for place, name in enumerate(names):
        if name in batch.ids:
            ids = {**batch.ids, name: others.ids[name]}
            yield dataclasses.replace(batch, ids=ids, buffer=None)
        else:
            numeric, column = batch.numeric.clone(), place - len(batch.ids)
            numeric[:, column] = others.numeric[:, column]
            yield dataclasses.replace(batch, numeric=numeric, buffer=None)


def _by_label(values: Tensor) -> Floats:
    """[labels, B] of [B] or, of several labels, [B, labels]."""
    found: Floats = values.float().cpu().reshape(len(values), -1).T.numpy()
    return found


def _metrics(logits: Floats, labels: Floats) -> tuple[float, float]:
    """AUC and LogLoss of the rows that have the label; NaN where a logit is not finite."""
    there = np.isfinite(labels)
    logits, labels = logits[there], labels[there]
    if not np.isfinite(logits).all():
        return math.nan, math.nan
    if not len(logits):
        return math.nan, math.nan
    auc = group_scores(logits, labels, np.zeros(len(logits), np.int32)).auc
    return float(auc[0]), float(losses_of(logits, labels).mean())


def _lost(values: NDArray[np.float64]) -> Lost:
    mean = float(values.mean())
    if len(values) < 2 or math.isnan(mean):
        return Lost(mean, Interval(math.nan, math.nan))
    half = float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return Lost(mean, Interval(mean - half, mean + half))
