"""What was wrong with a step on one rank, in a line; only called after a fault."""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from megarec.data.batch import Ids
from megarec.sparse.layout import Feature
from megarec.training.faults.policy import RankHealth
from megarec.training.step import StepTensors

FEW = 3
EXTREME = 1e3  # times the median feature's largest element


def diagnose(
    health: RankHealth,
    tensors: StepTensors,
    dense: list[tuple[str, Tensor]],
    numeric: tuple[str, ...],
    shown: bool,
) -> str:
    """Which numbers of this rank are not finite, and how its batch looks; "" where all is well.

    Args:
        health: of this rank.
        dense: sums of the gradients of dense parameters, by name.
        numeric: names of the numeric features.
        shown: whether to show this rank's own numbers; else only its findings on tables.
    """
    found = list(_nonfinite_tensors(health, tensors, dense)) if shown else []
    embeddings = list(embedding_faults(*tensors.lookup.looked_up(tensors.batch)))
    batch = numeric_statistics(tensors.batch.numeric, numeric) if shown else ()
    return "; ".join([*found, *embeddings, *batch])


def _nonfinite_tensors(health: RankHealth, tensors: StepTensors, dense: list[tuple[str, Tensor]]) -> Iterator[str]:
    """The first cause only: what is downstream of it is not finite either."""
    if not health.finite_loss:
        rows = _bad_rows(torch.cat([made.logits for made in tensors.made]).unsqueeze(1))
        where = f", logits of {len(rows)} of {tensors.batch.size} examples, first {rows[0]}" if rows else ""
        yield f"loss is {health.loss}{where}"
    elif not math.isfinite(health.embeddings):
        rows = _bad_rows(torch.cat([made.gradient for made in tensors.made]))
        yield f"gradient of the embeddings is not finite in {len(rows)} of {tensors.batch.size} examples"
    elif not math.isfinite(health.dense):
        names = dict.fromkeys(name for name, total in dense if not total.isfinite())
        yield f"gradient of {shortened(list(names))} is not finite"
    elif not math.isfinite(health.towers):
        names = dict.fromkeys(
            name for name, gradient in tensors.lookup.gradients().items() if not gradient.sum().isfinite()
        )
        yield f"gradient of {shortened(list(names))} (tower modules) is not finite"


def embedding_faults(values: Tensor, features: tuple[Feature, ...], ids: Mapping[str, Ids]) -> Iterator[str]:
    """Features whose embeddings are not finite, or extreme, each with the ids of an example.

    Args:
        values: [examples, columns]; the rest as of `SparseSide.looked_up`.
    """
    largest = {f.name: float(values[:, f.start : f.start + f.columns].abs().max()) for f in features}
    usual = sorted(value for value in largest.values() if math.isfinite(value))
    bound = EXTREME * max(usual[len(usual) // 2], 1e-3) if usual else math.inf
    bad = sorted((f for f in features if not largest[f.name] <= bound), key=lambda f: math.isfinite(largest[f.name]))
    for feature in bad[:FEW]:
        part = values[:, feature.start : feature.start + feature.columns]
        rows = (~(part.abs() <= bound).all(dim=1)).nonzero().flatten().tolist()
        kind = "not finite" if not math.isfinite(largest[feature.name]) else f"as large as {largest[feature.name]:.3g}"
        yield (
            f"embeddings of feature {feature.name} are {kind} in {len(rows)} examples, e.g. id "
            f"{shortened([str(i) for i in ids_of(ids[feature.name], rows[0])])} of table {feature.table}"
        )
    if len(bad) > FEW:
        yield f"and of {len(bad) - FEW} more features"


def ids_of(ids: Ids, row: int) -> list[int]:
    """The ids of one example."""
    if ids.lengths is None:
        return [int(ids.values[row])]
    start = int(ids.lengths[:row].sum())
    return [int(value) for value in ids.values[start : start + int(ids.lengths[row])]]


def numeric_statistics(numeric: Tensor, names: tuple[str, ...]) -> Iterator[str]:
    """The numeric feature with the most numbers that are not finite, else with the largest one."""
    if not names:
        return
    finite = numeric.isfinite()
    known = numeric.where(finite, 0.0).double()
    bad = (~finite).sum(dim=0)
    worst = int(bad.argmax() if bad.any() else known.abs().amax(dim=0).argmax())
    column = known[:, worst][finite[:, worst]]
    seen = f"min {column.min():.3g}, max {column.max():.3g}, mean {column.mean():.3g}" if len(column) else "none is"
    yield (
        f"numeric features: {int(bad.sum())} numbers are not finite; worst {names[worst]}: {int(bad[worst])} not "
        f"finite, {seen}"
    )


def shortened(names: list[str]) -> str:
    more = f" and {len(names) - FEW} more" if len(names) > FEW else ""
    return ", ".join(names[:FEW]) + more


def _bad_rows(values: Tensor) -> list[int]:
    bad: list[int] = (~values.isfinite().all(dim=1)).nonzero().flatten().tolist()
    return bad
