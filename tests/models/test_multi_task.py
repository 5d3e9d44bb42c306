"""Heads for several labels against their papers' equations, over every model, and a label that is left out."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from megarec.config.base import TasksConfig
from megarec.config.models import MODELS, OverArchConfig
from megarec.models.multi_task import TaskHeads
from megarec.models.recommender import Recommender, build_over_arch
from tests.models.equations import Parameters, assert_same, mlp, randomise
from tests.models.layouts import layout

LABELS, COLUMNS = 3, 6
SIZES = {
    "shared": {"name": "shared"},
    "mmoe": {"name": "mmoe", "experts": 3, "expert": [5, 4]},
    "cgc": {"name": "ple", "experts": 2, "own_experts": 2, "expert": [4]},
    "ple": {"name": "ple", "experts": 2, "own_experts": 1, "levels": 3, "expert": [5, 4]},
    "esmm": {"name": "esmm"},
}
SMALL = {
    "wukong": {"layers": 1, "num_fm": 2, "num_lcb": 2, "rank": 2, "mlp": [4]},
    "xdeepfm": {"cin": [3, 2]},
    "autoint": {"layers": 2, "heads": 2, "attention_dim": 3},
    "masknet": {"blocks": 2, "mask": 4, "width": 3},
    "finalmlp": {"mlp1": [4], "mlp2": [4], "fusion_heads": 2},
    "afn": {"neurons": 3, "mlp": [4]},
    "dcn": {"layers": 2, "rank": 3},
}


def config_of(name: str, heads: str) -> OverArchConfig:
    head = {} if name in ("lr", "fm", "finalmlp") else {"head": [5]}
    return MODELS[name].model_validate({"name": name, "dim": 4, "tasks": SIZES[heads], **head, **SMALL.get(name, {})})


def experts(x: Tensor, p: Parameters, name: str) -> list[Tensor]:
    count = len({key.split(".")[name.count(".") + 2] for key in p if key.startswith(f"{name}.mlps.")})
    return [mlp(x, p, f"{name}.mlps.{i}").clamp(min=0) for i in range(count)]


def mixed(x: Tensor, p: Parameters, gate: str, of: list[Tensor]) -> Tensor:
    scores = torch.exp(x @ p[f"{gate}.weight.weight"].T)
    shares = scores / scores.sum(1, keepdim=True)
    return sum((shares[:, [i]] * expert for i, expert in enumerate(of)), torch.zeros(()))


def equations(heads: str) -> Callable[[Tensor, Parameters], Tensor]:
    """[B, R] -> logits [B, T], written as the papers write them."""

    def evaluated(x_BR: Tensor, p: Parameters) -> Tensor:
        x = x_BR.flatten(1)
        of_task = [x] * LABELS
        if heads == "mmoe":
            of_task = [mixed(x, p, f"gates.{k}", experts(x, p, "experts")) for k in range(LABELS)]
        if heads in ("cgc", "ple"):
            shared = x
            levels = int(SIZES[heads].get("levels", 1))
            for j in range(levels):
                own = [experts(of_task[k], p, f"levels.{j}.own.{k}") for k in range(LABELS)]
                common = experts(shared, p, f"levels.{j}.shared")
                of_task = [mixed(of_task[k], p, f"levels.{j}.gates.{k}", own[k] + common) for k in range(LABELS)]
                if j + 1 < levels:
                    everyone = [expert for some in own for expert in some] + common
                    shared = mixed(shared, p, f"levels.{j}.shared_gate", everyone)
        logits = [mlp(of_task[k], p, f"towers.{k}").squeeze(1) for k in range(LABELS)]
        if heads == "esmm":
            probabilities = torch.stack([torch.sigmoid(logit) for logit in logits], dim=1).cumprod(1)
            return torch.log(probabilities / (1 - probabilities))
        return torch.stack(logits, dim=1)

    return evaluated


class InFloat64(TaskHeads):
    """A logit is float32 in a run, of whatever type its model is."""

    def forward(self, x_BR: Tensor, keys: Tensor | None = None) -> Tensor:
        """With the logits of float64."""
        kept, Tensor.float = Tensor.float, Tensor.double  # type: ignore[method-assign]
        try:
            return super().forward(x_BR.flatten(1), keys)
        finally:
            Tensor.float = kept  # type: ignore[method-assign]


@pytest.mark.parametrize("heads", SIZES)
def test_heads_are_the_papers_equations(heads: str) -> None:
    torch.manual_seed(1)
    model = InFloat64(COLUMNS, config_of("dnn", heads), LABELS)
    x = randomise(model, 1, COLUMNS)
    assert_same(model, equations(heads), x)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_emits_what_its_logit_is_made_of(name: str) -> None:
    """A linear map of what leaves without the head is the model's logit, for those whose last map is linear."""
    torch.manual_seed(2)
    config = config_of(name, "shared").model_copy(update={"head": [], **({"mlp": []} if name == "afn" else {})})
    whole, cut = (build_over_arch(3, 1, config, headless=headless).double() for headless in (False, True))
    for parameter in whole.parameters():
        nn.init.normal_(parameter, std=0.5)
    names = dict(whole.named_parameters())
    cut.load_state_dict({key: names[key].detach() for key, _ in cut.named_parameters()})
    x = torch.randn(4 * 40, 3, 4, dtype=torch.float64)
    with torch.no_grad():
        emitted, logits = cut(x), whole(x)
    assert emitted.shape == (len(x), cut.columns)
    inputs = torch.cat([emitted, torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
    found = inputs @ torch.linalg.lstsq(inputs, logits.unsqueeze(1), driver="gelsd").solution
    assert (found.squeeze(1) - logits).abs().max() < 1e-8 * logits.abs().max()


def test_a_large_negative_logit_loses_nothing_in_esmm() -> None:
    heads = TaskHeads(2, config_of("lr", "esmm"), 2)
    for tower, bias in zip(heads.towers, (-40.0, 30.0), strict=True):
        tower.linears[0].weight.data.zero_()  # type: ignore[union-attr,operator,index]
        tower.linears[0].bias.data.fill_(bias)  # type: ignore[union-attr,operator,index]
    assert heads(torch.ones(1, 2)).tolist() == [[-40.0, -40.0]]


@pytest.mark.parametrize("name", ["wukong", "fm"])
@pytest.mark.parametrize("heads", SIZES)
def test_a_label_left_out_changes_nothing_for_the_others(name: str, heads: str) -> None:
    """Its own weights are NaN, and every gradient is what it is where its loss counts for nothing."""
    torch.manual_seed(3)
    places = layout(4, [1, 1], [])
    model = Recommender(places, 1, config_of(name, heads), labels=LABELS)
    assert model.tasks is not None
    for task, parameter in model.tasks.own_parameters():
        parameter.register_hook(lambda gradient, task=task: model.tasks.switch.of_parameter(gradient, task))
    numeric, embedded = torch.randn(5, 1), torch.randn(5, 8, requires_grad=True)
    faulty = LABELS - 1  # of ESMM the products before it do not hold it
    wanted = torch.autograd.grad(model(numeric, embedded)[:, :faulty].sum(), embedded)[0]

    for task, parameter in model.tasks.own_parameters():
        if task == faulty:
            parameter.data.fill_(torch.nan)
    logits = model(numeric, embedded)
    assert logits[:, faulty].isnan().all() and logits[:, :faulty].isfinite().all()
    model.tasks.switch.kept = torch.tensor([True] * faulty + [False])
    losses = torch.stack([logits[:, :faulty].sum(), logits[:, faulty].sum()])
    losses.where(torch.tensor([True, False]), 0.0).sum().backward()
    assert embedded.grad is not None and torch.equal(embedded.grad, wanted)
    for _, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all()


def test_heads_of_one_label_are_the_model_itself() -> None:
    config = config_of("wukong", "mmoe")
    model = Recommender(layout(4, [1, 1], []), 1, config)
    assert model.tasks is None and [f.name for f in dataclasses.fields(layout(4, [1], []))]
    assert isinstance(config.tasks, TasksConfig) and model(torch.ones(2, 1), torch.ones(2, 8)).shape == (2,)
