"""Hidden groups: labels and Bayes LogLoss against plain numpy, what terms say, and refusals in one line."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from megarec.commands import prepare_data
from megarec.data.schema import load_schema
from megarec.data.sources.grouped import GROUPS_FILE, LATENTS, Grouped, Inside, Shape, prepare_grouped, read_groups
from megarec.data.store import open_split
from megarec.errors import UserError

SMALL = Shape(examples=20_000, features=14, groups=3, alone=2, order=3, rows=10, seed=5)


def group_of(grouped: Grouped) -> dict[int, int]:
    return {int(member): group for group, members in enumerate(grouped.groups) for member in members}


def plain_logit(grouped: Grouped, row: list[int]) -> float:
    """The docstring's formula, a term at a time."""
    total = 0.0
    for term in grouped.terms:
        levels = [grouped.levels[f][latent][row[f]] for f, latent in zip(term.features, term.latents, strict=True)]
        total += sum(weight * float(np.prod(levels[: k + 1])) for k, weight in enumerate(term.weights))
    for made in grouped.products:
        sums = [sum(grouped.levels[f][k][row[f]] for f, k in zip(*part, strict=True)) for part in made.parts]
        sizes = [len(features) for features, _ in made.parts]
        total += made.weight * float(np.prod(sums)) / float(np.sqrt(np.prod(sizes)))
    return total


@pytest.mark.parametrize("inside", ["products", "chains"])
def test_the_schema_states_the_bayes_logloss_of_labels_that_follow_it(inside: Inside, tmp_path: Path) -> None:
    shape = replace(SMALL, inside=inside)
    schema = prepare_grouped(shape, tmp_path / "out")
    assert schema == load_schema(tmp_path / "out") and "made up" in schema.source
    assert len(open_split(tmp_path / "out", "train", schema, "error")) == 16_000
    grouped = Grouped(shape)
    for split, optimum in schema.optimum.items():
        table = pq.read_table(tmp_path / "out" / split)
        ids = np.stack([table[f.name].to_numpy() for f in schema.categorical], axis=1)
        labels = table["label"].to_numpy()
        logits = np.array([plain_logit(grouped, row) for row in ids.tolist()])
        p = 1 / (1 + np.exp(-logits))
        assert optimum.entropy == pytest.approx(-(p * np.log(p) + (1 - p) * np.log(1 - p)).mean())
        assert optimum.drawn == pytest.approx(-np.log(np.where(labels == 1, p, 1 - p)).mean())
        deviation = ((logits**2 * p * (1 - p)).mean() / len(ids)) ** 0.5
        assert abs(optimum.drawn - optimum.entropy) < 4 * deviation
        # Labels are as often 1 as their probabilities say, in each tenth of them.
        for tenth in np.array_split(np.argsort(p), 10):
            spread = (p[tenth] * (1 - p[tenth])).sum() ** 0.5
            assert abs(labels[tenth].sum() - p[tenth].sum()) < 4.5 * spread


def test_ids_follow_a_power_law(tmp_path: Path) -> None:
    ids, _ = Grouped(SMALL).draw(np.random.default_rng(0), 40_000)
    assert ids.shape == (40_000, 14) and ids.min() == 0 and ids.max() == 9
    shares = np.bincount(ids.ravel(), minlength=10) / ids.size
    expected = 1 / np.arange(1, 11)
    np.testing.assert_allclose(shares, expected / expected.sum(), atol=0.003)


def test_levels_have_mean_0_and_variance_1_under_the_power_law() -> None:
    grouped = Grouped(SMALL)
    frequency = 1 / np.arange(1, SMALL.rows + 1)
    frequency /= frequency.sum()
    assert grouped.levels.shape == (14, LATENTS, 10)
    np.testing.assert_allclose(grouped.levels @ frequency, 0, atol=1e-12)
    np.testing.assert_allclose(grouped.levels**2 @ frequency, 1)


