"""Whether rounding can make the losses of two topologies diverge, from the sizes of a run (docs/parity.md).

A ReLU whose input is rounding noise is on in one summation order and off in another. The loss does not see it, but one
example's gradient jumps, and the tables' normalised updates make a full step of the jump. SiLU has no jump.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from megarec.config.sections import DenseConfig, RunConfig
from megarec.config.towers import IdentityTowerConfig
from megarec.dense.settings import settings_of
from megarec.models.blocks import MLP
from megarec.models.inputs import input_biases
from megarec.models.recommender import shift_of_inputs_vanishes, shift_of_some_inputs_vanishes
from megarec.run.spec import ModelSpec
from megarec.sparse.towers.replicas import resolve_optimizer

SWITCHES_PER_INPUT = 1e-7  # fp32, measured: docs/results/parity.md
SMALLEST_EPS = 1e-4  # far above gradients that are rounding errors, 1e-9 to 1e-8


def relu_inputs(model: nn.Module) -> int:
    """Outputs of all hidden layers of a model's MLPs, per example."""
    mlps = [module for module in model.modules() if isinstance(module, MLP) and module.relu]
    hidden = [linear for mlp in mlps for linear in list(mlp.linears)[:-1]]
    return sum(linear.out_features for linear in hidden if isinstance(linear, nn.Linear))


def rounding_warning(config: RunConfig, spec: ModelSpec, steps: int) -> str | None:
    """One line if rounding will make topologies diverge within the run's steps; None: it will not.

    Args:
        spec: the run's model.
        steps: optimizer steps of the run.
    """
    types = _types(config)
    relus = None if types else _relus(config, spec, steps)
    reasons = [*types, relus, _single_rows(spec), _lone_l2(config, spec), _shifts(config, spec)]
    if not any(reasons):
        return None
    text = "; ".join(reason for reason in reasons if reason)
    return f"losses on another topology may differ by more than 1e-5: {text} (docs/parity.md)"


def _types(config: RunConfig) -> list[str]:
    """The types with fewer bits than fp32: their rounding outweighs a switched ReLU."""
    dense, tables, messages = settings_of(config.deepspeed).dtype, config.embedding.weights, config.parallel.messages
    reasons = [] if dense == torch.float32 else [f"{str(dense).removeprefix('torch.')} in the dense model"]
    reasons += [] if tables == "fp32" else [f"embedding.weights={tables!r}"]
    return reasons + ([] if set(messages) == {"fp32"} else [f"parallel.messages={list(messages)}"])


def _relus(config: RunConfig, spec: ModelSpec, steps: int) -> str | None:
    inputs = config.data.batch_size * relu_inputs(spec.meta_model()) if config.model.activation == "relu" else 0
    first = round(1 / (SWITCHES_PER_INPUT * max(inputs, 1)))
    if first >= steps:
        return None
    return (
        f"from about step {first:,} on, as rounding switches one of ten million ReLUs and a step has {inputs:,} "
        "(model.activation='silu' has no switch)"
    )


def _single_rows(spec: ModelSpec) -> str | None:
    """In a Wukong tower of one embedding rounding grows a hundredfold in ten steps, whatever the activation."""
    modules = spec.towers.modules
    if modules is None or modules.module.name != "wukong" or min(modules.inputs) > 1:
        return None
    alone = [str(tower) for tower, inputs in enumerate(modules.inputs) if inputs == 1]
    return f"tower_module.name='wukong' has one embedding in tower {', '.join(alone)}; give it two or more"


def _lone_l2(config: RunConfig, spec: ModelSpec) -> str | None:
    """L2's gradient is the only one of an element that dropout has zeroed; a full step of it is its sign.

    That sign flips by rounding where the element passes zero. A row-wise optimizer measures steps by the whole row.
    """
    embedding = config.embedding
    if not embedding.dropout or embedding.optimizer not in ("adam", "adagrad"):
        return None
    sizes = (
        embedding.looked_up_l2(table.name) * (embedding.initial_std_of(table.name) or (3 * table.rows) ** -0.5)
        for table in spec.layout.tables
    )
    gradient = 2 * max(sizes, default=0.0) / config.data.batch_size
    if gradient <= 2 * embedding.eps:
        return None
    return (
        f"embedding.dropout and l2 leave elements a gradient near {gradient:.0e}, which embedding.eps="
        f"{embedding.eps:g} turns into a full step (embedding.eps=1e-3 does not)"
    )


class _Stepped(NamedTuple):
    """Last biases, and the optimizer that steps them; `key` is where a run states its eps."""

    of: str
    key: str
    optimizer: str
    eps: float


def _shifts(config: RunConfig, spec: ModelSpec) -> str | None:
    """Biases in front of X_0 that BatchNorm behind it cancels: their gradient is only rounding errors.

    The dense model itself has none (`shift_vanishes`), except the input MLPs of an AFN that takes half
    of their output to its neurons; a tower module or a sequence's block is the same for every dense model. Adam at
    a small eps turns such gradients into whole steps.
    """
    sizes, headless = spec.dense_sizes, spec.labels > 1
    some = shift_of_some_inputs_vanishes(sizes, headless)
    if not (some or shift_of_inputs_vanishes(sizes, headless)):
        return None
    found = [own for own in _last_biases(config, spec, some) if own.optimizer != "sgd" and own.eps < SMALLEST_EPS]
    if not found:
        return None
    now = " and ".join(dict.fromkeys(f"{own.key}={own.eps:g}" for own in found))
    remedy = " and ".join(dict.fromkeys(f"{own.key}={SMALLEST_EPS:g}" for own in found))
    return (
        f"model.norm='batch' cancels the last biases of {' and '.join(own.of for own in found)}, and {now} "
        f"makes steps of their gradients, which are rounding errors (model.bias=false, or {remedy}, does not)"
    )


def _last_biases(config: RunConfig, spec: ModelSpec, inputs: bool) -> Iterator[_Stepped]:
    """Those in front of X_0; `inputs`: with those of the input MLPs."""
    dense = ("dense.eps", config.dense.optimizer, config.dense.eps)
    if (given := config.deepspeed.get("optimizer")) is not None:
        eps = given.get("params", {}).get("eps")  # DeepSpeed reports what is wrong with it
        dense = (
            "deepspeed.optimizer.params.eps",
            given["type"].lower(),
            eps if isinstance(eps, float) else DenseConfig().eps,
        )
    if config.model.bias and not isinstance(config.tower_module, IdentityTowerConfig):
        own = resolve_optimizer(config.tower_module, config.dense)
        as_dense = config.tower_module.eps is None and given is None
        yield _Stepped("tower modules", "dense.eps" if as_dense else "tower_module.eps", own.optimizer, own.eps)
    # DIN's weights of positions are no constant, and its sum has no bias; a map to another width has one.
    if config.model.bias and any(s.config.block == "hstu" or s.width != spec.dense_sizes.dim for s in spec.sequences):
        yield _Stepped("model.sequences", *dense)
    of_small, of_numeric = input_biases(spec.dense_sizes, last_bias=inputs)
    if (of_small[-1] and spec.columns.small_columns) or (of_numeric[-1] and spec.numeric):
        yield _Stepped("the input MLPs", *dense)
