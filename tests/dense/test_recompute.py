"""Recomputed layers keep less and give the same numbers. (At every ZeRO stage: tests/parity.)"""

import pytest
import torch
from torch import Tensor

from megarec.config.models import DlrmConfig, WukongConfig
from megarec.dense.layers import Recompute, recompute_layers
from megarec.dense.memory import saved_activations
from megarec.errors import UserError
from megarec.models.dlrm import Dlrm
from megarec.models.initial import initialize
from megarec.models.wukong import Wukong

CONFIG = WukongConfig(dim=16, layers=3, num_fm=8, num_lcb=8, rank=8, mlp=[64, 64], head=[32], dropout=0.2)
EMBEDDINGS, BATCH = 40, 32


def step(policy: Recompute, dtype: torch.dtype) -> tuple[int, list[Tensor]]:
    model = Wukong(EMBEDDINGS, CONFIG)
    initialize(model, seed=2)
    model.to(dtype)
    recompute_layers(model, policy)
    x = torch.randn(BATCH, EMBEDDINGS, CONFIG.dim, generator=torch.Generator().manual_seed(1)).to(dtype)
    x.requires_grad_()
    kept: dict[str, int] = {}
    with saved_activations(kept, model):
        logits = model(x, torch.arange(BATCH))
    logits.sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) == len(list(model.parameters())) and x.grad is not None
    return kept["bytes"], [logits.detach(), x.grad, *gradients]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("policy", ["selective", "full"])
def test_the_numbers_are_the_same(policy: Recompute, dtype: torch.dtype) -> None:
    _, expected = step("none", dtype)
    _, found = step(policy, dtype)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-2 if dtype is torch.bfloat16 else 1e-12, atol=1e-2 if dtype is torch.bfloat16 else 1e-12
        )


def test_full_keeps_the_inputs_of_the_layers_alone() -> None:
    none, _ = step("none", torch.float32)
    full, _ = step("full", torch.float32)
    inputs = 4 * BATCH * CONFIG.dim * (EMBEDDINGS + 16 + 16)
    head = 4 * BATCH * (16 * CONFIG.dim + 3 * 32) + 8 * BATCH  # its input, three activations, dropout keys
    assert full <= inputs + head + 4 * BATCH * 32
    assert full < none / 3


def test_selective_keeps_inputs_and_products() -> None:
    selective, _ = step("selective", torch.float32)
    none, _ = step("none", torch.float32)
    expected = 0
    for n, projected in ((EMBEDDINGS, 8 + 8 + 16), (16, 8 + 8), (16, 8 + 8)):  # Y^T and W_L, in the first layer W_R
        input_and_projection = (n + projected) * CONFIG.dim
        expected += input_and_projection + n * 8 + 64 + 64 + 8 * CONFIG.dim  # and FM(X), the MLP's three products
    head = 16 * CONFIG.dim + 3 * 32 + 2  # as in the test above, with the keys
    assert 0 <= selective - 4 * BATCH * expected <= 4 * BATCH * (head + 32)
    assert selective < none


def test_what_the_backward_pass_computes_again_is_not_counted() -> None:
    model = Wukong(EMBEDDINGS, CONFIG)
    recompute_layers(model, "full")
    forward: dict[str, int] = {}
    whole_step: dict[str, int] = {}
    x = torch.randn(BATCH, EMBEDDINGS, CONFIG.dim, requires_grad=True)
    with saved_activations(whole_step, model):
        with saved_activations(forward, model):
            logits = model(x, torch.arange(BATCH))
        logits.sum().backward()
    with saved_activations(whole_step, model):
        model(x, torch.arange(BATCH)).sum().backward()
    assert whole_step == forward


def test_a_model_without_interaction_layers_is_refused() -> None:
    with pytest.raises(UserError, match=r"dense\.recompute='full'"):
        recompute_layers(Dlrm(5, 1, DlrmConfig(name="dlrm", dim=8, head=[8])), "full")
    recompute_layers(Dlrm(5, 1, DlrmConfig(name="dlrm", dim=8, head=[8])), "none")
