"""What TensorBoard shows besides points: the charts of the tab Custom scalars and the row of HParams.

A chart has one tag, so that two runs in it are two curves.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from megarec.metrics.grouped import FIRST
from megarec.run.build import Run

_SECTIONS = ("model", "embedding", "dense", "tower_module", "schedule", "parallel")
_CATEGORIES = {
    "Optimization": "train/",
    "Milliseconds a step": "workload/time_ms/",
    "Memory, MiB": "workload/memory_mib/",
    "Traffic, MiB sent a step": "workload/traffic_mib_per_step/",
    "Use of the tables": "workload/rows_used/",
    "Speed": "workload/",
}
_LONG = ("embedding.features", "parallel.towers")  # a key a feature: not what two runs are compared by
_QUALITY = ("logloss", "ne", "auc", "calibration", "prediction_mean")
_BY_GROUP = ("gauc_by_impressions", "gauc_by_group", f"ndcg_at_{FIRST}", f"hit_rate_at_{FIRST}")
"""Of validation and test, where the data name a group."""


Layout = dict[str, dict[str, list[str | list[str]]]]


def layout(tags: Sequence[str], grouped: bool = False, labels: Sequence[str] = ()) -> Layout:
    """Categories of charts, quality first, each split beside the others; one tag a chart.

    Args:
        tags: that the run writes, except those of validation and test, which come later.
        grouped: the data name a group, so that validation and test have metrics by group.
        labels: where a run predicts several, whose points are there by label as well.
    """
    quality = []
    for label in ("", *(f"labels/{name}/" for name in labels)):
        quality += [f"{split}/{label}{name}" for name in _QUALITY for split in ("train", "valid", "test")]
        quality += [f"{split}/{label}{name}" for name in _BY_GROUP for split in ("valid", "test") if grouped]
    groups: dict[str, list[str]] = {"Quality": quality, **{category: [] for category in _CATEGORIES}}
    for tag in tags:
        if tag not in quality:
            groups[next(category for category, start in _CATEGORIES.items() if tag.startswith(start))].append(tag)
    return {
        category: {tag: ["Multiline", [f"^{re.escape(tag) if 'labels/' in tag else tag}$"]] for tag in found}
        for category, found in groups.items()
        if found
    }


def hyper_parameters(run: Run) -> dict[str, bool | int | float | str]:
    """The HParams of a run: sizes, rates, schedule, batch, seed, topology, cost; by "<section>.<key>"."""
    config = run.config.model_dump(mode="json")
    found: dict[str, bool | int | float | str] = {
        "data": run.schema.name,
        "data.batch_size": run.config.data.batch_size,
        "train.seed": run.config.train.seed,
        "train.epochs": run.config.train.epochs,
        "deepspeed.zero_stage": run.dense.zero_stage,
        "ranks": run.topology.world_size,
        "hosts": run.topology.hosts,
        "gflop_per_example": run.spec.cost.flop / 1e9,
        "dense_parameters": run.spec.cost.dense_parameters,
        "sparse_parameters": run.spec.cost.sparse_parameters,
    }
    for section in _SECTIONS:
        found.update(_flat(section, config[section]))
    return {key: value for key, value in found.items() if not key.startswith(_LONG)}


def _flat(key: str, value: Any) -> dict[str, bool | int | float | str]:
    """Leaves by their path; null and empty ones are left out, a list is its JSON."""
    if isinstance(value, dict):
        return {name: leaf for part, inner in value.items() for name, leaf in _flat(f"{key}.{part}", inner).items()}
    if value is None or value == []:
        return {}
    return {key: value if isinstance(value, bool | int | float | str) else json.dumps(value)}
