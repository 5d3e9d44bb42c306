"""Planted interactions: the Bayes LogLoss against a count of all cases, and that every order is really there."""

import itertools
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from scipy.optimize import minimize

from megarec.data.schema import load_schema
from megarec.data.sources.planted import Planted, Shape, entropy, floors, prepare_planted
from megarec.data.store import open_split
from megarec.errors import UserError

SMALL = Shape(examples=40_000, features=5, rows=2, order=4, groups=2, seed=3)


def every_case(shape: Shape) -> NDArray[np.int64]:
    return np.array(list(itertools.product(range(shape.rows), repeat=shape.features)))


def plain_logit(planted: Planted, ids: NDArray[np.int64]) -> float:
    """The docstring's formula, a term at a time."""
    total = 0.0
    for group, chain in enumerate(planted.chains):
        product = 1
        for order, feature in enumerate(chain):
            product *= planted.signs[feature, ids[feature], group]
            total += planted.weights[group, order] * product
    return total


def test_logits_follow_the_formula() -> None:
    shape = Shape(features=9, rows=6, order=8, groups=3)
    ids = np.random.default_rng(0).integers(0, 6, (50, 9))
    planted = Planted(shape)
    np.testing.assert_allclose(planted.logits(ids), [plain_logit(planted, row) for row in ids])
    assert (planted.signs.sum(axis=1) == 0).all()  # half of each feature's values
    assert all(len(set(chain)) == 8 for chain in planted.chains)


def test_entropy_is_what_the_true_probabilities_lose() -> None:
    logits = np.array([-3.0, 0.0, 0.4, 500.0, -500.0])
    p = 1 / (1 + np.exp(-logits))
    both = [-(q * np.log(q) + (1 - q) * np.log(1 - q)) for q in p[:3]]
    np.testing.assert_allclose(entropy(logits), [*both, 0, 0], atol=1e-12)


def test_the_schema_states_the_bayes_logloss(tmp_path: Path) -> None:
    """Against a count over all 32 cases: how often each came, what share of its labels is 1, which is all that any
    predictor can know."""
    schema = prepare_planted(SMALL, tmp_path / "out")
    assert schema == load_schema(tmp_path / "out")
    assert schema.rows == {"train": 32_000, "valid": 4_000, "test": 4_000}
    assert len(open_split(tmp_path / "out", "train", schema, "error")) == 32_000
    planted = Planted(SMALL)
    cases = every_case(SMALL)
    p = 1 / (1 + np.exp(-np.array([plain_logit(planted, case) for case in cases])))
    for split, optimum in schema.optimum.items():
        table = pq.read_table(tmp_path / "out" / split)
        ids = np.stack([table[f.name].to_numpy() for f in schema.categorical], axis=1)
        labels = table["label"].to_numpy()
        place = ids @ (2 ** np.arange(4, -1, -1))
        counts = np.bincount(place, minlength=32)
        assert optimum.entropy == pytest.approx(-(counts @ (p * np.log(p) + (1 - p) * np.log(1 - p))) / len(ids))
        assert optimum.drawn == pytest.approx(-np.log(np.where(labels == 1, p[place], 1 - p[place])).mean())
        deviation = (np.log(p / (1 - p)) ** 2 * p * (1 - p)).mean() ** 0.5 / len(ids) ** 0.5
        assert abs(optimum.drawn - optimum.entropy) < 4 * deviation
        # The best predictor of these very labels, the share of ones in each case, beats it only by fitting their luck.
        shares = np.bincount(place, labels, minlength=32) / np.maximum(counts, 1)
        best = -np.log(np.where(labels == 1, shares[place], 1 - shares[place])).mean()
        assert optimum.drawn - 32 / len(ids) < best <= optimum.drawn


def achievable(shape: Shape, highest: int) -> float:
    """The least LogLoss of any logit without interactions above an order, over all cases with their true
    probabilities: a convex problem, since a function of binary features is a sum over products of signs."""
    planted, cases = Planted(shape), every_case(shape)
    p = 1 / (1 + np.exp(-planted.logits(cases)))
    signs = 2 * cases - 1
    subsets = [s for k in range(highest + 1) for s in itertools.combinations(range(shape.features), k)]
    products = np.stack([signs[:, list(subset)].prod(axis=1) for subset in subsets], axis=1).astype(float)

    def loss(weights: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        logits = products @ weights
        gradient = products.T @ (1 / (1 + np.exp(-logits)) - p) / len(p)
        return float((np.logaddexp(0, logits) - p * logits).mean()), gradient

    return float(minimize(loss, np.zeros(len(subsets)), jac=True, method="L-BFGS-B", options={"maxiter": 2_000}).fun)


def test_without_an_order_no_model_reaches_the_optimum() -> None:
    shape = Shape(features=8, rows=2, order=8, groups=1)
    optimum = float(entropy(Planted(shape).logits(every_case(shape))).mean())
    losses = [achievable(shape, highest) for highest in range(9)]
    assert losses[0] > 0.6
    for fewer, more in itertools.pairwise(losses):
        assert fewer - more > 0.0015  # 0.4 % of the optimum: twenty times what counts as significant
    assert losses[8] == pytest.approx(optimum, abs=1e-4)


def test_floors_fall_to_the_bayes_logloss() -> None:
    shape = Shape(features=10, rows=4, order=8, groups=2)
    found = floors(shape, examples=5_000)
    assert found[0] == pytest.approx(np.log(2), abs=0.002) and len(found) == 9
    for fewer, more in itertools.pairwise(found):
        assert fewer - more > 0.02
    ids = np.random.default_rng(5).integers(0, 4, (50_000, 10))
    assert found[8] == pytest.approx(float(entropy(Planted(shape).logits(ids)).mean()), abs=0.01)


def test_every_order_has_its_share_of_the_variance() -> None:
    shape = Shape(features=8, rows=2, order=8, groups=3)
    planted = Planted(shape)
    terms = planted.terms(every_case(shape)) * planted.weights
    flat = terms.reshape(len(terms), -1)
    np.testing.assert_allclose(flat.mean(axis=0), 0, atol=1e-12)
    by_order = (planted.weights**2).sum(axis=0)
    assert by_order.sum() == pytest.approx(8) and (by_order > 0.7).all()


def test_planted_data_are_fixed_by_their_seed(tmp_path: Path) -> None:
    made = [prepare_planted(Shape(200, 8, 4, 8, 2, seed), tmp_path / str(n)) for n, seed in enumerate((1, 1, 2))]
    first, again, other = (pq.read_table(tmp_path / str(n) / "train") for n in range(3))
    assert first.equals(again) and not first.equals(other) and made[0].optimum == made[1].optimum


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"rows": 3}, "--rows 3: expected an even number"),
        ({"features": 7}, "--order 8: .* --single is 7"),
        ({"order": 0}, "--order 0: expected at least 1"),
        ({"examples": 9}, "--examples 9: expected at least 10"),
    ],
)
def test_planted_sizes_that_make_no_sense(tmp_path: Path, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare_planted(Shape(**sizes), tmp_path / "out")
    assert not (tmp_path / "out").exists()
