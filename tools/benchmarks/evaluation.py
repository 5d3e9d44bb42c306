"""Metrics by group and draws of the bootstrap, of ten million made-up rows in 200,000 groups.

    python tools/bench.py evaluation

Seconds, of the wall and of the processor, of GAUC and of GAUC with NDCG@10 and HR@10, of one draw of the bootstrap by
group and by example, and the peak memory of the whole process, rows included. Beside them scikit-learn, group by group,
on a part of the groups, in the same run; `of_scikit_learn` is its processor time for all groups, as extrapolated, over
ours.
"""

import resource
import time
from typing import Any

import numpy as np

from megarec.metrics.bootstrap import ScoredRows, intervals
from megarec.metrics.grouped import group_scores, over_groups
from megarec.metrics.weighted import WeightedRows

ROWS, GROUPS = 10_000_000, 200_000
SAMPLE = 500  # groups that scikit-learn is given
DRAWS = 2


def run(rows: int = ROWS, groups: int = GROUPS, sample: int = SAMPLE) -> dict[str, Any]:
    """Seconds, and the peak in MiB up to each."""
    draw = np.random.default_rng(0)
    of_row = draw.integers(0, groups, rows, dtype=np.int32)
    logits = draw.standard_normal(rows, dtype=np.float32)
    labels = (draw.random(rows, dtype=np.float32) < 0.2).astype(np.float32)
    found: list[dict[str, Any]] = []

    def note(what: str, started: tuple[float, float], times: int = 1) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        seconds, busy = ((now - then) / times for now, then in zip(_clocks(), started, strict=True))
        found.append({"what": what, "seconds": seconds, "cpu_seconds": busy, "peak_mib": peak})

    started = _clocks()
    over_groups(group_scores(logits, labels, of_row))
    note("gauc", started)
    started = _clocks()
    scores = group_scores(logits, labels, of_row, (10,))
    over_groups(scores)
    note("gauc_ndcg_hr", started)

    started = _clocks()
    scored = ScoredRows(WeightedRows(logits, labels), scores, of_row)
    note("sorted for draws", started)
    started = _clocks()
    intervals(ScoredRows(scored.rows), DRAWS, seed=0)
    note("draw by example", started, DRAWS)
    few = ScoredRows(WeightedRows(logits[:1], labels[:1]), scores, of_row)
    started = _clocks()
    intervals(few, DRAWS, seed=0)
    note("draw by group", started, DRAWS)

    import sklearn.metrics  # noqa: F401  not part of the time

    started = _clocks()
    largest = _scikit_learn(logits, labels, of_row, sample, scores.auc)
    seconds = (_clocks()[1] - started[1]) / sample * groups
    ours = next(row["cpu_seconds"] for row in found if row["what"] == "gauc_ndcg_hr")
    return {
        "name": "evaluation",
        "rows": found,
        "ratios": {"of_scikit_learn": seconds / ours, "largest_difference_of_auc": largest},
        "aims": {"largest_difference_of_auc": "<= 1e-12"},
    }


def _clocks() -> tuple[float, float]:
    """Of the wall, and of the time that this process had a core."""
    return time.perf_counter(), time.process_time()


def _scikit_learn(logits: Any, labels: Any, of_row: Any, sample: int, aucs: Any) -> float:
    """The largest difference of an AUC of the first groups from ours."""
    from sklearn.metrics import ndcg_score, roc_auc_score

    first = np.flatnonzero(of_row < sample)
    largest = 0.0
    for group in range(sample):
        own = first[of_row[first] == group]
        x, y = logits[own], labels[own]
        if 0 < y.sum() < len(y):
            largest = max(largest, abs(float(roc_auc_score(y, x)) - float(aucs[group])))
            ndcg_score(y[None], x[None], k=10)
    return largest
