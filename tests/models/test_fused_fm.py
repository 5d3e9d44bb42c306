"""Triton's FM + LayerNorm and gradient of W, interpreted on the CPU, against the plain interaction layer."""

import copy
import json
import subprocess
import sys
from unittest.mock import Mock, patch

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megarec.config.models import WukongConfig
from megarec.dense.layers import fuse_layers
from megarec.models import fused_fm
from megarec.models.wukong import InteractionLayer, LayerSizes, Wukong, torch_layer_norm

FM = LayerSizes(inputs=7, num_fm=2, num_lcb=3, rank=3, mlp=[5])


def outputs_and_gradients(layer: InteractionLayer, x: Tensor) -> dict[str, Tensor]:
    """All but the LayerNorm behind the residual, which is torch's either way."""
    x = x.clone().requires_grad_()
    _, projected, fmb = layer.interact(layer, x, None)
    made = {"fmb": fmb, **projected}
    loss = sum((y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum() for y in made.values())
    named = {name: parameter for name, parameter in layer.named_parameters() if not name.startswith("norm.")}
    gradients = torch.autograd.grad(loss, [x, *named.values()])  # type: ignore[arg-type]
    return made | dict(zip(("d x", *named), gradients, strict=True))


def layers(sizes: LayerSizes, dim: int, bias: bool) -> tuple[InteractionLayer, InteractionLayer]:
    torch.manual_seed(sizes.inputs + dim)
    plain = InteractionLayer(sizes, WukongConfig(dim=dim, bias=bias), torch_layer_norm)
    for parameter in plain.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    fused = copy.deepcopy(plain)
    fused_fm.fuse(fused)
    return plain, fused


def assert_same(plain: InteractionLayer, fused: InteractionLayer, x: Tensor) -> None:
    """The plain layer in float64 is the oracle: 1e-5, or four times what the plain layer is off in float32."""
    mine, theirs = outputs_and_gradients(fused, x), outputs_and_gradients(plain, x)
    exact = outputs_and_gradients(plain.double(), x.double())
    assert mine.keys() == exact.keys()
    for name, expected in exact.items():
        error, usual = ((found[name] - expected).abs().max() for found in (mine, theirs))
        assert error <= max(1e-5 * expected.abs().max(), 4 * usual, 1e-6), name


@given(
    batch=st.integers(1, 3),
    n=st.integers(1, 20),
    dim=st.integers(1, 20),
    rank=st.integers(1, 18),
    lcb=st.integers(1, 5),
    bias=st.booleans(),
)
@settings(max_examples=12, deadline=None)
def test_the_numbers_are_those_of_the_plain_layer(
    batch: int, n: int, dim: int, rank: int, lcb: int, bias: bool
) -> None:
    plain, fused = layers(LayerSizes(inputs=n, num_fm=2, num_lcb=lcb, rank=rank, mlp=[5]), dim, bias)
    assert [name for name, _ in fused.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert_same(plain, fused, torch.randn(batch, n, dim))


def test_several_tiles_and_groups_of_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_fm, "_PROGRAMS", 8)
    monkeypatch.setattr(fused_fm, "tile", lambda *sides: {"ROWS": 16, "COLUMNS": 16, "DEPTH": 16})
    plain, fused = layers(LayerSizes(inputs=19, num_fm=2, num_lcb=2, rank=18, mlp=[5]), 17, True)
    assert_same(plain, fused, torch.randn(3, 19, 17))


def test_a_mean_far_from_zero() -> None:
    """Sums of squares would lose the deviation: they are taken from a running mean."""
    x, y = torch.rand(1, 300, 16) + 30, torch.rand(1, 5, 16) + 30
    output, fm, mean, rstd = fused_fm.fm_norm(x, y, torch.ones(1500), None, 1e-5)
    exact = torch.bmm(x.double(), y.double().mT).flatten(1)
    assert mean.shape == rstd.shape == (1, 1)
    torch.testing.assert_close(fm.double(), exact, rtol=1e-6, atol=0.0)
    own = torch.nn.functional.layer_norm(fm.double(), (1500,))
    torch.testing.assert_close(output.double(), own, rtol=1e-4, atol=1e-4)


def test_fp16_rounds_as_the_plain_layer_does() -> None:
    """Not bf16, which Triton's interpreter multiplies as integers; and forward alone: on a CPU torch's LayerNorm keeps
    its mean in 16 bits for its backward pass, on a GPU in float32."""
    plain, fused = layers(LayerSizes(inputs=21, num_fm=2, num_lcb=3, rank=5, mlp=[5]), 24, True)
    x = torch.randn(6, 21, 24).half()
    with torch.no_grad():
        theirs, mine = (layer.half().interact(layer, x, None) for layer in (plain, fused))
    torch.testing.assert_close(mine[2], theirs[2], rtol=1e-2, atol=1e-2)
    assert torch.equal(mine[1]["lcb"], theirs[1]["lcb"])


def test_the_compiler_sees_one_graph() -> None:
    plain, fused = layers(FM, 8, True)
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 7, 8)
    torch.testing.assert_close(compiled(x), plain(x), rtol=1e-5, atol=1e-5)
    compiled(x).sum().backward()


def test_an_empty_batch() -> None:
    plain, fused = layers(FM, 8, True)
    assert fused(torch.randn(0, 7, 8)).shape == plain(torch.randn(0, 7, 8)).shape


def test_compiled_for_sm_90_nothing_spills() -> None:
    """Registers and shared memory: docs/accelerators.md."""
    command = [sys.executable, "-m", "tests.device.sm90", "fm_norm", "weight_gradient"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert len(found) == 5
    for name, of in found.items():
        assert of["spilled_bytes"] == 0 and of["tensor_cores"] and of["registers"] <= 168, name
        assert of["shared_bytes"] <= 48 * 1024, name  # four programs and more share a multiprocessor


CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def test_where_the_kernels_are_used() -> None:
    wukong = Wukong(7, WukongConfig(dim=4, layers=2, num_fm=3, num_lcb=2, rank=2, mlp=[8], head=[8]))
    bf16 = {"bf16": {"enabled": True}}
    assert fuse_layers(wukong, False, bf16, CUDA) == "plain FM: train.fused_kernels=torch"
    assert "this is a cpu" in fuse_layers(wukong, True, bf16, CPU)
    assert "without tensor cores" in fuse_layers(wukong, True, {}, CUDA)
    assert "static Y" in fuse_layers(Wukong(7, WukongConfig(dim=4, layers=1, fm="full")), True, bf16, CUDA)
    assert not any(isinstance(module, fused_fm.FmLayerNorm) for module in wukong.modules())
    with patch.object(type(triton.runtime.driver), "active", Mock()):
        assert fuse_layers(wukong, True, bf16, CUDA) == "FM and LayerNorm in Triton kernels, in 2 layers"
    assert all(isinstance(layer.fmb.norm, fused_fm.FmLayerNorm) for layer in wukong.layers)  # type: ignore[union-attr]
