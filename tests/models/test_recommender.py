"""The whole dense model: input layer and over-arch in one."""

import pytest
import torch
from pydantic import TypeAdapter
from torch.nn.functional import binary_cross_entropy_with_logits

from megarec.config.models import BASELINES, DcnConfig, DlrmConfig, OverArchConfig, WukongConfig
from megarec.models.blocks import KeyedDropout
from megarec.models.recommender import Recommender
from tests.models.layouts import layout

SIZES = {"layers": 2, "num_fm": 3, "num_lcb": 3, "rank": 4, "mlp": [16]}
COMMON = {"dim": 8, "head": [8], "dropout": 0.2, "small_mlp": [4], "numeric_mlp": [4]}
CONFIG = WukongConfig.model_validate(SIZES | COMMON)
CONFIGS: list[OverArchConfig] = [
    CONFIG,
    DlrmConfig.model_validate({"name": "dlrm"} | COMMON),
    DcnConfig.model_validate({"name": "dcn", "layers": 2, "rank": 4} | COMMON),
    DcnConfig.model_validate({"name": "dcn", "layers": 1, "rank": None} | COMMON),
]
HIDDEN = [2, 0, 2, 0]  # dropouts of each beside those of embeddings, small, numeric and head
HEADLESS = {key: value for key, value in COMMON.items() if key != "head"}
BASELINE_SIZES: dict[str, tuple[dict[str, object], int]] = {
    "lr": (HEADLESS, -1),
    "fm": (HEADLESS, -1),
    "dnn": (COMMON, 0),
    "deepfm": (COMMON, 0),
    "xdeepfm": (COMMON | {"cin": [5, 4]}, 0),
    "autoint": (COMMON | {"layers": 2, "attention_dim": 4}, 0),
    "masknet": (COMMON | {"mask": 8, "width": 8}, 3),
    "finalmlp": (HEADLESS | {"mlp1": [8, 8], "mlp2": [8], "gates": [[0], []], "gate_mlp": [8]}, 2),
    "afn": (COMMON | {"neurons": 6, "mlp": [8]}, 1),
}
for name, (sizes, hidden) in BASELINE_SIZES.items():
    CONFIGS.append(BASELINES[name].model_validate({"name": name} | sizes))
    HIDDEN.append(hidden)
PLACES = layout(8, [1, 2], [3, 2])


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    numeric = torch.randn(20, 5, generator=generator)
    return numeric, torch.randn(20, PLACES.width, generator=generator).to(dtype), torch.arange(20)


@pytest.mark.parametrize("config", CONFIGS)
def test_logits_are_the_over_arch_of_the_inputs(config: OverArchConfig) -> None:
    model = Recommender(PLACES, 5, config, embedding_dropout=0.1)
    numeric, embedded, keys = inputs()
    logits = model(numeric, embedded, keys)
    assert logits.shape == (20,) and logits.dtype == torch.float32
    torch.testing.assert_close(logits, model.over_arch(model.inputs(numeric, embedded, keys), keys))


@pytest.mark.parametrize(("config", "hidden"), zip(CONFIGS, HIDDEN, strict=True))
def test_every_dropout_of_the_model_has_its_own_salt(config: OverArchConfig, hidden: int) -> None:
    """One for the embeddings and for each hidden layer: small, numeric, head, and those of the interaction layers."""
    model = Recommender(PLACES, 5, config, embedding_dropout=0.1)
    salts = [module.salt for module in model.modules() if isinstance(module, KeyedDropout)]
    assert len(salts) == len(set(salts)) == 4 + hidden


@pytest.mark.parametrize("config", CONFIGS)
def test_every_parameter_gets_a_gradient(config: OverArchConfig) -> None:
    torch.manual_seed(0)
    model = Recommender(PLACES, 5, config)
    numeric, embedded, keys = inputs()
    model(numeric, embedded.requires_grad_(), keys).square().sum().backward()
    assert embedded.grad is not None and embedded.grad.abs().sum() > 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("received", [torch.float32, torch.bfloat16, torch.float16])
def test_bf16_model_takes_whatever_the_exchange_sends(config: OverArchConfig, received: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Recommender(PLACES, 5, config).eval()
    numeric, embedded, _ = inputs()
    expected = model(numeric, embedded)
    embedded = embedded.to(received).requires_grad_()
    actual = model.bfloat16()(numeric, embedded)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=0.1, atol=0.1)
    actual.sum().backward()
    assert embedded.grad is not None and embedded.grad.dtype == received


@pytest.mark.parametrize("config", CONFIGS)
def test_equal_seeds_give_equal_models(config: OverArchConfig) -> None:
    def state() -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        return Recommender(PLACES, 5, config).state_dict()

    first, second = state(), state()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("heads", [None, "shared", "mmoe"])
@pytest.mark.parametrize("name", ["wukong", "dlrm", "dcn", *BASELINES])
def test_before_batch_norm_no_gradient_is_rounding_errors_alone(name: str, heads: str | None) -> None:
    """Adam at a small eps would make whole steps of it: such a parameter is not there."""
    torch.manual_seed(1)
    sizes = {"name": name, "dim": 4, "norm": "batch", "activation": "silu", "tasks": {"name": heads or "shared"}}
    sizes |= {} if name in ("lr", "fm", "finalmlp") else {"head": [5, 5]}
    sizes |= {"wukong": {"layers": 2, "num_fm": 3, "num_lcb": 2, "rank": 2, "mlp": [6]}}.get(name, {})
    sizes |= {"finalmlp": {"mlp1": [4], "mlp2": [6, 4]}, "afn": {"neurons": 5, "mlp": [6]}}.get(name, {})
    config: OverArchConfig = TypeAdapter(OverArchConfig).validate_python(sizes)
    model = Recommender(layout(4, [1, 1, 1], [6]), 3, config, labels=2 if heads else 1).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    logits = model(torch.randn(32, 3), torch.randn(32, 18), torch.arange(32))
    labels = torch.randint(2, logits.shape).to(logits.dtype)
    binary_cross_entropy_with_logits(logits, labels).backward()
    largest = {key: float(value.grad.abs().max()) for key, value in model.named_parameters() if value.grad is not None}
    assert len(largest) == len(list(model.parameters()))
    assert not {key: gradient for key, gradient in largest.items() if gradient < 1e-9}
