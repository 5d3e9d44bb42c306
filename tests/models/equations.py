"""What models are tested against: equations written plainly in float64 over a model's parameters by name."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

Parameters = dict[str, Tensor]


def mlp(x: Tensor, p: Parameters, name: str, relu: bool = True) -> Tensor:
    """Linear layers with ReLU between them."""
    count = sum(1 for key in p if key.startswith(f"{name}.linears.") and key.endswith(".weight"))
    for i in range(count):
        x = torch.einsum("bi,oi->bo", x, p[f"{name}.linears.{i}.weight"]) + p.get(f"{name}.linears.{i}.bias", 0)
        x = x.clamp(min=0) if relu and i < count - 1 else x
    return x


def randomise(model: nn.Module, n: int, dim: int) -> Tensor:
    """Make every parameter random in float64 (gains and biases too); returns an input [3, n, dim]."""
    model.double()
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if "norm.weight" in name else 0.0)
    return torch.randn(3, n, dim, dtype=torch.float64, requires_grad=True)


ROUNDING = 100  # times what a change in the last bits makes


def assert_same(model: nn.Module, equations: Callable[[Tensor, Parameters], Tensor], x: Tensor) -> None:
    """Values, and gradients of the input and every parameter, are those of the equations.

    Rounding may be amplified: torch's LayerNorm is x r - mean(x) r, so that over a single number, where it is 0 and so
    is its gradient, it leaves the last bit of x times r = 316, through every further one again. How much, the model
    says itself: it is evaluated again with every number changed in its last bits.
    """
    parameters = dict(model.named_parameters())
    inputs = [x, *parameters.values()]
    weights = torch.randn_like(model(x).detach())

    def evaluated(output: Tensor) -> list[Tensor]:
        return [output.detach(), *torch.autograd.grad(output, inputs, weights)]

    actual, expected = evaluated(model(x)), evaluated(equations(x, parameters))
    allowed = [1e-8 + 1e-6 * other.abs() for other in expected]
    if not _within(actual, expected, allowed):
        for bound, noise in zip(allowed, _noise(model, x, inputs, evaluated, actual), strict=True):
            bound += ROUNDING * noise
    for name, mine, other, bound in zip(["value", "input", *parameters], actual, expected, allowed, strict=True):
        excess = (mine - other).abs() - bound
        assert (excess <= 0).all(), f"{name}: off by up to {float((mine - other).abs().max())} from {other}"


def _within(actual: list[Tensor], expected: list[Tensor], allowed: list[Tensor]) -> bool:
    return all(((a - e).abs() <= most).all() for a, e, most in zip(actual, expected, allowed, strict=True))


def _noise(
    model: nn.Module,
    x: Tensor,
    inputs: list[Tensor],
    evaluated: Callable[[Tensor], list[Tensor]],
    actual: list[Tensor],
) -> list[Tensor]:
    """The largest change of value and gradients over eight changes of all numbers by some units in the last place."""
    kept = [tensor.detach().clone() for tensor in inputs]
    noise = [torch.zeros_like(tensor) for tensor in actual]
    for _ in range(8):
        with torch.no_grad():
            for tensor, own in zip(inputs, kept, strict=True):
                tensor.copy_(own * (1 + 4 * torch.finfo(torch.float64).eps * torch.randn_like(own)))
        moved = evaluated(model(x))
        noise = [torch.maximum(n, (a - m).abs()) for n, a, m in zip(noise, actual, moved, strict=True)]
    with torch.no_grad():
        for tensor, own in zip(inputs, kept, strict=True):
            tensor.copy_(own)
    return noise
