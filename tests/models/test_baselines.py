"""Every baseline against its paper's equations, written plainly in float64: values and gradients of all it has."""

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megarec.config.models import (
    BASELINES,
    AfnConfig,
    AutoIntConfig,
    BaselineConfig,
    FinalMlpConfig,
    MaskNetConfig,
    XDeepFmConfig,
)
from megarec.errors import UserError
from megarec.models.baselines.afn import Afn
from megarec.models.baselines.finalmlp import FinalMlp
from megarec.models.baselines.fm import pair_products
from megarec.models.blocks import KeyedDropout
from megarec.models.recommender import build_over_arch
from tests.models.equations import Parameters, assert_same, mlp, randomise
from tests.models.test_wukong import layer_norm

size = st.integers(1, 4)
widths = st.lists(size, max_size=2)
some_widths = st.lists(size, min_size=1, max_size=3)


@st.composite
def configs(draw: st.DrawFn, names: tuple[str, ...] = tuple(BASELINES), **fixed: object) -> BaselineConfig:
    """Small sizes; gates by the first embedding and by a learned vector, and shared embeddings, fit every n."""
    name = draw(st.sampled_from(names))
    drawn: dict[str, object] = {"name": name, "dim": draw(size), "bias": draw(st.booleans())}
    if name not in ("lr", "fm", "finalmlp"):
        drawn["head"] = draw(widths)
    if name == "xdeepfm":
        drawn["cin"] = draw(some_widths)
    if name == "autoint":
        drawn |= {key: draw(size) for key in ("layers", "heads", "attention_dim")}
    if name == "masknet":
        drawn |= {key: draw(size) for key in ("blocks", "mask", "width")}
    if name == "finalmlp":
        heads = draw(st.integers(1, 3))
        drawn |= {f"mlp{i}": [*draw(widths), heads * draw(st.integers(1, 3))] for i in (1, 2)}
        drawn |= {"fusion_heads": heads, "gate_mlp": draw(widths), "gates": draw(st.sampled_from([None, [[0], []]]))}
    if name == "afn":
        drawn |= {"neurons": draw(size), "mlp": draw(widths), "epsilon": draw(st.sampled_from([1e-5, 0.5]))}
    return BASELINES[name].model_validate(drawn | fixed)


def flat(x: Tensor) -> Tensor:
    return x.reshape(len(x), -1)


def pairs(x: Tensor) -> Tensor:
    """sum over i < j of x_i . x_j, pair by pair."""
    total = torch.zeros(len(x), dtype=x.dtype)
    for i, j in itertools.combinations(range(x.shape[1]), 2):
        total = total + (x[:, i] * x[:, j]).sum(1)
    return total


def dnn(x: Tensor, p: Parameters, config: BaselineConfig) -> Tensor:
    return mlp(flat(x), p, "head")[:, 0]


def lr(x: Tensor, p: Parameters, config: BaselineConfig) -> Tensor:
    """sum over i of w_i . x_i + b."""
    (w,) = p["head.linears.0.weight"].reshape(1, *x.shape[1:])
    return sum((x[:, i] @ w[i] for i in range(x.shape[1])), p.get("head.linears.0.bias", torch.zeros(1)))


def fm(x: Tensor, p: Parameters, config: BaselineConfig) -> Tensor:
    return lr(x, p, config) + pairs(x)


def deepfm(x: Tensor, p: Parameters, config: BaselineConfig) -> Tensor:
    return mlp(flat(x), p, "linear")[:, 0] + pairs(x) + dnn(x, p, config)


def xdeepfm(x: Tensor, p: Parameters, config: BaselineConfig) -> Tensor:
    """X^k_h = sum over i, j of W^k_hij (X^{k-1}_i * X^0_j); p^k_h its sum over d."""
    assert isinstance(config, XDeepFmConfig)
    maps, pooled = x, []
    for k, outputs in enumerate(config.cin):
        w = p[f"layers.{k}.compress.weight"].reshape(outputs, maps.shape[1], x.shape[1])
        maps = torch.einsum("hij,bid,bjd->bhd", w, maps, x)
        pooled.append(maps.sum(2))
    cin = mlp(torch.cat(pooled, dim=1), p, "cin_output")[:, 0]
    return mlp(flat(x), p, "linear")[:, 0] + cin + dnn(x, p, config)


