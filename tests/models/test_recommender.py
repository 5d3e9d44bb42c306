"""The whole dense model: input layer and over-arch in one."""

import pytest
import torch

from megarec.config.sections import WukongConfig
from megarec.models.blocks import KeyedDropout
from megarec.models.recommender import Recommender
from tests.models.layouts import layout

CONFIG = WukongConfig(
    layers=2, dim=8, num_fm=3, num_lcb=3, rank=4, mlp=[16], head=[8], dropout=0.2, small_mlp=[4], numeric_mlp=[4]
)
PLACES = layout(8, [1, 2], [3, 2])


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    numeric = torch.randn(20, 5, generator=generator)
    return numeric, torch.randn(20, PLACES.width, generator=generator).to(dtype), torch.arange(20)


def test_logits_are_the_over_arch_of_the_inputs() -> None:
    model = Recommender(PLACES, 5, CONFIG, embedding_dropout=0.1)
    numeric, embedded, keys = inputs()
    logits = model(numeric, embedded, keys)
    assert logits.shape == (20,) and logits.dtype == torch.float32
    torch.testing.assert_close(logits, model.over_arch(model.inputs(numeric, embedded, keys), keys))


def test_every_dropout_of_the_model_has_its_own_salt() -> None:
    model = Recommender(PLACES, 5, CONFIG, embedding_dropout=0.1)
    salts = [module.salt for module in model.modules() if isinstance(module, KeyedDropout)]
    assert len(salts) == len(set(salts)) == 1 + 2 + 2 + 1


def test_every_parameter_gets_a_gradient() -> None:
    torch.manual_seed(0)
    model = Recommender(PLACES, 5, CONFIG)
    numeric, embedded, keys = inputs()
    model(numeric, embedded.requires_grad_(), keys).square().sum().backward()
    assert embedded.grad is not None and embedded.grad.abs().sum() > 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("received", [torch.float32, torch.bfloat16, torch.float16])
def test_bf16_model_takes_whatever_the_exchange_sends(received: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Recommender(PLACES, 5, CONFIG).eval()
    numeric, embedded, _ = inputs()
    expected = model(numeric, embedded)
    embedded = embedded.to(received).requires_grad_()
    actual = model.bfloat16()(numeric, embedded)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=0.1, atol=0.1)
    actual.sum().backward()
    assert embedded.grad is not None and embedded.grad.dtype == received


def test_equal_seeds_give_equal_models() -> None:
    def state() -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        return Recommender(PLACES, 5, CONFIG).state_dict()

    first, second = state(), state()
    assert all(torch.equal(first[name], second[name]) for name in first)
