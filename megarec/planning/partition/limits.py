"""How much a tower may cost, and what to do when features are too coarse for it.

`--balance R`: bytes, lookups and module FLOPs of every tower, each by itself, are at most R x their mean over the
towers; FLOPs by the embeddings that enter a module: as many as make it cost at most R x the mean of all modules while
the other towers share the rest evenly (modules may cost more than in proportion).

Left out: R = 1.1, but where the most even assignment that was found cannot keep that (one list feature with most of
the lookups, five features for four towers), 1.1 x what that one reaches.

All loads and limits are in multiples of a tower's mean, in the order bytes, lookups, embeddings.

Costs are by table, as features that share a table move together:

bytes       of the table with its optimizer state
lookups     rows read an example: the mean list length of each feature that uses the table
flop        training FLOPs an example of the tower's module (run/cost.py); 0 without modules. A module's cost is no
            sum over features, so that what is balanced is the embeddings that enter it (see limits.py)
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megarec.config.sections import RunConfig
from megarec.config.towers import IdentityTowerConfig
from megarec.data.store import Store
from megarec.errors import UserError
from megarec.planning.partition.balanced_kmeans import Assignment, Floats, even_assignment, fits, loads_of
from megarec.run.cost import count_towers
from megarec.sparse.layout import EmbeddingLayout
from megarec.sparse.placement import Shard
from megarec.sparse.towers.sizes import module_sizes

KINDS = ("bytes", "lookups", "flop")
SAMPLED_ROWS = 8_192  # of the training data, for list lengths
SLACK = 1.1
GIB = 2**30


@dataclass(frozen=True)
class Units:
    """What moves as one: tables, in layout order, each with its features.

    Attributes:
        features: by unit, places of its features in the layout.
        bytes, lookups: [U].
        embeddings: [U], how many of width `model.dim` enter a tower module; all 0 without modules.
    """

    tables: tuple[str, ...]
    features: tuple[tuple[int, ...], ...]
    bytes: Floats
    lookups: Floats
    embeddings: Floats

    def __len__(self) -> int:
        return len(self.tables)

    def of_features(self, assignment: Assignment) -> Assignment:
        """[F]: the tower of every feature, from that of every unit."""
        towers = np.empty(sum(map(len, self.features)), dtype=np.int64)
        for unit, features in enumerate(self.features):
            towers[list(features)] = assignment[unit]
        return towers

    def shares(self, towers: int) -> Floats:
        """[U, 3]: bytes, lookups and embeddings in multiples of a tower's mean."""
        totals = np.stack([self.bytes, self.lookups, self.embeddings], axis=1)
        mean = totals.sum(0) / towers
        return np.divide(totals, mean, out=np.zeros_like(totals), where=mean > 0)


def units_of(config: RunConfig, layout: EmbeddingLayout, mean_lengths: Mapping[str, float]) -> Units:
    """The tables of a run.

    Args:
        mean_lengths: ids an example of the multi-valued features; one that is missing counts as one id.
    """
    from megarec.sparse.tables.optimizers import table_bytes  # imports DeepSpeed, which writes to standard output

    held: dict[str, list[int]] = {table.name: [] for table in layout.tables}
    for place, feature in enumerate(layout.features):
        held[feature.table].append(place)
    whole = [Shard(table.name, 0, 0, table.rows, 0, table.columns) for table in layout.tables]
    lookups = [sum(mean_lengths.get(layout.features[f].name, 1.0) for f in places) for places in held.values()]
    modules = not isinstance(config.tower_module, IdentityTowerConfig)
    embeddings = [sum(layout.features[f].columns for f in places) / layout.dim for places in held.values()]
    return Units(
        tuple(held),
        tuple(tuple(places) for places in held.values()),
        np.array([table_bytes([shard], config.embedding) for shard in whole], dtype=np.float64),
        np.array(lookups, dtype=np.float64),
        np.array(embeddings) * modules,
    )


def measure_lengths(store: Store) -> dict[str, float]:
    """Ids an example of every multi-valued feature, over evenly spaced rows of a split."""
    rows = np.linspace(0, len(store) - 1, min(len(store), SAMPLED_ROWS)).astype(np.int64)
    _, ids, _ = store.gather(rows)
    return {name: float(f.lengths.double().mean()) for name, f in ids.items() if f.lengths is not None}


def tower_flop(config: RunConfig, layout: EmbeddingLayout, embeddings: Sequence[int]) -> list[float]:
    """Training FLOPs an example of each tower's module, given the embeddings that enter it; 0 without modules."""
    module = config.tower_module
    if isinstance(module, IdentityTowerConfig):
        return [0.0] * len(embeddings)
    sizes, _ = module_sizes(module, layout.dim, embeddings, config.model.bias, config.model.activation)
    return [float(part.flop) for part in count_towers(sizes).values()]


@dataclass(frozen=True)
class Limits:
    """Limits of a tower's loads.

    Attributes:
        loads: [3].
        even: an assignment of the units that keeps them.
        reason: how they came about, for the log.
    """

    loads: Floats
    even: Assignment
    reason: str


