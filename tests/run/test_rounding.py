"""`model.activation` reaches every ReLU of every model; a run that rounding will part says so."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megarec.config.models import MODELS
from megarec.config.sections import RunConfig
from megarec.data.schema import CategoricalFeature, Schema
from megarec.errors import UserError
from megarec.models.blocks import MLP
from megarec.models.initial import initialize, materialize
from megarec.run.rounding import relu_inputs, rounding_warning
from megarec.run.spec import resolve
from megarec.sparse.towers.modules import TowerModules

SCHEMA = Schema(
    name="made up",
    categorical=tuple(CategoricalFeature(name=f"f{i}", rows=10) for i in range(4)),
    numeric=("age",),
    rows={},
)


def config_of(model: dict[str, Any], batch_size: int = 64, **sections: Any) -> RunConfig:
    return RunConfig.model_validate({"model": model, "data": {"path": "", "batch_size": batch_size}, **sections})


BF16 = {"deepspeed": {"bf16": {"enabled": True}}}


class Operators(TorchDispatchMode):
    """The names of all operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_has_one_activation(name: str, activation: str) -> None:
    hidden = {} if name in ("lr", "fm", "finalmlp") else {"head": [8]}
    config = config_of({"name": name, "dim": 8, "activation": activation, **hidden})
    model = resolve(config, SCHEMA).meta_model()
    materialize(model, torch.device("cpu"))
    initialize(model, 1)
    with Operators() as operators:
        model(torch.randn(3, 1), torch.randn(3, 32), torch.arange(3))
    expected = set() if name in ("lr", "fm") and not relu_inputs(model) else {activation}
    assert operators.seen & {"relu", "silu"} == expected


def test_the_module_of_a_wukong_tower_has_it_too() -> None:
    towers = {"parallel": {"towers": 2}, "tower_module": {"name": "wukong", "compression": 2}}
    modules = resolve(config_of({"dim": 8, "activation": "silu"}, **towers), SCHEMA).towers.modules
    assert modules is not None
    with Operators() as operators:
        TowerModules(modules, [0, 1])(torch.randn(3, 32))
    assert operators.seen & {"relu", "silu"} == {"silu"}


def test_relu_inputs_are_those_of_hidden_layers() -> None:
    both = torch.nn.Sequential(MLP(3, [5, 7], 2), MLP(2, [], 9), MLP(9, [4], 1, relu=False))
    assert relu_inputs(both) == 12


@pytest.mark.parametrize(
    ("model", "batch_size", "steps", "sections", "warned"),
    [
        ({"name": "dnn", "head": [100], "numeric_mlp": []}, 1000, 1000, {}, True),  # 10^5 a step: 100 steps
        ({"name": "dnn", "head": [100], "numeric_mlp": []}, 1000, 100, {}, False),
        ({"name": "dnn", "head": [100], "numeric_mlp": [], "activation": "silu"}, 1000, 1000, {}, False),
        ({"name": "lr"}, 1000, 1000, {}, False),
    ],
)  # fmt: skip
def test_the_warning(
    model: dict[str, Any], batch_size: int, steps: int, sections: dict[str, Any], warned: bool
) -> None:
    config = config_of(model, batch_size, **sections)
    warning = rounding_warning(config, resolve(config, SCHEMA), steps)
    assert (warning is not None) == warned
    if warning:
        assert "a step has 100,000" in warning and "from about step 100 " in warning and "\n" not in warning


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        (BF16, "bfloat16 in the dense model"),
        ({"deepspeed": {"fp16": {"enabled": True}}}, "float16 in the dense model"),
        ({"deepspeed": {"bf16": True}}, None),  # DeepSpeed refuses it: as everywhere
        ({"embedding": {"weights": "fp16"}}, "embedding.weights='fp16'"),
        ({"parallel": {"messages": ["fp32", "bf16"]}}, "parallel.messages=['fp32', 'bf16']"),
        ({**BF16, "embedding": {"weights": "fp16"}}, "bfloat16 in the dense model; embedding.weights='fp16'"),
    ],
)
def test_types_of_fewer_bits_are_named(sections: dict[str, Any], named: str | None) -> None:
    config = config_of({"name": "lr"}, **sections)
    if named is None:
        with pytest.raises(UserError, match="DeepSpeed refused"):
            rounding_warning(config, resolve(config, SCHEMA), 10)
    else:
        expected = f"losses on another topology may differ by more than 1e-5: {named} (docs/parity.md)"
        assert rounding_warning(config, resolve(config, SCHEMA), 10) == expected


@pytest.mark.parametrize(("towers", "alone"), [(4, "0, 1, 2, 3"), ([["f0"], ["f1", "f2", "f3"]], "0"), (2, None)])
def test_a_wukong_tower_of_one_embedding_is_named(towers: Any, alone: str | None) -> None:
    sections = {"parallel": {"towers": towers}, "tower_module": {"name": "wukong", "compression": 1}}
    config = config_of({"dim": 8, "activation": "silu"}, **sections)
    warning = rounding_warning(config, resolve(config, SCHEMA), 10)
    assert (warning is None) == (alone is None)
    if warning:
        assert f"one embedding in tower {alone};" in warning