def autoint(x: Tensor, p: Parameters, config: BaselineConfig) -> Tensor:
    """a_mk = softmax over k of (W_Q x_m) . (W_K x_k), by head; x'_m = ReLU(concat_h sum_k a_mk W_V x_k + W_Res x_m)."""
    assert isinstance(config, AutoIntConfig)
    y, a = x, config.attention_dim
    for i in range(config.layers):
        w_q, w_k, w_v, w_res = p[f"layers.{i}.projection.weight"].split(config.heads * a)
        heads = []
        for h in range(config.heads):
            q, k, v = (torch.einsum("bmi,oi->bmo", y, w[h * a : h * a + a]) for w in (w_q, w_k, w_v))
            scores = torch.einsum("bmo,bko->bmk", q, k)
            scores = (scores - scores.detach().amax(2, keepdim=True)).exp()  # does not overflow, and is the same
            heads.append(torch.einsum("bmk,bko->bmo", scores / scores.sum(2, keepdim=True), v))
        y = (torch.cat(heads, dim=2) + torch.einsum("bmi,oi->bmo", y, w_res)).clamp(min=0)
    return mlp(flat(y), p, "attention_output")[:, 0] + dnn(x, p, config)


def masknet(x: Tensor, p: Parameters, config: BaselineConfig) -> Tensor:
    """out = ReLU(LN(W (mask * LN_EMB(x)))) for each block, side by side."""
    assert isinstance(config, MaskNetConfig)
    normed = torch.cat([layer_norm(x[:, i], p, "norm") for i in range(x.shape[1])], dim=1)
    blocks = []
    for b in range(config.blocks):
        masked = mlp(flat(x), p, f"layers.{b}.mask") * normed
        blocks.append(layer_norm(mlp(masked, p, f"layers.{b}.hidden"), p, f"layers.{b}.norm").clamp(min=0))
    return mlp(torch.cat(blocks, dim=1), p, "head")[:, 0]


def finalmlp(x: Tensor, p: Parameters, config: BaselineConfig) -> Tensor:
    """b + w_1 . o_1 + w_2 . o_2 + sum over heads of o_1j^T W_j o_2j over streams gated by 2 sigmoid(MLP(context))."""
    assert isinstance(config, FinalMlpConfig)
    outputs = []
    for s in range(2):
        h = flat(x)
        if config.gates is not None:
            places = config.gates[s]
            context = torch.cat([x[:, i] for i in places], 1) if places else p[f"gates.{s}.context"].repeat(len(x), 1)
            h = h * 2 / (1 + (-mlp(context, p, f"gates.{s}.mlp")).exp())
        outputs.append(mlp(h, p, f"streams.{s}").clamp(min=0))
    logit = mlp(torch.cat(outputs, dim=1), p, "head")[:, 0]
    parts = [o.chunk(config.fusion_heads, dim=1) for o in outputs]
    for o1, o2, w in zip(*parts, p["fusion.weight"].chunk(config.fusion_heads), strict=True):
        logit = logit + torch.einsum("bp,pq,bq->b", o1, w, o2)
    return logit


def afn(x: Tensor, p: Parameters, config: BaselineConfig) -> Tensor:
    """z_j = prod over i of (normalised |x_i|)^w_ji: as exp of the sum of logarithms, element by element."""
    assert isinstance(config, AfnConfig)
    log_part, deep = (x[:, ::2], x[:, 1::2]) if config.embeddings == "separate" else (x, x)
    logs = layer_norm(flat(log_part.abs().clamp(min=config.epsilon).log()), p, "layers.0.log_norm").reshape(
        log_part.shape
    )
    powers = logs.exp()  # [B, n, d]
    products = [(powers ** w[:, None]).prod(dim=1) for w in p["layers.0.powers.weight"]]
    z = torch.stack(products, dim=2)  # [B, d, N]
    return mlp(layer_norm(flat(z), p, "layers.0.exp_norm"), p, "mlp")[:, 0] + dnn(deep, p, config)


