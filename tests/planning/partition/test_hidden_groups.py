"""Hidden groups as a partition, and the adjusted Rand index against a count of pairs."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megarec.config.load import load_config
from megarec.config.sections import RunConfig
from megarec.data.sources.grouped import Shape, prepare_grouped, read_groups
from megarec.errors import UserError
from megarec.planning.partition import probe
from megarec.planning.partition.partition import Requested, partition
from megarec.planning.partition.planted import adjusted_rand
from tests.planning.partition.test_partition import planted as odd_and_even
from tests.planning.partition.test_partition import write_config


@pytest.fixture
def grouped(tmp_path: Path) -> RunConfig:
    shape = Shape(examples=200, features=12, groups=3, alone=2, order=2, rows=6)
    prepare_grouped(shape, tmp_path / "data")
    return load_config(write_config(tmp_path, tmp_path / "data"), [])


def pairs_counted(first: list[int], second: list[int]) -> float:
    """From the definition: agreeing pairs, less what every relabelling of the second agrees on average."""

    def together(labels: tuple[int, ...]) -> int:
        pairs = itertools.combinations(range(len(first)), 2)
        return sum(first[a] == first[b] and labels[a] == labels[b] for a, b in pairs)

    orders = [together(order) for order in itertools.permutations(second)]
    chance = float(np.mean(orders))
    most = (together(tuple(first)) + sum(a == b for a, b in itertools.combinations(second, 2))) / 2
    return (together(tuple(second)) - chance) / (most - chance)


@pytest.mark.parametrize("seed", range(4))
def test_adjusted_rand_is_agreement_beyond_chance(seed: int) -> None:
    random = np.random.default_rng(seed)
    first, second = random.integers(0, 3, 7).tolist(), random.integers(0, 2, 7).tolist()
    assert adjusted_rand(first, second) == pytest.approx(pairs_counted(first, second))
    assert adjusted_rand(first, [5 - label for label in first]) == 1
    assert adjusted_rand(second, first) == pytest.approx(adjusted_rand(first, second))


def test_the_planted_partition_keeps_groups_whole(grouped: RunConfig) -> None:
    hidden = read_groups(Path(grouped.data.path))
    assert hidden is not None
    found = partition(grouped, Requested(3, "planted"))
    assert found.agreement == 1
    assert sorted(map(len, found.towers.features)) == [4, 4, 4]
    for group in hidden.groups:
        assert any(set(group) <= set(names) for names in found.towers.features)
    merged = partition(grouped, Requested(2, "planted"))
    assert merged.agreement is not None and 0 < merged.agreement < 1
    assert sum(map(len, merged.towers.features)) == 12


def test_what_a_partition_finds_is_told(grouped: RunConfig, tmp_path: Path) -> None:
    found = partition(grouped, Requested(2, interactions=odd_and_even(tmp_path)))
    strided = partition(grouped, Requested(3, "strided"))
    assert found.agreement is not None and strided.agreement is not None
    assert -0.5 < strided.agreement < 0.9 and found.agreement < 0.9


def test_features_in_no_group_agree_with_nothing(grouped: RunConfig) -> None:
    hidden = read_groups(Path(grouped.data.path))
    assert hidden is not None
    alone = grouped.data.model_copy(update={"features": hidden.alone})
    assert partition(grouped.model_copy(update={"data": alone}), Requested(2, "strided")).agreement is None


def test_damaged_groups_are_told_before_a_probe(grouped: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    (Path(grouped.data.path) / "groups.json").write_text('{"groups": 3, "alone": []}')
    monkeypatch.setattr(probe, "probe", lambda *arguments: pytest.fail("probed first"))
    with pytest.raises(UserError, match=r"groups\.json: .*expected what `prepare_data.py grouped` writes"):
        partition(grouped, Requested(2))


def test_refusals_of_planted(grouped: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--towers 4, but the data have 3 hidden groups"):
        partition(grouped, Requested(4, "planted"))
    schema = f"data.schema={tmp_path / 'data/schema.json'}"
    elsewhere = load_config(write_config(tmp_path, tmp_path / "none"), [schema])
    with pytest.raises(UserError, match=r"holds no groups.json; only made-up data have hidden groups"):
        partition(elsewhere, Requested(3, "planted"))
    assert partition(elsewhere, Requested(3, "strided")).agreement is None
    other = tmp_path / "other"
    prepare_grouped(replace(Shape(), examples=200, features=10, groups=3, alone=1, order=2, rows=6), other)
    mixed = load_config(write_config(tmp_path, other), [schema])
    with pytest.raises(UserError, match=r"groups.json: does not name f010, a feature of the run"):
        partition(mixed, Requested(3, "planted"))
