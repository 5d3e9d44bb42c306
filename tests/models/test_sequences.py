"""DIN and the HSTU layer against their equations in float64, written out for one example and one position at a time."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from megarec.config.base import SequenceConfig
from megarec.config.models import DnnConfig
from megarec.models.inputs import OverArchInput
from megarec.models.recommender import Recommender
from megarec.models.sequences import SequenceInput, SequenceLayer
from megarec.models.wukong import torch_layer_norm
from megarec.run.cost import count

BATCH, WIDTH, POSITIONS = 4, 6, 5
LENGTHS = (0, 2, 5, 1)


def settings(block: str, **more: Any) -> SequenceConfig:
    return SequenceConfig(features=["a", "b"], target=["c", "d"], block=block, max_length=POSITIONS, **more)  # type: ignore[arg-type]


CASES = {
    "din": settings("din", mlp=[7, 3]),
    "din linear": settings("din", mlp=[]),
    "hstu": settings("hstu", heads=3),
    "hstu without positions": settings("hstu", position_bias=False),
}
CASES |= {f"{name}, one target": config.model_copy(update={"target": ["c"]}) for name, config in CASES.items()}


def layer(config: SequenceConfig, dim: int = WIDTH, *, bias: bool = True) -> SequenceLayer:
    """Of one sequence behind eight pooled columns and the embeddings of two targets, all weights random."""
    torch.manual_seed(3)
    targets = (8, 8 + WIDTH)[: len(config.target)]
    start = 8 + 2 * WIDTH
    own = SequenceInput(config, WIDTH, start, start + POSITIONS * 2 * WIDTH, targets)
    made = SequenceLayer([own], start, 8, DnnConfig(name="dnn", dim=dim, bias=bias), torch_layer_norm).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    return made


def arriving() -> tuple[Tensor, list[Tensor]]:
    """[B, columns] as the exchange pads it, and of every example the rows that are there."""
    torch.manual_seed(4)
    pooled = torch.randn(BATCH, 8 + 2 * WIDTH, dtype=torch.float64)
    lists = [torch.randn(n, 2 * WIDTH, dtype=torch.float64) for n in LENGTHS]
    padded = [torch.cat([own, own.new_zeros(POSITIONS - len(own), 2 * WIDTH)]).flatten() for own in lists]
    mask = torch.tensor([[1.0] * n + [0.0] * (POSITIONS - n) for n in LENGTHS], dtype=torch.float64)
    return torch.cat([pooled, torch.stack(padded), mask], dim=1), lists


def mlp(linears: nn.ModuleList, x: Tensor) -> Tensor:
    for linear in linears[:-1]:
        x = torch.relu(linear.weight @ x + linear.bias)
    return linears[-1].weight @ x + linears[-1].bias


def din(made: SequenceLayer, rows: Tensor, t: Tensor) -> Tensor:
    """Zhou et al. 2018, equation 3: v = sum of a(e_j, v_A) e_j, jagged: over the rows that are there."""
    total = torch.zeros(2 * WIDTH, dtype=t.dtype)
    for h in rows:
        compared = h[: len(t)]
        unit: Any = made.blocks[0].unit
        total = total + mlp(unit.linears, torch.cat([h, t, compared - t, compared * t])) * h
    return total


def hstu(made: SequenceLayer, rows: Tensor, t: Tensor) -> Tensor:
    """Zhai et al. 2024, equations 1 to 3, for the whole sequence of the example, with the target last; its
    row, and what the model adds of its input."""
    block: Any = made.blocks[0]
    heads, bias = block.heads, block.position_bias
    t = torch.cat([t, torch.zeros(2 * WIDTH - len(t), dtype=t.dtype)])  # of the past alone: not known of the target
    x = [*rows.flip(0), t]  # in time: the oldest first
    silu = lambda z: z / (1 + torch.exp(-z))  # noqa: E731
    k, v, u, q = zip(*(silu(block.f1.weight @ own + block.f1.bias).chunk(4) for own in x), strict=True)
    parts = []
    for head in range(heads):
        columns = slice(head * len(t) // heads, (head + 1) * len(t) // heads)
        attended = torch.zeros(len(t) // heads, dtype=t.dtype)
        for j in range(len(x)):
            age = len(x) - 1 - j
            score = q[-1][columns] @ k[j][columns] + (0 if bias is None else bias[age])
            attended = attended + silu(score) / (POSITIONS + 1) * v[j][columns]
        parts.append(attended)
    y = torch.cat(parts)
    normed = (y - y.mean()) / torch.sqrt(y.var(correction=0) + 1e-5) * block.norm.weight + block.norm.bias
    return t + block.f2.weight @ (normed * u[-1]) + block.f2.bias


@pytest.mark.parametrize("name", CASES)
def test_blocks_are_their_equations_in_values_and_gradients(name: str) -> None:
    made, (embedded, lists) = layer(CASES[name]), arriving()
    embedded.requires_grad_()
    rows = [own.clone().requires_grad_() for own in lists]
    equation = din if name.startswith("din") else hstu
    found = made(embedded)
    targets = embedded.detach()[:, 8 : 8 + 2 * WIDTH].clone().requires_grad_()
    columns = WIDTH * len(CASES[name].target)
    expected = torch.stack([equation(made, own, t[:columns]) for own, t in zip(rows, targets, strict=True)])
    torch.testing.assert_close(found[:, 8 : 8 + 2 * WIDTH], expected, rtol=1e-11, atol=1e-11)
    assert torch.equal(found[:, :8], embedded[:, :8]) and torch.equal(
        found[:, 8 + 2 * WIDTH :], embedded[:, 8 : 8 + 12]
    )

    weight = torch.randn_like(expected)
    parameters = list(made.parameters())
    mine = torch.autograd.grad((found[:, 8 : 8 + 2 * WIDTH] * weight).sum(), [embedded, *parameters])
    its = torch.autograd.grad((expected * weight).sum(), [targets, *rows, *parameters], allow_unused=True)
    torch.testing.assert_close(mine[0][:, 8 : 8 + 2 * WIDTH], its[0], rtol=1e-10, atol=1e-10)
    start = 8 + 2 * WIDTH
    by_position = mine[0][:, start : start + POSITIONS * 2 * WIDTH].view(BATCH, POSITIONS, -1)
    for example, own in enumerate(its[1 : 1 + BATCH]):
        if own is not None:
            torch.testing.assert_close(by_position[example, : LENGTHS[example]], own, rtol=1e-10, atol=1e-10)
    for own, other in zip(mine[1:], its[1 + BATCH :], strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-10)
    assert not mine[0][:, start + POSITIONS * 2 * WIDTH :].any(), "the mask has no gradient"


@pytest.mark.parametrize("name", CASES)
def test_more_padding_changes_nothing_of_din_and_only_the_count_of_hstu(name: str) -> None:
    """Jagged equals padded: what lies at an empty position is of no account."""
    made, (embedded, _) = layer(CASES[name]), arriving()
    start = 8 + 2 * WIDTH
    other = embedded.clone()
    block = other[:, start : start + POSITIONS * 2 * WIDTH].view(BATCH, POSITIONS, 2 * WIDTH)
    for example, length in enumerate(LENGTHS):
        block[example, length:] = 7.0
    torch.testing.assert_close(made(other), made(embedded), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dim", [WIDTH, 4])
@pytest.mark.parametrize("name", CASES)
def test_cost_is_what_torch_counts(name: str, dim: int, bias: bool) -> None:
    config = DnnConfig(name="dnn", dim=dim, head=[5], bias=bias)
    start = 8 + 2 * WIDTH
    start += -start % dim
    own = SequenceInput(CASES[name], WIDTH, start, start + POSITIONS * 2 * WIDTH, (0, WIDTH)[: len(CASES[name].target)])
    columns = OverArchInput(dim, start // dim + 2, 0)
    cost = count(config, columns, 0, (), None, [own])
    model = Recommender(columns, 0, config, sequences=[own])
    assert model.width == start + POSITIONS * (2 * WIDTH + 1)
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(BATCH, 0), torch.randn(BATCH, model.width, requires_grad=True)).sum().backward()
    assert cost.dense_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert cost.flop * BATCH == counter.get_total_flops()
    assert list(cost.layers["sequences"]) == ["sequences.0"]
    assert cost.flop > count(config, dataclasses.replace(columns), 0, ()).flop
