"""Made-up examples whose label has a known probability: interactions of every order up to 8 between features.

Each value v of a feature f has a sign s_gf(v) = +1 or -1 for each group g, half of the values each; values are drawn
uniformly. A group is a chain of `order` features f_1, f_2, .., drawn at random, and plants one term of each order:

    logit = sum over g, k of w_gk s_gf_1(v_1) s_gf_2(v_2) .. s_gf_k(v_k)        P(label = 1) = sigmoid(logit)

A term of order k is the product of k independent signs of mean 0, so that it says nothing about the label to a model
that lacks one of its features; it adds w_gk^2 to the logit's variance. The chain is a staircase: knowing the term of
order k, a learner finds that of order k + 1 as an interaction of two. An order-8 term alone would be a parity function,
which gradient descent does not find at these sizes (Abbe et al. 2021, arXiv 2108.10573).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from megarec.data.schema import CategoricalFeature, Optimum, Schema, made_up, save_schema
from megarec.data.sources.synthetic import MOST_EXAMPLES, MOST_FEATURES, MOST_ROWS, check_size, split_rows
from megarec.data.writing import SplitWriter, write_dataset
from megarec.errors import UserError

Floats = NDArray[np.float64]
_CHUNK_ROWS = 1 << 16
_VARIANCE = 8.0  # of the logit
_ORDER_DECAY = 0.95  # of the variance from an order to the next
_NEWTON_STEPS = 15
_GROUP_DECAY = 1.0  # group g has a share of the variance that falls as (g + 1)^-decay


@dataclass(frozen=True)
class Shape:
    """How many examples of what.

    Attributes:
        examples: over all splits, 8:1:1.
        features: single-valued features, named f00, f01, ...
        rows: values of each feature, an even number.
        order: the highest order of an interaction.
        groups: chains of features; each has one interaction of every order.
    """

    examples: int = 500_000
    features: int = 24
    rows: int = 16
    order: int = 8
    groups: int = 16
    seed: int = 1


class Planted:
    """The chains, signs and weights behind the labels.

    Attributes:
        chains: [G, K], the features of each group.
        signs: [F, R, G], +1 or -1.
        weights: [G, K], w_gk.
    """

    def __init__(self, shape: Shape) -> None:
        random = np.random.default_rng([shape.seed, 2_000])
        self.chains = np.stack([random.permutation(shape.features)[: shape.order] for _ in range(shape.groups)])
        halves = np.repeat([1, -1], shape.rows // 2).astype(np.int8)
        drawn = random.permuted(np.broadcast_to(halves, (shape.features, shape.groups, shape.rows)), axis=-1)
        self.signs = drawn.transpose(0, 2, 1)
        orders = _ORDER_DECAY ** np.arange(shape.order)
        groups = (1.0 + np.arange(shape.groups)) ** -_GROUP_DECAY
        self.weights = np.sqrt(_VARIANCE * np.outer(groups / groups.sum(), orders / orders.sum()))

    def terms(self, ids: NDArray[np.int64]) -> Floats:
        """Values [B, F] of the features -> the products of signs [B, G, K], without their weights."""
        groups, order = self.chains.shape
        found = np.empty((len(ids), groups, order))
        for group, chain in enumerate(self.chains):
            signs = self.signs[chain, ids[:, chain], group]
            np.cumprod(signs, axis=1, out=found[:, group])
        return found

    def logits(self, ids: NDArray[np.int64]) -> Floats:
        """Values [B, F] of the features -> logits [B]."""
        return np.einsum("bgk,gk->b", self.terms(ids), self.weights)


def entropy(logits: Floats) -> Floats:
    """Of labels with P(1) = sigmoid(logit), in nats: what the true probabilities lose on average, the minimum."""
    return log_loss(logits, 1 / (1 + np.exp(-logits)))


def log_loss(logits: Floats, labels: Floats) -> Floats:
    """Cross-entropy of labels, or of their probabilities, with sigmoid(logit), in nats."""
    return np.logaddexp(0, logits) - labels * logits


def floors(shape: Shape, examples: int = 40_000) -> list[float]:
    """The expected LogLoss of the best logit that is linear in the planted terms of orders up to 0, 1, .., `order`.

    What a model can reach that finds every term up to an order and none above; the last one is the Bayes LogLoss.

    Args:
        examples: over which it is taken.
    """
    planted = Planted(shape)
    ids = np.random.default_rng([shape.seed, 3_000]).integers(0, shape.rows, (examples, shape.features))
    probabilities = 1 / (1 + np.exp(-planted.logits(ids)))
    terms = planted.terms(ids)
    found = []
    for order in range(shape.order + 1):
        columns = np.concatenate([np.ones((examples, 1)), terms[..., :order].reshape(examples, -1)], axis=1)
        weights = np.zeros(columns.shape[1])
        for _ in range(_NEWTON_STEPS):
            fitted = 1 / (1 + np.exp(-columns @ weights))
            curvature = (columns * (fitted * (1 - fitted))[:, None]).T @ columns
            weights -= np.linalg.solve(curvature, columns.T @ (fitted - probabilities))
        found.append(float(log_loss(columns @ weights, probabilities).mean()))
    return found


def prepare_planted(shape: Shape, output: Path) -> Schema:
    """Write a data set with planted interactions; its schema holds the Bayes LogLoss of every split.

    Raises:
        UserError: a size that makes no sense, or `output` cannot be written.
    """
    for option, value, least, most in (
        ("examples", shape.examples, 10, MOST_EXAMPLES),
        ("single", shape.features, 1, MOST_FEATURES),
        ("order", shape.order, 1, MOST_FEATURES),
        ("groups", shape.groups, 1, MOST_FEATURES),
        ("rows", shape.rows, 2, MOST_ROWS),
        ("seed", shape.seed, 0, MOST_ROWS),
    ):
        check_size(option, value, least, most)
    if shape.rows % 2:
        raise UserError(f"--rows {shape.rows}: expected an even number, half of a feature's values have the sign +1")
    if shape.order > shape.features:
        raise UserError(f"--order {shape.order}: that order needs as many features, but --single is {shape.features}")
    return write_dataset(output, lambda partial: _write(partial, shape))


def write_drawn(
    directory: Path,
    rows: dict[str, int],
    seed: int,
    names: list[str],
    draw: Callable[[np.random.Generator, int], tuple[NDArray[np.int64], Floats]],
) -> dict[str, Optimum]:
    """Write the shards of every split, with labels drawn from known logits; the same seed writes the same rows.

    Args:
        rows: examples by split.
        names: of the features, in the order of the values' columns.
        draw: n -> values [n, F] and logits [n].

    Returns:
        The Bayes LogLoss by split.
    """
    optimum = {}
    for number, (split, count) in enumerate(rows.items()):
        expected = drawn = 0.0
        with SplitWriter(directory / split) as writer:
            for start in range(0, count, _CHUNK_ROWS):
                random = np.random.default_rng([seed, number, start])
                ids, logits = draw(random, min(_CHUNK_ROWS, count - start))
                labels = random.random(len(ids)) < 1 / (1 + np.exp(-logits))
                expected += float(entropy(logits).sum())
                drawn += float(log_loss(logits, labels.astype(np.float64)).sum())
                columns = {name: pa.array(ids[:, place]) for place, name in enumerate(names)}
                writer.write(pa.table({**columns, "label": pa.array(labels.astype(np.int8))}))
        optimum[split] = Optimum(entropy=expected / count, drawn=drawn / count)
    return optimum


def _write(directory: Path, shape: Shape) -> Schema:
    planted, rows = Planted(shape), split_rows(shape.examples)
    names = [f"f{index:02d}" for index in range(shape.features)]

    def draw(random: np.random.Generator, count: int) -> tuple[NDArray[np.int64], Floats]:
        ids = random.integers(0, shape.rows, (count, shape.features))
        return ids, planted.logits(ids)

    optimum = write_drawn(directory, rows, shape.seed, names, draw)
    categorical = tuple(CategoricalFeature(name=name, rows=shape.rows) for name in names)
    schema = Schema(
        name="planted",
        label_rule=f"drawn with a known probability from planted interactions of orders 1 to {shape.order}",
        categorical=categorical,
        identity=made_up(categorical, (), shape.seed, f"{shape.groups} interactions of orders 1 to {shape.order}"),
        rows=rows,
        optimum=optimum,
        source=f"synthetic (made up, seed {shape.seed}): {shape.groups} interactions of each order",
    )
    save_schema(schema, directory)
    return schema
