"""DLRM against its equations, written plainly in float64: values and gradients of the input and every parameter."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megarec.config.models import DlrmConfig
from megarec.errors import UserError
from megarec.models.blocks import KeyedDropout
from megarec.models.dlrm import Dlrm
from tests.models.equations import Parameters, assert_same, mlp, randomise

size = st.integers(1, 4)


@st.composite
def configs(draw: st.DrawFn, **fixed: object) -> DlrmConfig:
    drawn = {"name": "dlrm", "dim": draw(size), "head": draw(st.lists(size, max_size=2)), "bias": draw(st.booleans())}
    return DlrmConfig.model_validate(drawn | fixed)


def dlrm(x: Tensor, p: Parameters, dense: int) -> Tensor:
    """The equations of the paper: the dense vectors, then x_i . x_j for all i > j."""
    n = x.shape[1]
    columns = [x[:, i] for i in range(n - dense, n)]
    columns += [(x[:, i] * x[:, j]).sum(1, keepdim=True) for i in range(n) for j in range(i)]
    return mlp(torch.cat(columns, dim=1), p, "head").reshape(-1)


@given(n=st.integers(1, 6), dense=st.integers(0, 3), config=configs(), seed=st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_values_and_gradients(n: int, dense: int, config: DlrmConfig, seed: int) -> None:
    assume(dense <= n and n + dense > 1)
    torch.manual_seed(seed)
    model = Dlrm(n, dense, config)
    x = randomise(model, n, config.dim)
    assert_same(model, lambda x, p: dlrm(x, p, dense), x)


def test_one_embedding_and_no_number_is_a_user_error() -> None:
    with pytest.raises(UserError, match=r"model\.name='dlrm' over one embedding"):
        Dlrm(1, 0, DlrmConfig(name="dlrm"))


def test_without_bias_no_parameter_is_one() -> None:
    assert all("bias" not in name for name, _ in Dlrm(3, 1, DlrmConfig(name="dlrm", bias=False)).named_parameters())


def test_dropout_masks_follow_the_examples_and_differ_between_layers() -> None:
    torch.manual_seed(0)
    model = Dlrm(4, 1, DlrmConfig(name="dlrm", dim=4, head=[16, 16], dropout=0.5)).double()
    dropouts = [module for module in model.modules() if isinstance(module, KeyedDropout)]
    assert [dropout.salt for dropout in dropouts] == [0, 1]
    x, keys = torch.randn(12, 4, 4, dtype=torch.float64), torch.arange(12)
    order = torch.tensor([7, 2, 9])
    torch.testing.assert_close(model(x[order], keys[order]), model(x, keys)[order])
    assert not torch.allclose(model(x, keys + 1), model(x, keys))
