"""The dense benchmark compares equal things and reports what scripts rely on."""

import pytest
import torch

from megarec.benchmarks import dense
from megarec.models.wukong import Wukong


def test_the_plain_implementation_computes_the_same() -> None:
    torch.manual_seed(0)
    model = Wukong(dense.EMBEDDINGS, dense.CONFIG).double()
    plain = dense.PlainWukong(model).double()
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in model.parameters())
    x = torch.randn(4, dense.EMBEDDINGS, dense.DIM, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(plain(x), model(x))
    gradients = [torch.autograd.grad(m(x).sum(), x)[0] for m in (plain, model)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_consistent(dtype: torch.dtype) -> None:
    row = dense.measure(dtype, torch.device("cpu"), rounds=1, step_seconds=1e-3)
    assert row["batch"] == dense.BATCHES[0]
    assert 38 < row["forward_mflop_per_example"] < 42
    gflop = row["batch"] * 3 * row["forward_mflop_per_example"] / 1e3
    assert row["wukong"] == pytest.approx(gflop / row["wukong_step_ms"] * 1e3)
    assert row["of_gemm_peak"] == pytest.approx(row["wukong"] / row["gemm_peak"])
    assert row["over_plain"] == pytest.approx(row["plain_step_ms"] / row["wukong_step_ms"])
