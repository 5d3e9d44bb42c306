"""Parameters and training FLOPs per example of a run's model, by layer and part, from its sizes alone.

A multiply-accumulate is 2 FLOPs; training costs it three times: forward, gradient of the input, gradient of the
weight. Only the numeric MLP's first layer needs no gradient of its input. LayerNorm, ReLU, sums, products element by
element and lookups count as 0 FLOPs: above 5 GFLOP/example more than 97 % is plain GEMM.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from megarec.config.base import ModelConfig
from megarec.config.models import DcnConfig, DlrmConfig, OverArchConfig, WukongConfig
from megarec.config.towers import DcnTowerConfig, DlrmTowerConfig, WukongTowerConfig
from megarec.models.dlrm import head_inputs
from megarec.models.inputs import EmbeddedColumns, input_biases, input_embeddings
from megarec.models.recommender import shift_of_inputs_vanishes
from megarec.models.sequences import DIN_MLP, SequenceInput
from megarec.models.wukong import LayerSizes, last_biases, layer_sizes
from megarec.run.baseline_cost import count_baseline, emitted_columns
from megarec.run.cost_parts import Part, Parts, count_head, count_mlp, count_tasks, total
from megarec.sparse.layout import Table
from megarec.sparse.towers.sizes import TowerSizes


@dataclass(frozen=True)
class Cost:
    """What a model costs.

    Attributes:
        layers: by layer, then by part, in the order of the forward pass. `sparse` has the part `tables`; `towers`,
            where there are tower modules, `towers.0` and so on; `sequences`, where there are any, `sequences.0` and so
            on; `inputs` has `small_mlp` and `numeric_mlp`; `layers.0` and so on are the over-arch's; `head` comes last,
            of several labels with `experts`, `gates` and `towers`.
    """

    layers: dict[str, Parts]

    @property
    def parts(self) -> Parts:
        """By part, over all layers."""
        return _by_part(self.layers.values())

    @property
    def sparse_parameters(self) -> int:
        return self.layers["sparse"]["tables"].parameters

    @property
    def dense_parameters(self) -> int:
        return self.parameters - self.sparse_parameters

    @property
    def parameters(self) -> int:
        return total(self.parts).parameters

    @property
    def mac(self) -> int:
        """Multiply-accumulates of the forward pass per example."""
        return total(self.parts).mac

    @property
    def flop(self) -> int:
        """Training FLOPs per example."""
        return total(self.parts).flop


def _by_part(layers: Iterable[Parts]) -> Parts:
    parts: Parts = {}
    for layer in layers:
        for name, part in layer.items():
            parts[name] = parts.get(name, Part(0)).plus(part)
    return parts


def count(
    config: OverArchConfig,
    columns: EmbeddedColumns,
    numeric: int,
    tables: Iterable[Table],
    modules: TowerSizes | None = None,
    sequences: Iterable[SequenceInput] = (),
    labels: int = 1,
) -> Cost:
    """Parameters and training FLOPs per example of tables, tower modules, input layer and over-arch.

    Args:
        config: the dense model's sizes; behind tower modules its `dim` is the width that they emit.
        columns: what the dense model reads.
        numeric: how many numeric features there are.
        modules: the tower modules (sparse/towers/sizes.py), if there are any.
        sequences: what is read position by position, counted as it is computed, over all positions of each.
        labels: how many are predicted.

    Raises:
        UserError: sizes that do not fit together, or data without features.
    """
    layers = {"sparse": {"tables": Part(sum(table.rows * table.columns for table in tables))}}
    if modules is not None:
        layers["towers"] = count_towers(modules)
    if parts := {f"sequences.{index}": _count_sequence(own, config) for index, own in enumerate(sequences)}:
        layers["sequences"] = parts
    layers["inputs"] = _count_inputs(config, columns, numeric, not shift_of_inputs_vanishes(config, labels > 1))
    n, dense = input_embeddings(columns, numeric, config), config.numeric_embeddings if numeric else 0
    over_arch = _count_over_arch(n, dense, config, headless=labels > 1)
    if labels > 1:
        over_arch |= {"head": _fusion(over_arch["head"]) | count_tasks(_emitted(n, dense, config), config, labels)}
    return Cost(layers | over_arch)


def _fusion(head: Parts) -> Parts:
    """The part of a model's last part that several labels keep."""
    return {name: part for name, part in head.items() if name == "fusion"}


def _emitted(n: int, dense: int, config: OverArchConfig) -> int:
    """Columns that leave a model without the maps that make its logit."""
    match config:
        case WukongConfig():
            return layer_sizes(n, config)[-1].outputs * config.dim
        case DlrmConfig():
            return head_inputs(n, dense, config.dim)
        case DcnConfig():
            return n * config.dim * (2 if config.structure == "parallel" else 1)
        case _:
            return emitted_columns(n, config)


def count_towers(modules: TowerSizes) -> Parts:
    """The module of each tower, `towers.0` and so on."""
    return {f"towers.{t}": _count_tower(modules, t) for t in range(len(modules.inputs))}


