"""Parameters and training FLOPs per example of a run's model, by part, from its sizes alone.

A multiply-accumulate is 2 FLOPs; training costs it three times: forward, gradient of the input, gradient of the
weight. Only the numeric MLP's first layer needs no gradient of its input. LayerNorm, ReLU and lookups count as
0 FLOPs: above 5 GFLOP/example more than 97 % is plain GEMM.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from megarec.config.sections import WukongConfig
from megarec.embeddings.layout import EmbeddingLayout
from megarec.models.inputs import input_embeddings
from megarec.models.wukong import LayerSizes, layer_sizes

FLOP_PER_MAC = 2
PASSES = 3  # forward, gradient of the input, gradient of the weight


class Part(NamedTuple):
    """One part of a model: its parameters, and its training FLOPs per example."""

    parameters: int
    flop: int

    def plus(self, other: "Part") -> "Part":
        return Part(self.parameters + other.parameters, self.flop + other.flop)


@dataclass(frozen=True)
class Cost:
    """What a model costs.

    Attributes:
        parts: by name: `tables` (all embedding tables), `small_mlp`, `numeric_mlp` where present, then over
            all interaction layers `fm`, `fm_mlp`, `lcb`, `residual`, `layer_norm`, and `head`.
    """

    parts: dict[str, Part]

    @property
    def sparse_parameters(self) -> int:
        return self.parts["tables"].parameters

    @property
    def dense_parameters(self) -> int:
        return self.parameters - self.sparse_parameters

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts.values())

    @property
    def flop(self) -> int:
        """Training FLOPs per example."""
        return sum(part.flop for part in self.parts.values())


def count(config: WukongConfig, layout: EmbeddingLayout, numeric: int) -> Cost:
    """Parameters and training FLOPs per example of tables, input layer and over-arch.

    Raises:
        UserError: sizes that do not fit together, or data without features.
    """
    parts = {"tables": Part(sum(table.rows * table.columns for table in layout.tables), 0)}
    if layout.small_columns:
        emitted = config.small_embeddings * config.dim
        parts["small_mlp"] = count_mlp(layout.small_columns, config.small_mlp, emitted, config.bias)
    if numeric:
        emitted = config.numeric_embeddings * config.dim
        parts["numeric_mlp"] = count_mlp(numeric, config.numeric_mlp, emitted, config.bias, input_gradient=False)
    return Cost(parts | count_wukong(input_embeddings(layout, numeric, config), config))


def count_wukong(n: int, config: WukongConfig) -> dict[str, Part]:
    """The parts of the over-arch over n embeddings per example."""
    parts: dict[str, Part] = {}
    sizes = layer_sizes(n, config)
    for layer in sizes:
        for name, part in _count_layer(layer, config).items():
            parts[name] = parts.get(name, Part(0, 0)).plus(part)
    parts["head"] = count_mlp(sizes[-1].outputs * config.dim, config.head, 1, config.bias)
    return parts


def _count_layer(layer: LayerSizes, config: WukongConfig) -> dict[str, Part]:
    n, d, k = layer.inputs, config.dim, layer.rank
    interactions = n * (n if config.fm == "full" else k)
    if config.fm == "full":
        fm = Part(0, _training_flop(n * n * d))
    elif config.projection == "static":
        fm = Part(n * k, _training_flop(2 * n * k * d))
    else:
        m = config.attentive.compressed
        compression = Part(n * m, _training_flop(n * m * d))
        attention = count_mlp(m * d, config.attentive.mlp, n * k, config.bias)
        fm = Part(0, _training_flop(2 * n * k * d)).plus(compression).plus(attention)
    changes = layer.outputs != n
    return {
        "fm": fm,
        "fm_mlp": count_mlp(interactions, layer.mlp, layer.num_fm * d, config.bias),
        "lcb": Part(n * layer.num_lcb, _training_flop(n * layer.num_lcb * d)),
        "residual": Part(n * layer.outputs, _training_flop(n * layer.outputs * d)) if changes else Part(0, 0),
        "layer_norm": Part((interactions + d) * (2 if config.bias else 1), 0),
    }


def count_mlp(inputs: int, hidden: Sequence[int], outputs: int, bias: bool, *, input_gradient: bool = True) -> Part:
    """An MLP; without `input_gradient` nothing needs the gradient of its input."""
    macs = [a * b for a, b in pairwise([inputs, *hidden, outputs])]
    biases = sum(hidden) + outputs if bias else 0
    saved = 0 if input_gradient else FLOP_PER_MAC * macs[0]
    return Part(sum(macs) + biases, _training_flop(sum(macs)) - saved)


def _training_flop(macs: int) -> int:
    return FLOP_PER_MAC * PASSES * macs
