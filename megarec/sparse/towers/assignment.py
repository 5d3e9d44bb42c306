"""Which features a tower holds (DMT, arXiv 2403.00877): given by lists, or strided; which host holds a tower."""

from collections.abc import Sequence
from dataclasses import dataclass

from megarec.errors import UserError, did_you_mean
from megarec.sparse.layout import EmbeddingLayout


@dataclass(frozen=True)
class Towers:
    """The features of T towers; the same on every topology.

    Attributes:
        features: by tower, the names of its features in canonical order (as they lie in the layout).
    """

    features: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.features)

    def of_host(self, host: int, hosts: int) -> range:
        """The towers of one host: tower t lies on host t // (T / H)."""
        per_host = len(self) // hosts
        return range(host * per_host, (host + 1) * per_host)


def assign_towers(layout: EmbeddingLayout, requested: int | Sequence[Sequence[str]]) -> Towers:
    """The towers that `parallel.towers` asks for.

    Args:
        requested: by tower, its features in any order; or a number T: feature i goes to tower i mod T. Features that
            share a table count once then and stay together.

    Raises:
        UserError: a feature is missing, repeated or unknown, a tower is empty, or features of one table lie in
            different towers.
    """
    if isinstance(requested, int):
        return _strided(layout, requested)
    if not requested:
        raise UserError("parallel.towers lists no tower: give each tower's features, a number of towers, or null")
    tower_of: dict[str, int] = {}
    known = _names(layout)
    for tower, names in enumerate(requested):
        if not names:
            raise UserError(f"parallel.towers[{tower}] is empty: give it a feature, or leave the tower out")
        for name in names:
            if name not in known:
                raise UserError(
                    f"parallel.towers[{tower}] names {name!r}, which is not a categorical feature of the run; "
                    f"{did_you_mean(name, known)}"
                )
            if name in tower_of:
                raise UserError(
                    f"parallel.towers names {name!r} twice, in towers {tower_of[name]} and {tower}: keep it in one"
                )
            tower_of[name] = tower
    missing = [name for name in known if name not in tower_of]
    if missing:
        raise UserError(f"parallel.towers misses {', '.join(missing)}: put every categorical feature in a tower")
    _check_tables(layout, tower_of)
    return _in_order(layout, tower_of, len(requested))


def check_towers(towers: Towers, hosts: int) -> None:
    """Raise a UserError that prints the failed arithmetic where the hosts cannot share the towers equally."""
    if len(towers) % hosts:
        remedy = max(1, round(len(towers) / hosts)) * hosts
        raise UserError(
            f"parallel.towers gives {len(towers)} towers to {hosts} hosts: {len(towers)} / {hosts} = "
            f"{len(towers) / hosts:.3g} on each; take a multiple of {hosts} (such as {remedy}), or another number of "
            "hosts (parallel.ranks_per_host)"
        )


def _strided(layout: EmbeddingLayout, count: int) -> Towers:
    tables = {table.name: index for index, table in enumerate(layout.tables)}
    if not tables:
        raise UserError(
            f"parallel.towers={count}: a tower is a group of categorical features, and the model has none; leave "
            "parallel.towers out (and parallel.exchange='tower')"
        )
    if count > len(tables):
        raise UserError(
            f"parallel.towers={count}: {len(_names(layout))} categorical features with {len(tables)} tables fill at "
            f"most {len(tables)} towers"
        )
    return _in_order(layout, {f.name: tables[f.table] % count for f in layout.looked_up}, count)


def _check_tables(layout: EmbeddingLayout, tower_of: dict[str, int]) -> None:
    first = {feature.table: feature.name for feature in reversed(layout.looked_up)}
    for feature in layout.looked_up:
        other = first[feature.table]
        if tower_of[feature.name] != tower_of[other]:
            raise UserError(
                f"parallel.towers puts {other!r} in tower {tower_of[other]} and {feature.name!r} in tower "
                f"{tower_of[feature.name]}, but they share the table {feature.table!r}: put them in one tower"
            )


def _in_order(layout: EmbeddingLayout, tower_of: dict[str, int], count: int) -> Towers:
    return Towers(tuple(tuple(name for name in _names(layout) if tower_of[name] == tower) for tower in range(count)))


def _names(layout: EmbeddingLayout) -> list[str]:
    """Of all features, each once."""
    return list(dict.fromkeys(feature.name for feature in layout.looked_up))


def tower_columns(layout: EmbeddingLayout, towers: Towers) -> list[list[int]]:
    """By tower, the columns of its pooled features in the matrix [B, layout.width], feature after feature.

    `[column for tower in tower_columns(...) for column in tower]` brings the matrix into tower order.
    """
    columns = {f.name: range(f.start, f.start + f.columns) for f in layout.features}
    return [[column for name in names for column in columns.get(name, ())] for names in towers.features]
