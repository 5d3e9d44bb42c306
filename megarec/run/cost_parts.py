"""The parts of a model's analytic cost: parameters and multiply-accumulates of a part, and of an MLP."""

import functools
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from megarec.config.base import ModelConfig, Norm

FLOP_PER_MAC = 2
PASSES = 3  # forward, gradient of the input, gradient of the weight


class Part(NamedTuple):
    """One part of a model, per example.

    Attributes:
        parameters: how many.
        mac: multiply-accumulates of the forward pass.
        unneeded: those of the backward pass that are left out, because nothing needs the gradient of the input.
    """

    parameters: int
    mac: int = 0
    unneeded: int = 0

    @property
    def flop(self) -> int:
        """Training FLOPs per example."""
        return FLOP_PER_MAC * (PASSES * self.mac - self.unneeded)

    def plus(self, other: "Part") -> "Part":
        return Part(self.parameters + other.parameters, self.mac + other.mac, self.unneeded + other.unneeded)

    def times(self, uses: int) -> "Part":
        """The same parameters used several times an example."""
        return Part(self.parameters, self.mac * uses, self.unneeded * uses)


Parts = dict[str, Part]


def total(parts: Parts) -> Part:
    """The sum of some parts."""
    return functools.reduce(Part.plus, parts.values(), Part(0))


def count_mlp(
    inputs: int,
    hidden: Sequence[int],
    outputs: int,
    bias: bool | Sequence[bool],
    *,
    input_gradient: bool = True,
    norm: Norm = "none",
) -> Part:
    """An MLP, with biases in all its layers or by layer; without `input_gradient` nothing needs that of its input.

    Args:
        norm: follows every hidden layer, with a gain and, where the layers have one, a bias; in BatchNorm it is theirs.
    """
    macs = [a * b for a, b in pairwise([inputs, *hidden, outputs])]
    by_layer = [bias] * len(macs) if isinstance(bias, bool) else bias
    biases = sum(width for width, has_bias in zip([*hidden, outputs], by_layer, strict=True) if has_bias)
    if norm != "none":
        of_norm = [1 + (has_bias and norm != "batch") for has_bias in by_layer]
        biases += sum(width * more for width, more in zip(hidden, of_norm, strict=False))
    return Part(sum(macs) + biases, sum(macs), 0 if input_gradient else macs[0])


def count_head(config: ModelConfig, inputs: int, hidden: Sequence[int], outputs: int = 1) -> Part:
    """An MLP that ends in the logit (models/blocks.py, `head_of`)."""
    return count_mlp(inputs, hidden, outputs, config.bias, norm=config.norm)


def count_tasks(columns: int, config: ModelConfig, labels: int) -> Parts:
    """Experts, gates and towers of several labels (models/multi_task.py) over what the dense model emits."""
    sizes = config.tasks
    *hidden, width = sizes.expert
    experts, gates = Part(0), Part(0)

    def add(inputs: int, count: int, mixed: Sequence[int]) -> None:
        nonlocal experts, gates
        for _ in range(count):
            experts = experts.plus(count_mlp(inputs, hidden, width, config.bias))
        for number in mixed:
            gates = gates.plus(Part(inputs * number, (inputs + width) * number))

    inputs = columns
    if sizes.name == "mmoe":
        add(columns, sizes.experts, [sizes.experts] * labels)
        inputs = width
    if sizes.name == "ple":
        everyone = sizes.experts + labels * sizes.own_experts
        for level in range(sizes.levels):
            mixed = [sizes.experts + sizes.own_experts] * labels + [everyone] * (level + 1 < sizes.levels)
            add(inputs, everyone, mixed)
            inputs = width
    towers = functools.reduce(Part.plus, [count_head(config, inputs, config.head)] * labels)
    parts = {"experts": experts, "gates": gates, "towers": towers}
    return {name: part for name, part in parts.items() if part.parameters}
