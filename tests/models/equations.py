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


def assert_same(model: nn.Module, equations: Callable[[Tensor, Parameters], Tensor], x: Tensor) -> None:
    """Values, and gradients of the input and every parameter, are those of the equations."""
    parameters = dict(model.named_parameters())
    actual, expected = model(x), equations(x, parameters)
    torch.testing.assert_close(actual, expected)
    weights = torch.randn_like(actual)
    inputs = [x, *parameters.values()]
    gradients = torch.autograd.grad(actual, inputs, weights)
    for name, gradient, other in zip(
        ["input", *parameters], gradients, torch.autograd.grad(expected, inputs, weights), strict=True
    ):
        torch.testing.assert_close(gradient, other, rtol=1e-6, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")