EQUATIONS: dict[str, Callable[[Tensor, Parameters, BaselineConfig], Tensor]] = {
    "lr": lr,
    "fm": fm,
    "dnn": dnn,
    "deepfm": deepfm,
    "xdeepfm": xdeepfm,
    "autoint": autoint,
    "masknet": masknet,
    "finalmlp": finalmlp,
    "afn": afn,
}


@pytest.mark.parametrize("name", BASELINES)
@given(data=st.data(), n=st.integers(1, 4), seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_values_and_gradients(name: str, data: st.DataObject, n: int, seed: int) -> None:
    config = data.draw(configs((name,)))
    if name == "finalmlp" and data.draw(st.booleans()):
        places = st.lists(st.integers(0, n - 1), max_size=2)
        config = config.model_copy(update={"gates": (data.draw(places), data.draw(places))})
    if name == "afn" and n % 2 == 0:
        config = config.model_copy(update={"embeddings": data.draw(st.sampled_from(["shared", "separate"]))})
    torch.manual_seed(seed)
    model = build_over_arch(n, 0, config)
    x = randomise(model, n, config.dim)
    assert_same(model, lambda x, p: EQUATIONS[name](x, p, config), x)


def test_three_embeddings_have_three_products() -> None:
    x = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]])
    assert pair_products(x).tolist() == [(3 + 8) + (5 + 12) + (15 + 24)]


@given(config=configs())
@settings(max_examples=40, deadline=None)
def test_without_bias_no_parameter_is_one(config: BaselineConfig) -> None:
    model = build_over_arch(2, 0, config.model_copy(update={"bias": False}))
    assert not [name for name, _ in model.named_parameters() if "bias" in name]


@given(config=configs(dropout=0.5))
@settings(max_examples=30, deadline=None)
def test_dropout_masks_follow_the_examples(config: BaselineConfig) -> None:
    torch.manual_seed(0)
    model = build_over_arch(3, 0, config).double()
    salts = [module.salt for module in model.modules() if isinstance(module, KeyedDropout)]
    assert salts == list(range(len(salts)))
    x, keys = torch.randn(12, 3, config.dim, dtype=torch.float64), torch.arange(12)
    order = torch.tensor([7, 2, 9])
    torch.testing.assert_close(model(x[order], keys[order]), model(x, keys)[order])


@pytest.mark.parametrize("name", ["dnn", "deepfm", "xdeepfm", "autoint", "masknet", "finalmlp", "afn"])
def test_dropout_reaches_the_mlps(name: str) -> None:
    config = BASELINES[name].model_validate({"name": name, "dim": 4, "dropout": 0.5})
    model = build_over_arch(3, 0, config)
    x, keys = torch.randn(12, 3, 4), torch.arange(12)
    assert not torch.allclose(model(x, keys), model(x, keys + 1))
    with pytest.raises(ValueError, match="needs the keys"):
        model(x)


def test_a_zero_embedding_is_kept_finite() -> None:
    model = Afn(3, AfnConfig(name="afn", dim=4))
    x = torch.zeros(2, 3, 4, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_sizes_that_do_not_fit_are_user_errors() -> None:
    with pytest.raises(UserError, match=r"fusion_heads=3 does not divide the last width 8 of model\.mlp2"):
        FinalMlp(2, FinalMlpConfig(name="finalmlp", dim=4, mlp1=[9], mlp2=[8], fusion_heads=3))
    with pytest.raises(
        UserError, match=r"model\.gates names place 2, but X_0 has 2 embeddings here: places are 0 to 1"
    ):
        FinalMlp(2, FinalMlpConfig(name="finalmlp", dim=4, gates=([0], [2])))
    with pytest.raises(UserError, match=r"'separate' takes X_0's embeddings in pairs, but there are 3"):
        Afn(3, AfnConfig(name="afn", embeddings="separate"))