def _count_tower(sizes: TowerSizes, tower: int) -> Part:
    features, outputs, width, bias = sizes.inputs[tower], sizes.outputs[tower], sizes.width, sizes.bias
    match sizes.module:
        case DlrmTowerConfig(c=int(c), p=int(p)):
            whole = count_mlp(features * width, [], c * sizes.dim, bias)
            return whole.plus(count_mlp(width, [], p * sizes.dim, bias).times(features))
        case DcnTowerConfig(layers=layers, rank=rank):
            cross = [_count_cross_layer(features * width, rank, bias)["cross"]] * layers
            projection = count_mlp(features * width, [], outputs * sizes.dim, bias)
            return functools.reduce(Part.plus, cross, projection)
        case WukongTowerConfig():
            layer = total(_count_wukong_layer(sizes.interaction(tower), WukongConfig(dim=width, bias=bias)))
            if sizes.dim == width:
                return layer
            return layer.plus(count_mlp(width, [], sizes.dim, bias).times(outputs))
        case _:
            raise AssertionError(f"sizes of {sizes.module!r} are missing")


def _count_sequence(own: SequenceInput, config: ModelConfig) -> Part:
    """A block over all positions, and the map to the width of the model where that is another."""
    columns, positions, settings = own.columns, own.config.max_length, own.config
    if settings.block == "din":
        hidden = DIN_MLP if settings.mlp is None else settings.mlp
        block = (
            count_mlp(columns + 3 * own.target_columns, hidden, 1, config.bias)
            .times(positions)
            .plus(Part(0, positions * columns))
        )
    else:
        every = positions + 1  # with the target: k and v of each position, u and q of the target only
        parameters = 5 * columns**2 + (7 if config.bias else 1) * columns
        parameters += every if settings.position_bias is not False else 0
        block = Part(parameters, 2 * every * columns**2 + 3 * columns**2 + 2 * every * columns)
    if own.width == config.dim:
        return block
    return block.plus(count_mlp(own.width, [], config.dim, config.bias).times(own.embeddings))


def _count_inputs(config: ModelConfig, layout: EmbeddedColumns, numeric: int, last_bias: bool) -> Parts:
    parts = {}
    of_small, of_numeric = input_biases(config, last_bias)
    if layout.small_columns:
        emitted = config.small_embeddings * config.dim
        parts["small_mlp"] = count_mlp(layout.small_columns, config.small_mlp, emitted, of_small)
    if numeric:
        emitted = config.numeric_embeddings * config.dim
        parts["numeric_mlp"] = count_mlp(numeric, config.numeric_mlp, emitted, of_numeric, input_gradient=False)
    return parts


def _count_over_arch(n: int, dense: int, config: OverArchConfig, headless: bool = False) -> dict[str, Parts]:
    """The layers over n embeddings per example; the last `dense` come from numeric features."""
    beside: Parts = {}
    match config:
        case WukongConfig():
            sizes = layer_sizes(n, config)
            biases = last_biases(config, headless)
            layers = [_count_wukong_layer(layer, config, bias) for layer, bias in zip(sizes, biases, strict=True)]
            columns = sizes[-1].outputs * config.dim
        case DlrmConfig():
            layers = [{"dot_products": Part(0, n * n * config.dim)}]
            columns = head_inputs(n, dense, config.dim)
        case DcnConfig():
            columns = n * config.dim
            if config.structure == "parallel":
                beside = {"linear": count_mlp(columns, [], 1, bias=False)}
            layers = [_count_cross_layer(columns, config.rank, config.bias)] * config.layers
        case _:
            return count_baseline(n, config, headless)
    numbered: dict[str, Parts] = {f"layers.{index}": parts for index, parts in enumerate(layers)}
    return numbered | {"head": beside | {"head": count_head(config, columns, config.head)}}


def count_wukong(n: int, config: WukongConfig) -> Parts:
    """The parts of Wukong's over-arch alone, over n embeddings per example and over all its layers."""
    return _by_part(_count_over_arch(n, 0, config).values())


def _count_wukong_layer(layer: LayerSizes, config: WukongConfig, last_bias: bool = True) -> Parts:
    n, d, k = layer.inputs, config.dim, layer.rank
    full, attentive = config.fm == "full", config.projection == "attentive"
    interactions = n * (n if full else k)
    parts = {}
    if full:
        parts["fm"] = Part(0, n * n * d)
    elif attentive:
        m = config.attentive.compressed
        parts["fm"] = Part(n * m, n * m * d + 2 * n * k * d)
        parts["fm_attention"] = count_mlp(m * d, config.attentive.mlp, n * k, config.bias)
    else:
        parts["fm"] = Part(n * k, 2 * n * k * d)
    parts["fm_mlp"] = count_mlp(interactions, layer.mlp, layer.num_fm * d, config.bias)
    parts["lcb"] = Part(n * layer.num_lcb, n * layer.num_lcb * d)
    if layer.outputs != n:
        parts["residual"] = Part(n * layer.outputs, n * layer.outputs * d)
    biases = (interactions if config.bias else 0) + (d if config.bias and last_bias else 0)
    parts["layer_norm"] = Part(interactions + d + biases)
    return parts


def _count_cross_layer(width: int, rank: int | None, bias: bool) -> Parts:
    product = count_mlp(width, [] if rank is None else [rank], width, bias=False)
    return {"cross": product.plus(Part(width if bias else 0))}


def as_json(cost: Cost) -> dict[str, Any]:
    """A cost as `tools/flops.py --json` prints it."""
    return {
        "parameters": {
            "sparse": cost.sparse_parameters,
            "dense": cost.dense_parameters,
            "total": cost.parameters,
        },
        "training_flop_per_example": cost.flop,
        "forward_mac_per_example": cost.mac,
        "parts": {name: _part(part) for name, part in cost.parts.items()},
        "layers": {name: {key: _part(part) for key, part in layer.items()} for name, layer in cost.layers.items()},
    }


def _part(part: Part) -> dict[str, int]:
    return {"parameters": part.parameters, "forward_mac": part.mac, "training_flop": part.flop}
