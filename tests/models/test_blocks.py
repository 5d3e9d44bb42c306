"""MLP, its initialisation, and keyed dropout: against plain formulas and statistics."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from megarec.config.base import Activation
from megarec.models.blocks import MLP, KeyedDropout, hashed_lanes, number_dropouts

MASK_64 = (1 << 64) - 1


def kept(keys: Tensor, p: float, columns: int, salt: int = 0, first_column: int = 0) -> Tensor:
    """Where the dropout keeps, float64 [B, columns] of 0 and 1."""
    dropout = KeyedDropout(p, salt)
    dropout.first_column = first_column
    return (dropout(torch.ones(len(keys), columns), keys) != 0).double()


def plain_lane(key: int, salt: int, column: int) -> int:
    """The hash in plain integers modulo 2^64; only the middle shift copies the sign."""

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK_64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK_64
        return x ^ (x >> 31)

    golden = 0x9E3779B97F4A7C15
    row = mix((mix((key + golden) & MASK_64) + salt * golden) & MASK_64)
    x = row ^ mix((column // 4 * golden + 0x6A09E667F3BCC909) & MASK_64)
    x = x * 0xD6E8FEB86659FD93 & MASK_64
    signs = MASK_64 << 32 & MASK_64 if x >> 63 else 0
    x = (x ^ (x >> 32 | signs)) * 0xFF51AFD7ED558CCD & MASK_64
    lane = x >> 16 * (column % 4) & 0xFFFF
    return lane - (1 << 16) if lane >> 15 else lane


@given(
    key=st.integers(-(2**63), 2**63 - 1),
    salt=st.integers(0, 2**31),
    first=st.integers(0, 20),
    columns=st.integers(1, 9),
)
@settings(max_examples=50, deadline=None)
def test_hash_is_the_plain_one(key: int, salt: int, first: int, columns: int) -> None:
    lanes = hashed_lanes(torch.tensor([key]), salt, columns, first)
    assert lanes.tolist() == [[plain_lane(key, salt, first + column) for column in range(columns)]]


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("stride", [1, 2**20, 2**40])
def test_keep_rate(p: float, stride: int) -> None:
    examples, columns = 4096, 256
    mask = kept(torch.arange(examples) * stride, p, columns)
    deviation = mask.sum() - (1 - p) * mask.numel()
    assert abs(deviation) < 5 * math.sqrt(p * (1 - p) * mask.numel())
    # per example and per column as scattered as a binomial: neither more (streaks) nor less (a lattice)
    for sums, trials in ((mask.sum(0), examples), (mask.sum(1), columns)):
        squared_z = (sums - (1 - p) * trials).square() / (p * (1 - p) * trials)
        assert abs(squared_z.mean() - 1) < 6 * math.sqrt(3 / len(sums))


def assert_uncorrelated(mask: Tensor) -> None:
    """The rows of a 0/1 matrix look independent: correlations are no larger, nor more spread, than by chance."""
    rows, trials = mask.shape
    centred = mask - mask.mean(1, keepdim=True)
    normed = centred / centred.norm(dim=1, keepdim=True)
    upper = torch.triu_indices(rows, rows, 1)
    z = (normed @ normed.T)[upper[0], upper[1]] * math.sqrt(trials)
    assert z.abs().max() < 6.5
    assert abs(z.mean()) < 6 / math.sqrt(len(z))
    assert abs(z.square().mean() - 1) < 0.05


@pytest.mark.parametrize("stride", [1, 2**16, 2**48 + 1])
def test_columns_keys_and_salts_are_independent(stride: int) -> None:
    keys = torch.arange(20_000) * stride
    assert_uncorrelated(kept(keys, 0.3, 256).T)
    assert_uncorrelated(kept(keys[:256], 0.3, 20_000))
    assert_uncorrelated(torch.stack([kept(keys[:200], 0.3, 100, salt).flatten() for salt in range(256)]))


def test_products_of_masks_are_independent() -> None:
    """Third order: the agreement of two columns does not determine a third one."""
    mask = kept(torch.arange(20_000), 0.5, 130) - 0.5
    assert_uncorrelated(torch.cat([(mask[:, 0:128:2] * mask[:, 1:128:2]).T, (mask[:, 2:] * mask[:, :-2]).T[64:]]))
    keys = (kept(torch.arange(130), 0.5, 20_000) - 0.5).T
    assert_uncorrelated(torch.cat([(keys[:, 0:128:2] * keys[:, 1:128:2]).T, (keys[:, 2:] * keys[:, :-2]).T[64:]]))


def test_a_slice_of_the_batch_has_the_slice_of_the_mask() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randint(-(2**62), 2**62, (64,), generator=generator)
    order = torch.randperm(64, generator=generator)
    whole = kept(keys, 0.4, 37, salt=5)
    assert torch.equal(kept(keys[order][:10], 0.4, 37, salt=5), whole[order][:10])
    assert not torch.equal(kept(keys, 0.4, 37, salt=6), whole)


@given(start=st.integers(0, 12), columns=st.integers(1, 13))
@settings(max_examples=30, deadline=None)
def test_a_shard_of_the_columns_has_the_shard_of_the_mask(start: int, columns: int) -> None:
    keys = torch.arange(50)
    whole = kept(keys, 0.5, 25)
    assert torch.equal(kept(keys, 0.5, columns, first_column=start), whole[:, start : start + columns])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dropout_scales_values_and_gradients(dtype: torch.dtype) -> None:
    x = torch.randn(30, 4, 5, dtype=dtype, requires_grad=True)
    keys = torch.arange(30)
    out = KeyedDropout(0.25)(x, keys)
    mask = kept(keys, 0.25, 20).view(30, 4, 5)
    assert out.dtype == dtype and 0 < mask.mean() < 1
    torch.testing.assert_close(out, (mask * x.double() / 0.75).to(dtype))
    weights = torch.randn_like(x)
    (gradient,) = torch.autograd.grad(out, x, weights)
    torch.testing.assert_close(gradient, (mask * weights.double() / 0.75).to(dtype))


def test_dropout_off() -> None:
    x = torch.randn(3, 4)
    assert KeyedDropout(0.0)(x, None) is x
    assert KeyedDropout(0.5).eval()(x, None) is x
    with pytest.raises(ValueError, match="keys"):
        KeyedDropout(0.5)(x, None)


def test_extreme_rates() -> None:
    keys = torch.arange(1000)
    assert kept(keys, 1e-9, 100).mean() == 1
    assert kept(keys, 1 - 1e-9, 100).mean() < 1e-3


def test_the_mask_needs_no_random_state() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    kept(torch.arange(10), 0.5, 10)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_dropout_gets_its_own_salt() -> None:
    model = nn.Sequential(MLP(4, [4, 4], 4, dropout=0.5), MLP(4, [4], 4, dropout=0.5))
    number_dropouts(model)
    assert [module.salt for module in model.modules() if isinstance(module, KeyedDropout)] == [0, 1, 2]


PLAIN: dict[Activation, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: x.clamp(min=0),
    "silu": lambda x: x / (1 + (-x).exp()),
    "gelu": lambda x: x * (1 + (x / 2**0.5).erf()) / 2,
    "leaky_relu": lambda x: torch.where(x > 0, x, 0.01 * x),
    "tanh": lambda x: 1 - 2 / ((2 * x).exp() + 1),
    "sigmoid": lambda x: 1 / (1 + (-x).exp()),
}


@given(
    widths=st.lists(st.integers(1, 6), min_size=2, max_size=5),
    bias=st.booleans(),
    p=st.sampled_from([0.0, 0.4]),
    activation=st.sampled_from(list(PLAIN)),
)
@settings(max_examples=40, deadline=None)
def test_mlp(widths: list[int], bias: bool, p: float, activation: Activation) -> None:
    mlp = MLP(widths[0], widths[1:-1], widths[-1], bias=bias, dropout=p, activation=activation).double()
    number_dropouts(mlp)
    assert all(type(linear) is nn.Linear for linear in mlp.linears)
    keys = torch.arange(5) + 100
    x = expected = torch.randn(5, widths[0], dtype=torch.float64)
    for i in range(len(widths) - 1):
        expected = expected @ mlp.get_parameter(f"linears.{i}.weight").T
        if bias:
            expected = expected + mlp.get_parameter(f"linears.{i}.bias")
        if i < len(widths) - 2:
            expected = PLAIN[activation](expected)
            expected = expected * kept(keys, p, widths[i + 1], salt=i) / (1 - p)
    torch.testing.assert_close(mlp(x, keys), expected)
    assert len(list(mlp.parameters())) == (len(widths) - 1) * (2 if bias else 1)


def test_mlp_initialisation_follows_the_fan_in() -> None:
    torch.manual_seed(0)
    mlp = MLP(300, [500, 200], 400)
    for index, variance in enumerate((2 / 300, 2 / 500, 1 / 200)):
        weight = mlp.get_parameter(f"linears.{index}.weight")
        assert abs(weight.var() / variance - 1) < 6 * math.sqrt(2 / weight.numel())
        assert abs(weight.mean()) < 6 * math.sqrt(variance / weight.numel())
        assert mlp.get_parameter(f"linears.{index}.bias").abs().max() == 0