@pytest.mark.parametrize("seed", range(8))
def test_chains_stay_inside_a_group_and_reach_every_member(seed: int) -> None:
    shape = Shape(features=20 + seed, groups=3, alone=seed, order=2 + seed % 3, rows=8, inside="chains", seed=seed)
    grouped = Grouped(shape)
    groups, strong = group_of(grouped), set()
    sizes = [len(members) for members in grouped.groups]
    assert sum(sizes) == shape.features - shape.alone and max(sizes) - min(sizes) <= 1
    inside = [term for term in grouped.terms if len(term.features) == shape.order and term.weights[-1] > 0.3]
    across = [term for term in grouped.terms if len(term.features) == 2 and term not in inside]
    for term in inside:
        assert len({groups[int(f)] for f in term.features}) == 1 and len(set(term.features)) == shape.order
        assert term.weights[0] == 0 and (term.weights[1:] > 0).all()
        strong |= {int(f) for f in term.features}
    assert strong == set(groups)
    assert len(across) == shape.features
    for term in across:
        first, second = map(int, term.features)
        assert first != second and groups.get(first, -1) != groups.get(second, -2)
        assert 2 * term.weights[1] < min(term.weights[1] for term in inside)
    variance = sum(float((term.weights**2).sum()) for term in grouped.terms)
    assert variance == pytest.approx(shape.signal)


@pytest.mark.parametrize("seed", range(4))
def test_products_deal_out_a_group_for_each_order(seed: int) -> None:
    shape = Shape(features=20 + seed, groups=3, alone=seed, order=2 + seed % 3, rows=8, seed=seed)
    grouped = Grouped(shape)
    members = [[sorted(int(f) for features, _ in made.parts for f in features)] for made in grouped.products]
    assert members == [[group.tolist()] for group in grouped.groups for _ in range(shape.order - 1)]
    assert [len(made.parts) for made in grouped.products] == list(range(2, shape.order + 1)) * 3
    variance = sum(made.weight**2 for made in grouped.products)
    variance += sum(float((term.weights**2).sum()) for term in grouped.terms)
    assert variance == pytest.approx(shape.signal)


def test_groups_are_not_neighbours() -> None:
    """Neither blocks nor every G-th feature: what a reader of the order alone would guess."""
    groups = Grouped(Shape()).groups
    assert all(len({int(f) % 4 for f in members}) > 2 and np.ptp(members) > 40 for members in groups)


def test_groups_lie_beside_the_schema_and_the_seed_fixes_all(tmp_path: Path) -> None:
    shapes = [SMALL, SMALL, Shape(**{**SMALL.__dict__, "seed": 6})]
    for number, shape in enumerate(shapes):
        prepare_grouped(shape, tmp_path / str(number))
    first, again, other = ((tmp_path / str(n) / GROUPS_FILE).read_bytes() for n in range(3))
    assert first == again != other
    tables = [pq.read_table(tmp_path / str(n) / "valid") for n in range(3)]
    assert tables[0].equals(tables[1]) and not tables[0].equals(tables[2])
    found = read_groups(tmp_path / "0")
    assert found is not None and len(found.alone) == 2 and sorted(map(len, found.groups)) == [4, 4, 4]
    named = sorted(itertools.chain(found.alone, *found.groups))
    assert named == [f.name for f in load_schema(tmp_path / "0").categorical]
    assert read_groups(tmp_path) is None
    (tmp_path / GROUPS_FILE).write_text(json.dumps({"groups": [["a"]]}))
    with pytest.raises(UserError, match="expected what `prepare_data"):
        read_groups(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--order", "6", "--features", "20", "--alone", "0"], "(--features 20 - --alone 0) / --groups 4 leaves 5"),
        (["--signal", "nan"], "--signal nan: expected more than 0"),
        (["--inside", "rings"], "--inside rings: expected products or chains"),
        (["--order", "1"], "--order 1: expected at least 2"),
        (["--groups", "1"], "--groups 1: expected at least 2"),
        (["--alone", "99"], "leaves 0"),
        (["--rows", "99999999"], "levels of 64 features; at most"),
    ],
)
def test_sizes_that_make_no_sense_are_one_line(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("signal.signal", lambda *_: None)
    words = ["prepare_data", "grouped", *options, "--output", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as raised:
        prepare_data.main()
    printed = capsys.readouterr()
    assert raised.value.code == 2 and message in printed.err and printed.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
