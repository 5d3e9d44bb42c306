"""Whether rounding can part the losses of two topologies, from the sizes of a run (docs/parity.md).

A ReLU whose input is rounding noise is on in one summation order and off in another. The loss does not see it, but one
example's gradient jumps, and the tables' normalised updates make a full step of the jump. SiLU has no jump.
"""

from torch import nn

from megarec.config.sections import RunConfig
from megarec.models.blocks import MLP

SWITCHES_PER_INPUT = 1e-7  # fp32, measured: docs/results/parity.md


def relu_inputs(model: nn.Module) -> int:
    """Outputs of all hidden layers of a model's MLPs, per example."""
    mlps = [module for module in model.modules() if isinstance(module, MLP) and module.relu]
    hidden = [linear for mlp in mlps for linear in list(mlp.linears)[:-1]]
    return sum(linear.out_features for linear in hidden if isinstance(linear, nn.Linear))


def rounding_warning(config: RunConfig, model: nn.Module, steps: int) -> str | None:
    """One line where a ReLU will switch by rounding alone within the run's steps; None: it need not be feared.

    Args:
        model: the whole dense model; may lie on the meta device.
        steps: optimizer steps of the run.
    """
    half = any(config.deepspeed.get(key, {}).get("enabled") for key in ("bf16", "fp16"))  # promises less: parity.md
    if config.model.activation != "relu" or half:
        return None
    inputs = config.data.batch_size * relu_inputs(model)
    first = round(1 / (SWITCHES_PER_INPUT * max(inputs, 1)))
    if first >= steps:
        return None
    return (
        f"model.activation='relu' with {inputs:,} ReLU inputs a step: by rounding alone one of ten million switches: "
        f"from about step {first:,} on another topology's losses may differ by more than 1e-5; 'silu' has no "
        "switch (docs/parity.md)"
    )