def find_limits(
    config: RunConfig,
    layout: EmbeddingLayout,
    units: Units,
    towers: int,
    *,
    balance: float | None,
    host_memory: float | None,
) -> Limits:
    """The limits of every tower.

    Args:
        balance: R; None: see above.
        host_memory: bytes that a tower's tables may take at most; None: no limit.

    Raises:
        UserError: nothing keeps them; names the feature or the arithmetic, and the remedy.
    """
    seed = config.train.seed
    memory = memory_limits(units, towers, host_memory)
    even = even_assignment(units.shares(towers), memory, towers, seed)
    check_memory(units, even, towers, host_memory)
    reached = loads_of(even, units.shares(towers), towers).max(0)
    flop = _ModuleBalance(config, layout, int(units.embeddings.sum()), towers)
    if balance is None:
        aims = [SLACK, SLACK, flop.most_embeddings(SLACK)]
        loads = np.array([aim if aim >= r else SLACK * r for aim, r in zip(aims, reached, strict=True)])
        return Limits(np.minimum(loads, memory), even, _explain(loads, reached, units))

    _check_single_units(layout, units, towers, balance)
    loads = np.minimum([balance, balance, flop.most_embeddings(balance)], memory)
    if not fits(even, units.shares(towers), loads, towers):
        needed = [reached[0], reached[1], flop.ratio(float(reached[2]))]
        even = even_assignment(units.shares(towers), loads, towers, seed)
        if not fits(even, units.shares(towers), loads, towers):
            worst = int(np.argmax(needed))
            raise UserError(
                f"--balance {balance:g}: no assignment of {len(units)} tables to {towers} towers was found within it; "
                f"the most even one found reaches {needed[worst]:.3g} x the mean in {KINDS[worst]}: give --balance "
                f"{_rounded_up(needed[worst])} or more, fewer towers, or leave --balance out"
            )
    return Limits(loads, even, f"balance: every tower costs at most {balance:g} x the mean (--balance)")


def memory_limits(units: Units, towers: int, host_memory: float | None) -> Floats:
    """[3]: the limit of bytes that a host's memory sets."""
    limits = np.full(3, np.inf)
    if host_memory is not None:
        limits[0] = host_memory / (units.bytes.sum() / towers)
    return limits


def check_memory(units: Units, assignment: Assignment, towers: int, host_memory: float | None) -> None:
    """Raise a UserError that names the table or the tower that does not fit into a host's memory."""
    if host_memory is None:
        return
    room = f"--host-memory-gib {host_memory / GIB:g}"
    largest = int(units.bytes.argmax())
    if units.bytes[largest] > host_memory:
        raise UserError(
            f"{room}: table {units.tables[largest]!r} alone takes {units.bytes[largest] / GIB:.3g} GiB (weights and "
            "optimizer state): give a host more memory, or the table fewer rows or columns"
        )
    if units.bytes.sum() > host_memory * towers:
        raise UserError(
            f"{room}: all tables take {units.bytes.sum() / GIB:.3g} GiB, {towers} towers hold {towers} x "
            f"{host_memory / GIB:g} = {towers * host_memory / GIB:g} GiB: take more towers"
        )
    held = np.bincount(assignment, units.bytes, towers)
    if held.max() > host_memory * (1 + 1e-9):
        raise UserError(
            f"{room}: the tables of tower {int(held.argmax())} take {held.max() / GIB:.3g} GiB: take more towers, or "
            "another --strategy"
        )


def _check_single_units(layout: EmbeddingLayout, units: Units, towers: int, balance: float) -> None:
    for kind, costs in zip(KINDS, (units.bytes, units.lookups), strict=False):
        largest, mean = int(costs.argmax()), costs.sum() / towers
        if costs[largest] > balance * mean * (1 + 1e-9):
            names = ", ".join(layout.features[place].name for place in units.features[largest])
            ratio = costs[largest] / mean
            raise UserError(
                f"--balance {balance:g}: {names} alone has {costs[largest]:,.6g} of {costs.sum():,.6g} {kind}, "
                f"{ratio:.3g} x the mean of {towers} towers ({costs.sum():,.6g} / {towers} = {mean:,.6g}): give "
                f"--balance {_rounded_up(ratio)} or more, fewer towers, or leave --balance out"
            )


@dataclass(frozen=True)
class _ModuleBalance:
    """What a module costs against the mean, by the embeddings that enter it, of which all towers have `total`."""

    config: RunConfig
    layout: EmbeddingLayout
    total: int
    towers: int

    def ratio(self, load: float) -> float:
        """FLOPs of a tower with `load` x the mean number of embeddings, the others even, in multiples of their mean."""
        if self.total == 0 or self.towers == 1:
            return load
        return self._ratio_of(round(load * self.total / self.towers))

    def most_embeddings(self, balance: float) -> float:
        """In multiples of the mean, the most embeddings with which a module costs at most `balance` x the mean."""
        if self.total == 0 or self.towers == 1:
            return np.inf
        most = max(1, self.total // self.towers)
        while most < self.total - self.towers + 1 and self._ratio_of(most + 1) <= balance * (1 + 1e-9):
            most += 1
        return most * self.towers / self.total

    def _ratio_of(self, embeddings: int) -> float:
        rest, others = self.total - embeddings, self.towers - 1
        inputs = [embeddings, *(max(1, rest // others + (i < rest % others)) for i in range(others))]
        flop = tower_flop(self.config, self.layout, inputs)
        return flop[0] / (sum(flop) / self.towers)


def _explain(loads: Floats, reached: Floats, units: Units) -> str:
    parts = []
    names = ("bytes", "lookups", "embeddings into modules")
    for name, limit, even, costs in zip(
        names, loads, reached, (units.bytes, units.lookups, units.embeddings), strict=True
    ):
        if costs.any() and np.isfinite(limit):
            forced = even > SLACK and limit > SLACK
            parts.append(f"{name} {limit:.3g}" + (f" (the most even assignment reaches {even:.3g})" if forced else ""))
    return "balance: every tower has at most so many times the mean: " + ", ".join(parts)


def _rounded_up(ratio: float) -> str:
    return f"{math.ceil(ratio * 100 - 1e-9) / 100:g}"
