"""Whether rounding can part the losses of two topologies, from the sizes of a run (docs/parity.md).

A ReLU whose input is rounding noise is on in one summation order and off in another. The loss does not see it, but one
example's gradient jumps, and the tables' normalised updates make a full step of the jump. SiLU has no jump.
"""

import torch
from torch import nn

from megarec.config.sections import RunConfig
from megarec.dense.settings import settings_of
from megarec.models.blocks import MLP
from megarec.models.recommender import shift_of_inputs_vanishes
from megarec.run.spec import ModelSpec

SWITCHES_PER_INPUT = 1e-7  # fp32, measured: docs/results/parity.md
SMALLEST_EPS = 1e-4  # far above gradients that are rounding errors, 1e-9 to 1e-8


def relu_inputs(model: nn.Module) -> int:
    """Outputs of all hidden layers of a model's MLPs, per example."""
    mlps = [module for module in model.modules() if isinstance(module, MLP) and module.relu]
    hidden = [linear for mlp in mlps for linear in list(mlp.linears)[:-1]]
    return sum(linear.out_features for linear in hidden if isinstance(linear, nn.Linear))


def rounding_warning(config: RunConfig, spec: ModelSpec, steps: int) -> str | None:
    """One line where rounding will part topologies within the run's steps; None: it need not be feared.

    Args:
        spec: the run's model.
        steps: optimizer steps of the run.
    """
    types = _types(config)
    relus = None if types else _relus(config, spec, steps)
    reasons = [*types, relus, _single_rows(spec), _lone_l2(config, spec), _shifts(config, spec)]
    if not any(reasons):
        return None
    said = "; ".join(reason for reason in reasons if reason)
    return f"losses on another topology may differ by more than 1e-5: {said} (docs/parity.md)"


def _types(config: RunConfig) -> list[str]:
    """The types with fewer bits than fp32: beside their rounding a switched ReLU is nothing."""
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
        f"embedding.dropout and l2 leave elements a gradient near {gradient:.0e}, of which embedding.eps="
        f"{embedding.eps:g} makes a full step (embedding.eps=1e-3 does not)"
    )


def _shifts(config: RunConfig, spec: ModelSpec) -> str | None:
    """Biases in front of X_0 that BatchNorm behind it takes away: their gradient is rounding errors alone.

    Those of the dense model itself are not there (`shift_vanishes`); a tower module or a sequence's block is built for
    every dense model alike. Adam at a small eps makes whole steps of such gradients.
    """
    in_front = [*(["tower modules"] if spec.towers.modules else []), *(["model.sequences"] if spec.sequences else [])]
    vanishes = config.model.bias and shift_of_inputs_vanishes(spec.dense_sizes, spec.labels > 1)
    adaptive = config.dense.optimizer != "sgd" and config.dense.eps < SMALLEST_EPS
    if not (in_front and vanishes and adaptive):
        return None
    return (
        f"model.norm='batch' takes away what the last biases of {' and '.join(in_front)} add, and dense.eps="
        f"{config.dense.eps:g} makes steps of the rounding errors that are their gradients (model.bias=false, or "
        f"dense.eps={SMALLEST_EPS:g}, does not)"
    )
