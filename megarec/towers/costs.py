"""What features cost a tower, by table: features that share a table move together.

bytes       of the table with its optimizer state
lookups     rows read an example: the mean list length of each feature that uses the table
flop        training FLOPs an example of the tower's module (models/cost.py); 0 without modules. A module's cost is no
            sum over features, so that what is balanced is the embeddings that enter it (see limits.py)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megarec.config.sections import RunConfig
from megarec.config.tower_sections import IdentityTowerConfig
from megarec.data.store import Store
from megarec.embeddings.layout import EmbeddingLayout
from megarec.embeddings.placement import Shard
from megarec.models.cost import count_towers
from megarec.towers.clusters import Assignment, Floats
from megarec.towers.sizes import module_sizes

KINDS = ("bytes", "lookups", "flop")
SAMPLED_ROWS = 8_192  # of the training data, for list lengths


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
    from megarec.planning.memory import table_bytes  # imports DeepSpeed, which writes to standard output

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
    sizes, _ = module_sizes(module, layout.dim, embeddings, config.model.bias)
    return [float(part.flop) for part in count_towers(sizes).values()]
