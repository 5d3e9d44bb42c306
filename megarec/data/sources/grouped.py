"""Made-up examples with many features in hidden groups: strong interactions inside a group, weak ones across.

What a partition of features into towers should find, and what it costs where it does not. Values are drawn by a power
law, P(v) ~ 1 / (v + 1). Every feature has LATENTS unrelated levels, so that one number does not hold a value. A level
z_fl(v) takes two values, of mean 0 and variance 1 under the power law. With s = z of a feature's drawn latent:

    inside    "products": for each k = 2 .. order the members of a group are dealt at random into k parts; w_k times the
              product of the k sums of s, each scaled to variance 1. Many pairs interact, each a little
              "chains": `order` members f_1, f_2, .. of a group: w_k s_1 s_2 .. s_k for k = 2 .. order; the members lie
              on a circle, and each chain starts where the one before ended, once around. Few pairs interact, strongly
    across    for each feature a pair s s' with one outside its group
    alone     for each feature w s, the only strong term of those in no group

    logit = sum of terms        P(label = 1) = sigmoid(logit)

Features are independent, so that terms of different features are uncorrelated, and the logit's variance is about the
sum of the squared weights.
`groups.json` beside schema.json says which features belong together; training does not read it.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from megarec.config.base import Section
from megarec.data.schema import CategoricalFeature, Schema, made_up, save_schema
from megarec.data.sources.planted import Floats, write_drawn
from megarec.data.sources.synthetic import MOST_EXAMPLES, MOST_FEATURES, MOST_ROWS, check_size, split_rows
from megarec.data.writing import write_dataset
from megarec.errors import UserError
from megarec.files import read_object

Inside = Literal["products", "chains"]
INSIDE = get_args(Inside)

GROUPS_FILE = "groups.json"
LATENTS = 2
MOST_LEVELS = 1 << 28  # of all features together: 2 GiB
MOST_SIGNAL = 1_000.0
_INSIDE, _ACROSS = 0.75, 0.1  # of the logit's variance; the rest is that of single features
_ORDER_DECAY = {"products": 0.5, "chains": 0.7}  # of the variance from an order to the next


@dataclass(frozen=True)
class Shape:
    """How many examples of what.

    Attributes:
        examples: over all splits, 8:1:1.
        features: single-valued features, f000, f001, ...
        groups: hidden groups, drawn at random, of equal sizes within one.
        alone: features in no group.
        order: the highest order of an interaction inside a group.
        rows: values of each feature.
        signal: the logit's variance; less is more noise in the labels.
        inside: what the interactions inside a group are made of.
    """

    examples: int = 500_000
    features: int = 64
    groups: int = 4
    alone: int = 8
    order: int = 4
    rows: int = 64
    signal: float = 8.0
    inside: Inside = "products"
    seed: int = 1


@dataclass(frozen=True, eq=False)
class Term:
    """weight x the product of the first `order` levels of a chain, for each order from the first on.

    Attributes:
        features, latents: [K] of the chain.
        weights: [K], by order; 0 where there is no term.
    """

    features: NDArray[np.int64]
    latents: NDArray[np.int64]
    weights: Floats


@dataclass(frozen=True, eq=False)
class Product:
    """weight x the product of its parts' scores, each the sum of levels of its features over the root of their number.

    Attributes:
        parts: (features [K], latents [K]) of each, without a common feature.
    """

    weight: float
    parts: tuple[tuple[NDArray[np.int64], NDArray[np.int64]], ...]


class Grouped:
    """The groups, levels and terms behind the labels.

    Attributes:
        groups: features of each, ascending.
        levels: [F, LATENTS, R], mean 0 and variance 1 over a feature's values.
        terms: chains of all kinds.
        products: inside groups.
    """

    def __init__(self, shape: Shape) -> None:
        random = np.random.default_rng([shape.seed, 4_000])
        shuffled = random.permutation(shape.features)[: shape.features - shape.alone]
        self.groups = [np.sort(shuffled[start :: shape.groups]) for start in range(shape.groups)]
        frequency = 1 / (1 + np.arange(shape.rows))
        self._below = np.cumsum(frequency / frequency.sum())
        self.levels = _levels(random, shape, frequency / frequency.sum())
        shares = _ORDER_DECAY[shape.inside] ** np.arange(shape.order - 1)
        variances = _INSIDE * shape.signal * shares / shares.sum()
        chains = list(self._chains(random, variances)) if shape.inside == "chains" else []
        self.products = list(self._products(random, variances)) if shape.inside == "products" else []
        self.terms = [*chains, *self._across(random, shape), *self._single(random, shape)]

    def draw(self, random: np.random.Generator, examples: int) -> tuple[NDArray[np.int64], Floats]:
        """Values [n, F], and logits [n]."""
        below, features = self._below, len(self.levels)
        ids = np.searchsorted(below[:-1], random.random((examples, features)), side="right")
        return ids, self.logits(ids)

    def logits(self, ids: NDArray[np.int64]) -> Floats:
        """Values [B, F] of the features -> logits [B]."""
        total = np.zeros(len(ids))
        for term in self.terms:
            product = np.ones(len(ids))
            for feature, latent, weight in zip(term.features, term.latents, term.weights, strict=True):
                product *= self.levels[feature, latent][ids[:, feature]]
                total += weight * product
        for made in self.products:
            product = np.full(len(ids), made.weight)
            for features, latents in made.parts:
                drawn = zip(features, latents, strict=True)
                product *= sum(self.levels[f, k][ids[:, f]] for f, k in drawn) / np.sqrt(len(features))
            total += product
        return total

    def _products(self, random: np.random.Generator, variances: Floats) -> Iterator[Product]:
        for members in self.groups:
            for order, variance in enumerate(variances, 2):
                dealt = np.array_split(random.permutation(members), order)
                parts = tuple((part, random.integers(0, LATENTS, len(part))) for part in dealt)
                yield Product(float(np.sqrt(variance / len(self.groups))), parts)

    def _chains(self, random: np.random.Generator, variances: Floats) -> Iterator[Term]:
        order = len(variances) + 1
        circles = [random.permutation(members) for members in self.groups]
        starts = [range(0, len(circle), order - 1) for circle in circles]
        weights = np.sqrt(np.concatenate([[0.0], variances]) / sum(map(len, starts)))
        for circle, places in zip(circles, starts, strict=True):
            for start in places:
                yield _term(random, np.take(circle, range(start, start + order), mode="wrap"), weights)

    def _across(self, random: np.random.Generator, shape: Shape) -> Iterator[Term]:
        group_of = np.arange(shape.features) + shape.groups  # a feature that is alone is a group of its own
        for group, members in enumerate(self.groups):
            group_of[members] = group
        weights = np.array([0.0, np.sqrt(_ACROSS * shape.signal / shape.features)])
        for feature in range(shape.features):
            other = random.choice(np.flatnonzero(group_of != group_of[feature]))
            yield _term(random, np.array([feature, other]), weights)

    def _single(self, random: np.random.Generator, shape: Shape) -> Iterator[Term]:
        weights = np.array([np.sqrt((1 - _INSIDE - _ACROSS) * shape.signal / shape.features)])
        for feature in range(shape.features):
            yield _term(random, np.array([feature]), weights)


def _term(random: np.random.Generator, features: NDArray[np.int64], weights: Floats) -> Term:
    return Term(features, random.integers(0, LATENTS, len(features)), weights)


def _levels(random: np.random.Generator, shape: Shape, frequency: Floats) -> Floats:
    """Half of the values lie above, half below, by chance; then moved and stretched to mean 0 and variance 1."""
    signs = np.where(np.arange(shape.rows) < shape.rows // 2, 1.0, -1.0)
    drawn = random.permuted(np.broadcast_to(signs, (shape.features, LATENTS, shape.rows)), axis=-1)
    drawn -= (drawn @ frequency)[..., None]
    drawn /= np.sqrt(drawn**2 @ frequency)[..., None]
    return drawn


class GroupsFile(Section):
    """groups.json."""

    groups: list[list[str]]
    alone: list[str]


def read_groups(data: Path) -> GroupsFile | None:
    """The hidden groups of prepared data; None where they are not made up so.

    Raises:
        UserError: the file is there and holds something else.
    """
    path = data / GROUPS_FILE
    if not path.is_file():
        return None
    try:
        return GroupsFile.model_validate(read_object(path, "the hidden groups of made-up data"))
    except ValidationError as error:
        raise UserError(
            f"{path}: {error.errors()[0]['msg']}; expected what `prepare_data.py grouped` writes"
        ) from error


def prepare_grouped(shape: Shape, output: Path) -> Schema:
    """Write a data set with hidden groups; its schema holds the Bayes LogLoss of every split.

    Raises:
        UserError: a size that makes no sense, or `output` cannot be written.
    """
    for option, value, least, most in (
        ("examples", shape.examples, 10, MOST_EXAMPLES),
        ("features", shape.features, 4, MOST_FEATURES),
        ("groups", shape.groups, 2, MOST_FEATURES),
        ("alone", shape.alone, 0, MOST_FEATURES),
        ("order", shape.order, 2, MOST_FEATURES),
        ("rows", shape.rows, 2, MOST_ROWS),
        ("seed", shape.seed, 0, MOST_ROWS),
    ):
        check_size(option, value, least, most)
    if shape.inside not in INSIDE:
        raise UserError(f"--inside {shape.inside}: expected {' or '.join(INSIDE)}")
    if not 0 < shape.signal <= MOST_SIGNAL:
        raise UserError(f"--signal {shape.signal}: expected more than 0 and at most {MOST_SIGNAL:,.0f}")
    smallest = max(0, shape.features - shape.alone) // shape.groups
    if smallest < shape.order:
        raise UserError(
            f"--order {shape.order}: that order needs as many features in each group, but "
            f"(--features {shape.features} - --alone {shape.alone}) / --groups {shape.groups} leaves {smallest}"
        )
    if (levels := shape.features * LATENTS * shape.rows) > MOST_LEVELS:
        raise UserError(f"--rows {shape.rows}: {levels:,} levels of {shape.features} features; at most {MOST_LEVELS:,}")
    return write_dataset(output, lambda partial: _write(partial, shape))


def _write(directory: Path, shape: Shape) -> Schema:
    grouped, rows = Grouped(shape), split_rows(shape.examples)
    names = [f"f{index:03d}" for index in range(shape.features)]
    optimum = write_drawn(directory, rows, shape.seed, names, grouped.draw)
    hidden = [[names[member] for member in members] for members in grouped.groups]
    alone = sorted(set(names) - {name for group in hidden for name in group})
    (directory / GROUPS_FILE).write_text(json.dumps({"groups": hidden, "alone": alone}, indent=2) + "\n")
    categorical = tuple(CategoricalFeature(name=name, rows=shape.rows) for name in names)
    what = (
        f"{shape.groups} hidden groups and {shape.alone} features alone, {shape.inside} of order {shape.order}, "
        f"signal {shape.signal:g}"
    )
    schema = Schema(
        name="grouped",
        label_rule="drawn with a known probability: strong interactions inside hidden groups, weak ones across",
        categorical=categorical,
        identity=made_up(categorical, (), shape.seed, what),
        rows=rows,
        optimum=optimum,
        source=f"synthetic (made up, seed {shape.seed}): {what}",
    )
    save_schema(schema, directory)
    return schema