KINK = {"optimizer": "adam", "l2": 3e-4, "dropout": 0.2, "initial_std": 0.01}


@pytest.mark.parametrize(
    ("changed", "batch_size", "warned"),
    [
        ({}, 128, True),  # 2 x 3e-4 x 0.01 / 128 = 4.7e-8, five times eps
        ({}, 4_096, False),
        ({"eps": 1e-3}, 128, False),
        ({"optimizer": "adagrad"}, 128, True),
        ({"optimizer": "rowwise_adagrad"}, 128, False),
        ({"optimizer": "sgd"}, 128, False),
        ({"l2": 0.0}, 128, False),
        ({"dropout": 0.0}, 128, False),
        ({"initial_std": None}, 4_096, True),  # tables of 10 rows: 0.18
    ],
)
def test_elements_with_l2_alone(changed: dict[str, Any], batch_size: int, warned: bool) -> None:
    config = config_of({"name": "lr"}, batch_size, embedding={**KINK, **changed})
    warning = rounding_warning(config, resolve(config, SCHEMA), 10)
    assert (warning is not None) == warned
    if warning:
        assert "a gradient near" in warning and "(embedding.eps=1e-3 does not)" in warning


TOWER = {"name": "dcn", "compression": 2}


@pytest.mark.parametrize(
    ("model", "sections", "warned"),
    [
        ({"norm": "batch"}, {}, True),
        ({"norm": "batch", "bias": False}, {}, False),
        ({"norm": "layer"}, {}, False),
        ({"norm": "batch", "head": []}, {}, False),  # no layer, no BatchNorm
        ({"norm": "batch"}, {"dense": {"eps": 1e-4}}, False),
        ({"norm": "batch"}, {"dense": {"optimizer": "sgd"}}, False),
        ({"norm": "batch"}, {"tower_module": {"name": "identity"}}, False),
        ({"norm": "batch"}, {"dense": {"eps": 1e-4}, "tower_module": {**TOWER, "eps": 1e-8}}, True),
        ({"norm": "batch"}, {"tower_module": {**TOWER, "optimizer": "sgd"}}, False),
        ({"norm": "batch", "name": "dlrm"}, {}, False),  # products of embeddings see every constant
    ],
)
def test_constants_that_batch_norm_takes_away(model: dict[str, Any], sections: dict[str, Any], warned: bool) -> None:
    sections = {"tower_module": TOWER, "parallel": {"towers": 2}, **sections}
    config = config_of({"name": "dnn", "dim": 8, "activation": "silu", "head": [8], **model}, **sections)
    warning = rounding_warning(config, resolve(config, SCHEMA), 10)
    assert (warning is not None) == warned
    if warning:
        assert "the last biases of tower modules" in warning and "model.bias=false" in warning


LISTS = SCHEMA.model_copy(
    update={
        "categorical": (*SCHEMA.categorical, CategoricalFeature(name="past", rows=10, multi_valued=True, newest="last"))
    }
)
PAIRS = {"embedding": {"features": {f"f{i}": {"embeddings": 2} for i in range(4)}}}
AFN = {"name": "afn", "embeddings": "separate", "numeric_embeddings": 2, "mlp": []}
BY_DEEPSPEED = {"deepspeed": {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}}


@pytest.mark.parametrize(
    ("model", "sections", "message"),
    [
        ({"block": "din"}, {}, None),
        ({"block": "hstu"}, {}, "model.sequences, and dense.eps=1e-08 makes"),
        ({"block": "hstu"}, BY_DEEPSPEED, "or deepspeed.optimizer.params.eps=0.0001, does not"),
        (AFN, PAIRS, "the input MLPs"),
        (AFN | {"head": []}, PAIRS, None),
        (AFN | {"bias": False}, PAIRS, None),
        (AFN | {"embeddings": "shared"}, {}, None),
    ],
)
def test_whose_gradients_are_rounding_errors_is_warned_of(
    model: dict[str, Any], sections: dict[str, Any], message: str | None
) -> None:
    """The warning is there where a last bias in front of X_0 has a gradient that is 0 except for rounding."""
    if "block" in model:
        entry = {"features": ["past"], "target": ["f0"], "max_length": 4, **model}
        model = {"name": "dnn", "sequences": [entry]}
    config = config_of({"dim": 8, "activation": "silu", "head": [8], "norm": "batch", **model}, **sections)
    spec = resolve(config, LISTS if "sequences" in model else SCHEMA)
    built = spec.meta_model()
    materialize(built, torch.device("cpu"))
    initialize(built, 1)
    built.double()
    given = torch.randn(32, spec.numeric).double(), torch.randn(32, built.width).double()
    built(*given, torch.arange(32)).square().sum().backward()
    biases = {name: own.grad for name, own in built.named_parameters() if name.endswith("bias")}
    vanishing = [name for name, gradient in biases.items() if gradient is not None and (gradient.abs() < 1e-11).any()]
    warning = rounding_warning(config, spec, 10)
    assert bool(vanishing) == (message is not None), vanishing
    assert message in warning if message and warning else warning is None
