"""The hidden groups of made-up data as a partition, and how near another partition comes to them.

Two partitions agree on a pair of features if both put it together or both part it. The adjusted Rand index (Hubert and
Arabie 1985) counts such pairs and is 1 for the same partition and 0 on average for one drawn at random. Features in no
group are left out of it: wherever they lie is right.
"""

from collections import Counter
from collections.abc import Sequence
from math import comb
from pathlib import Path

import numpy as np

from megarec.data.sources.grouped import GROUPS_FILE, read_groups
from megarec.errors import UserError
from megarec.planning.partition.balanced_kmeans import Assignment, largest_first


def planted_assignment(names: Sequence[str], towers: int, data: str) -> Assignment:
    """[U]: groups whole, the largest first to the smallest tower; then whoever is alone.

    Args:
        names: of the features.
        data: `data.path`.

    Raises:
        UserError: the data have no hidden groups, fewer than towers, or of other features.
    """
    hidden = read_groups(Path(data))
    if hidden is None:
        raise UserError(
            f"--strategy planted: data.path={data!r} holds no {GROUPS_FILE}; only made-up data have hidden groups "
            "(python tools/prepare_data.py grouped)"
        )
    known = {name for group in hidden.groups for name in group} | set(hidden.alone)
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"{Path(data) / GROUPS_FILE}: does not name {unknown[0]}, a feature of the run")
    groups = [[place for place, name in enumerate(names) if name in group] for group in map(set, hidden.groups)]
    groups = [group for group in groups if group]
    if len(groups) < towers:
        raise UserError(f"--strategy planted: --towers {towers}, but the data have {len(groups)} hidden groups")
    grouped = {place for group in groups for place in group}
    blocks = groups + [[place] for place in range(len(names)) if place not in grouped]
    to = largest_first(np.array([float(len(block)) for block in blocks]), towers)
    assignment = np.empty(len(names), dtype=np.int64)
    for block, tower in zip(blocks, to, strict=True):
        assignment[block] = tower
    return assignment


def agreement(partition: Sequence[Sequence[str]], data: str) -> float | None:
    """The adjusted Rand index of a partition with the hidden groups of data; None where the data have none, or none of
    its features."""
    hidden = read_groups(Path(data))
    if hidden is None:
        return None
    group_of = {name: group for group, names in enumerate(hidden.groups) for name in names}
    pairs = [(tower, group_of[name]) for tower, names in enumerate(partition) for name in names if name in group_of]
    return adjusted_rand([tower for tower, _ in pairs], [group for _, group in pairs]) if pairs else None


def adjusted_rand(first: Sequence[int], second: Sequence[int]) -> float:
    """Of two labellings of the same things; 1 where neither parts anything or both part everything."""
    things = list(zip(first, second, strict=True))
    together = _pairs(things)
    of_first, of_second, of_all = _pairs(first), _pairs(second), comb(len(things), 2)
    chance = of_first * of_second / of_all if of_all else 0.0
    most = (of_first + of_second) / 2
    return 1.0 if most == chance else (together - chance) / (most - chance)


def _pairs(labels: Sequence[object]) -> int:
    """Pairs of things with the same label."""
    return sum(comb(count, 2) for count in Counter(labels).values())
