"""Features to towers (DMT, arXiv 2403.00877, tower partitioner): one ordered recipe.

    coherent             probe -> interactions -> spectral coordinates -> k-means within limits
    diverse              probe -> interactions -> distances -> plane -> k-means within limits
    strided              table i to tower i mod T
    greedy               largest first, to the tower with the least cost so far
    random               tables dealt out at random, as many to each tower
    planted              the hidden groups of made-up data (`tools/prepare_data.py grouped`), whole

The others look at no interactions and keep no balance; they are what the first two are compared with.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np

from megarec.config.sections import RunConfig
from megarec.config.towers import TowersFile
from megarec.data.schema import SCHEMA_FILE, Schema, Split, schema_of
from megarec.data.sources.grouped import read_groups
from megarec.data.store import open_split
from megarec.errors import UserError, did_you_mean
from megarec.planning.partition.balanced_kmeans import (
    Assignment,
    Floats,
    constrained_kmeans,
    dealt_round_robin,
    largest_first,
)
from megarec.planning.partition.interactions import MEASURES, Matrix, Measure, read_interactions
from megarec.planning.partition.limits import (
    GIB,
    KINDS,
    Units,
    check_memory,
    find_limits,
    measure_lengths,
    tower_flop,
    units_of,
)
from megarec.planning.partition.mds import Kind, place_in_plane, wanted_distances
from megarec.planning.partition.planted import agreement, planted_assignment
from megarec.planning.partition.spectral import coordinates
from megarec.run.spec import resolve
from megarec.sparse.layout import EmbeddingLayout, sequence_tables
from megarec.sparse.towers.assignment import Towers, assign_towers

LEARNED = get_args(Kind)
STRATEGIES = (*LEARNED, "strided", "greedy", "random", "planted")
PROBE_STEPS = 300


@dataclass(frozen=True)
class Requested:
    """What the command line asks for; None: see limits.py and PROBE_STEPS.

    Attributes:
        interactions: an .npy file in place of a probe.
        measure: of MEASURES.
    """

    towers: int
    strategy: str = "coherent"
    balance: float | None = None
    host_memory_gib: float | None = None
    probe_steps: int | None = None
    interactions: Path | None = None
    measure: str | None = None


@dataclass(frozen=True)
class Picture:
    """Features as they lie in the plane.

    Attributes:
        interactions: [F, F], features in layout order, as are the points [F, 2].
        stress: of the plane.
        probed: whether a probe of this partition found the interactions.
    """

    interactions: Matrix
    points: Floats
    stress: float
    probed: bool


@dataclass(frozen=True)
class Partition:
    """Features by tower, and what that costs.

    Attributes:
        cost: by kind (bytes, lookups, flop), of each tower.
        picture: None: a baseline, and no interactions were given.
        agreement: adjusted Rand index with the data's hidden groups; None: no feature is in one.
        reasons: what was chosen and why.
    """

    towers: Towers
    strategy: str
    seed: int
    layout: EmbeddingLayout
    cost: dict[str, list[float]]
    picture: Picture | None
    agreement: float | None
    reasons: tuple[str, ...]
    seconds: dict[str, float]

    def tower_of_features(self) -> Assignment:
        """[F], features in layout order."""
        tower_of = {name: tower for tower, names in enumerate(self.towers.features) for name in names}
        return np.array([tower_of[feature.name] for feature in self.layout.features], dtype=np.int64)

    def file(self) -> TowersFile:
        lists = [list(names) for names in self.towers.features]
        return TowersFile(towers=lists, strategy=self.strategy, seed=self.seed, cost=self.cost)


def partition(config: RunConfig, requested: Requested, say: Callable[[str], None] = lambda line: None) -> Partition:
    """Assign every categorical feature of a run to a tower; only a probe reads more than list lengths of the data.

    Raises:
        UserError: whatever the user can fix, before anything long is done where that can be known.
    """
    check_requested(requested)
    config, schema = all_pooled(config, schema_of(config.data))
    parallel = config.parallel.model_copy(update={"towers": requested.towers})
    spec = resolve(config.model_copy(update={"parallel": parallel}), schema)  # refuses more towers than tables
    layout, strided = spec.layout, spec.towers.towers
    assert strided is not None
    read_groups(Path(config.data.path))  # a damaged file is told before a probe, not after it
    seconds: dict[str, float] = {}
    with _timed(seconds, "probe"):
        interactions, lengths, reasons = _look(config, requested, schema, layout, say)
    units = units_of(config, layout, lengths)
    with _timed(seconds, "plane"):
        picture = _picture(requested, interactions, config.train.seed, reasons)
    with _timed(seconds, "assignment"):
        assignment = _assign(config, requested, layout, units, picture, strided, reasons)
    towers = assign_towers(layout, _lists(layout, units, assignment))
    cost = tower_costs(config, layout, units, towers)
    return Partition(
        towers, requested.strategy, config.train.seed, layout, cost, picture,
        agreement(towers.features, config.data.path), tuple(reasons), seconds,
    )  # fmt: skip


def all_pooled(config: RunConfig, schema: Schema) -> tuple[RunConfig, Schema]:
    """A run whose sequences are pooled as any list, each in the table that it has as a sequence: what a tower holds is
    the same, and how features interact is measured on pooled embeddings.

    Raises:
        UserError: `model.sequences` names features that cannot be one.
    """
    tables = sequence_tables(schema, config.model.sequences)
    features = tuple(
        feature.model_copy(update={"table": table}) if (table := tables.get(feature.name)) else feature
        for feature in schema.categorical
    )
    model = config.model.model_copy(update={"sequences": []})
    return config.model_copy(update={"model": model}), schema.model_copy(update={"categorical": features})


def _picture(requested: Requested, interactions: Matrix | None, seed: int, reasons: list[str]) -> Picture | None:
    """Features in the plane, where interactions are known."""
    if interactions is None:
        return None
    kind = _kind(requested)
    points, stress = place_in_plane(wanted_distances(interactions, kind), seed)
    reasons.append(f"plane: distances of {kind}, stress {stress:.3f}")
    return Picture(interactions, points, stress, requested.interactions is None)


def _kind(requested: Requested) -> Kind:
    return "diverse" if requested.strategy == "diverse" else "coherent"


def _assign(
    config: RunConfig,
    requested: Requested,
    layout: EmbeddingLayout,
    units: Units,
    picture: Picture | None,
    strided: Towers,
    reasons: list[str],
) -> Assignment:
    """Units to towers, by the strategy."""
    memory = None if requested.host_memory_gib is None else requested.host_memory_gib * GIB
    if requested.strategy not in LEARNED:
        assignment = _baseline(config, requested, units, layout, strided)
        check_memory(units, assignment, requested.towers, memory)
        return assignment
    assert picture is not None
    limits = find_limits(config, layout, units, requested.towers, balance=requested.balance, host_memory=memory)
    reasons.append(limits.reason)
    coherent = _kind(requested) == "coherent"
    points = coordinates(picture.interactions, requested.towers) if coherent else picture.points
    return constrained_kmeans(
        _unit_points(units, points), np.array([float(len(f)) for f in units.features]),
        units.shares(requested.towers), limits.loads, limits.even, requested.towers, config.train.seed,
    )  # fmt: skip


def check_requested(options: Requested) -> None:
    """Raise a UserError for what the command line cannot mean."""
    if options.strategy not in STRATEGIES:
        raise UserError(
            f"--strategy {options.strategy}: no such strategy; {did_you_mean(options.strategy, STRATEGIES)}"
        )
    for name, value, least in (
        ("towers", options.towers, 1), ("balance", options.balance, 1), ("probe-steps", options.probe_steps, 1),
    ):  # fmt: skip
        if value is not None and not value >= least:
            raise UserError(f"--{name} {value}: expected at least {least}")
    if options.host_memory_gib is not None and not options.host_memory_gib > 0:
        raise UserError(f"--host-memory-gib {options.host_memory_gib}: expected more than 0")
    if options.strategy not in LEARNED and options.balance is not None:
        raise UserError(f"--balance goes with {' and '.join(LEARNED)}: --strategy {options.strategy} keeps no balance")
    if options.measure is not None and options.measure not in MEASURES:
        raise UserError(f"--measure {options.measure}: no such measure; {did_you_mean(options.measure, MEASURES)}")
    of_probe = {"probe-steps": options.probe_steps, "measure": options.measure}
    given = next((name for name, value in of_probe.items() if value is not None), None)
    if given is not None and (options.interactions is not None or options.strategy not in LEARNED):
        other = "--interactions" if options.interactions is not None else f"--strategy {options.strategy}"
        raise UserError(f"--{given}: there is no probe with {other}; leave one of them out")


def _look(
    config: RunConfig, requested: Requested, schema: Schema, layout: EmbeddingLayout, say: Callable[[str], None]
) -> tuple[Matrix | None, dict[str, float], list[str]]:
    """Interactions [F, F], ids an example of multi-valued features, and how they were found."""
    if requested.interactions is None and requested.strategy in LEARNED:
        from megarec.planning.partition.probe import probe  # seconds of imports that everything else does without

        measure: Measure = "cosine" if requested.measure == "cosine" else "difference"
        found = probe(config, requested.probe_steps or PROBE_STEPS, measure, say)
        return found.interactions, found.mean_lengths, [found.reason]
    interactions = None
    reasons = []
    if requested.interactions is not None:
        interactions = read_interactions(requested.interactions, len(layout.features))
        reasons.append(f"interactions: of {requested.interactions}")
    path = Path(config.data.path)
    if not any(feature.multi_valued for feature in schema.categorical):
        return interactions, {}, reasons
    if not (path / SCHEMA_FILE).is_file():
        reasons.append(
            f"lookups: a list counts as one id, since its data are not here (data.path={config.data.path!r})"
        )
        return interactions, {}, reasons
    split: Split = "train" if config.data.stream_rows is None else "valid"  # a cache of which is asked for
    return (
        interactions,
        measure_lengths(open_split(path, split, schema, config.data.bad_rows, config.data.cache)),
        reasons,
    )


def _unit_points(units: Units, points: Floats) -> Floats:
    """[U, axes]: features that move together lie in the middle of them."""
    return np.stack([points[list(features)].mean(0) for features in units.features])


def _baseline(
    config: RunConfig, requested: Requested, units: Units, layout: EmbeddingLayout, strided: Towers
) -> Assignment:
    names = [layout.features[features[0]].name for features in units.features]
    if requested.strategy == "greedy":
        return largest_first(units.shares(requested.towers).sum(1), requested.towers)
    if requested.strategy == "random":
        return dealt_round_robin(len(units), requested.towers, np.random.default_rng([config.train.seed, 5]))
    if requested.strategy == "planted":
        return planted_assignment(names, requested.towers, config.data.path)
    tower_of = {name: tower for tower, names in enumerate(strided.features) for name in names}
    return np.array([tower_of[name] for name in names], dtype=np.int64)


def _lists(layout: EmbeddingLayout, units: Units, assignment: Assignment) -> list[list[str]]:
    """Names by tower; the tower with the earliest feature first, so that equal partitions are equal files."""
    lists: dict[int, list[str]] = {}
    for feature, tower in zip(layout.features, units.of_features(assignment), strict=True):
        lists.setdefault(int(tower), []).append(feature.name)
    return list(lists.values())


def tower_costs(config: RunConfig, layout: EmbeddingLayout, units: Units, towers: Towers) -> dict[str, list[float]]:
    """By kind (KINDS), the cost of each tower."""
    unit_of = {layout.features[place].name: unit for unit, places in enumerate(units.features) for place in places}
    held = [sorted({unit_of[name] for name in names}) for names in towers.features]
    embeddings = [round(units.embeddings[own].sum()) for own in held]
    found = (
        [float(units.bytes[own].sum()) for own in held],
        [float(units.lookups[own].sum()) for own in held],
        tower_flop(config, layout, embeddings),
    )
    return dict(zip(KINDS, found, strict=True))


def inside_and_across(interactions: Matrix, tower_of: Assignment, tower: int | None = None) -> tuple[float, float]:
    """Mean interaction of two features in the same tower, and in different ones; nan where there is no such pair.

    Args:
        tower_of: [F].
        tower: only pairs with a feature in this one; None: all pairs.
    """
    same = tower_of[:, None] == tower_of
    pairs = ~np.eye(len(tower_of), dtype=bool)
    if tower is not None:
        pairs &= (tower_of == tower)[:, None]
    inside, across = interactions[pairs & same], interactions[pairs & ~same]
    return (float(inside.mean()) if inside.size else np.nan, float(across.mean()) if across.size else np.nan)


@contextmanager
def _timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[part] = time.perf_counter() - started
