"""Several labels over one dense model: its output x goes through experts and gates to an MLP a label, its tower.

    shared   logit_k = h_k(x)                                    Ma et al. 2018 (MMoE, KDD), section 3.1, shared-bottom
    mmoe     logit_k = h_k(f_k(x))                               section 4.2
             f_k(x)  = sum over i of g_ki(x) f_i(x)
             g_k(x)  = softmax(W_k x)
    ple      logit_k = h_k(x_kL)                                 Tang et al. 2020 (RecSys), sections 4.1 and 4.2
             x_kj    = softmax(W_kj x_k(j-1)) (E_kj(x_k(j-1)), E_sj(x_s(j-1)))
             x_sj    = softmax(W_sj x_s(j-1)) (all E_1j .. E_Tj, E_sj)           not in the last level
             x_k0    = x_s0 = x                                  one level: CGC
    esmm     p_k     = product over i <= k of sigmoid(h_i(x))    Ma et al. 2018 (arXiv 1804.07931), eq. 1

h_k are the towers (hidden widths model.head), f_i and E the experts, each an MLP with an activation behind every layer.
x is the whole input of the model's last maps, products before they are summed: for FM flatten(X_0) and the products of
pairs by column of d, for FinalMLP both streams and their fusion by column.

ESMM's labels are of the whole space, each implies the one before it: click, then click and conversion. So its second
output is pCTCVR, and the plain loss of both outputs is eq. 3; pCVR is the quotient of both. As a logit the product is
-log(e^-u + e^-c + e^-(u + c)), u that of the product before and c the tower's: without cancellation.

A label whose loss is not finite is left out of a backward pass (`TaskSwitch`): its part of the gradient is cut off at
its logit and wherever it would enter shared parts. In PLE all but the last level is shared: a label's own
experts reach the others there through the shared gate.

Shape suffixes: B examples, R columns of x, K experts that a gate mixes, W columns of an expert, T labels.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megarec.config.base import ModelConfig
from megarec.models.blocks import activation_function, head_of, init_fan_in_, mlp_of


class TaskSwitch:
    """The labels of a backward pass.

    Attributes:
        kept: bool [T], read as the gradient arrives; None: all.
    """

    def __init__(self) -> None:
        self.kept: Tensor | None = None

    def cut(self, x: Tensor, task: int) -> Tensor:
        """x itself; its gradient from here is 0 if the label is left out."""
        cut: Tensor = _Cut.apply(x, self, task)
        return cut

    def of_parameter(self, gradient: Tensor, task: int) -> Tensor:
        """The gradient of a label's own parameter."""
        return gradient if self.kept is None else gradient.where(self.kept[task], 0.0)


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, switch: TaskSwitch, task: int) -> Tensor:
        ctx.switch, ctx.task = switch, task
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.switch.of_parameter(grads[0], ctx.task), None, None


class Experts(nn.Module):
    """K MLPs side by side, each with an activation behind every layer."""

    def __init__(self, count: int, inputs: int, config: ModelConfig) -> None:
        super().__init__()
        *hidden, self.columns = config.tasks.expert
        self.mlps = nn.ModuleList(mlp_of(config, inputs, hidden, self.columns) for _ in range(count))
        self.activation = activation_function(config.activation)

    def forward(self, x_BR: Tensor, keys: Tensor | None) -> Tensor:
        """[B, R] -> [B, K, W]."""
        return self.activation(torch.stack([mlp(x_BR, keys) for mlp in self.mlps], dim=1))


class Gate(nn.Module):
    """softmax(W x), which mixes experts."""

    def __init__(self, inputs: int, experts: int) -> None:
        super().__init__()
        self.weight = nn.Linear(inputs, experts, bias=False)
        init_fan_in_(self.weight.weight, inputs)

    def forward(self, x_BR: Tensor, experts_BKW: Tensor) -> Tensor:
        """[B, R] and [B, K, W] -> [B, W]."""
        return torch.bmm(self.weight(x_BR).softmax(1).unsqueeze(1), experts_BKW).squeeze(1)


class Level(nn.Module):
    """One extraction network of PLE.

    Args:
        inputs: R, of x_1 .. x_T and of x_s.
        last: nothing reads x_s behind it.
    """

    def __init__(self, inputs: int, config: ModelConfig, labels: int, last: bool) -> None:
        super().__init__()
        sizes = config.tasks
        self.shared = Experts(sizes.experts, inputs, config)
        self.own = nn.ModuleList(Experts(sizes.own_experts, inputs, config) for _ in range(labels))
        self.gates = nn.ModuleList(Gate(inputs, sizes.own_experts + sizes.experts) for _ in range(labels))
        all_experts = labels * sizes.own_experts + sizes.experts
        self.shared_gate = None if last else Gate(inputs, all_experts)

    def forward(
        self, x_BR: Sequence[Tensor], shared_BR: Tensor, keys: Tensor | None, switch: TaskSwitch | None
    ) -> tuple[list[Tensor], Tensor]:
        """x_1 .. x_T and x_s of the level before -> of this one, [B, W] each."""
        shared = self.shared(shared_BR, keys)
        own = [experts(x, keys) for experts, x in zip(self.own, x_BR, strict=True)]
        mixed = [
            gate(x, torch.cat([experts, _cut(switch, shared, task)], dim=1))
            for task, (gate, x, experts) in enumerate(zip(self.gates, x_BR, own, strict=True))
        ]
        if self.shared_gate is None:
            return mixed, shared_BR
        return mixed, self.shared_gate(shared_BR, torch.cat([*own, shared], dim=1))


def _cut(switch: TaskSwitch | None, x: Tensor, task: int) -> Tensor:
    return x if switch is None else switch.cut(x, task)


class TaskHeads(nn.Module):
    """From what the dense model emits to a logit a label; it knows no process group.

    Args:
        columns: R.
        config: `tasks` says which heads; `head` are the towers' hidden widths.
        labels: T.

    Attributes:
        switch: the labels of the next backward pass.
    """

    def __init__(self, columns: int, config: ModelConfig, labels: int) -> None:
        super().__init__()
        sizes = config.tasks
        self.kind, self.switch = sizes.name, TaskSwitch()
        inputs = sizes.expert[-1] if self.kind in ("mmoe", "ple") else columns
        if self.kind == "mmoe":
            self.experts = Experts(sizes.experts, columns, config)
            self.gates = nn.ModuleList(Gate(columns, sizes.experts) for _ in range(labels))
        if self.kind == "ple":
            self.levels = nn.ModuleList(
                Level(inputs if level else columns, config, labels, level + 1 == sizes.levels)
                for level in range(sizes.levels)
            )
        self.towers = nn.ModuleList(head_of(config, inputs, config.head) for _ in range(labels))

    def own_parameters(self) -> Iterator[tuple[int, nn.Parameter]]:
        """(label, parameter) of all parameters that only one label's logit depends on."""
        lists = [self.towers, *([self.gates] if self.kind == "mmoe" else [])]
        if self.kind == "ple":
            last = self.levels[-1]
            assert isinstance(last, Level)
            lists += [last.own, last.gates]
        for modules in lists:
            for task, module in enumerate(modules):
                yield from ((task, parameter) for parameter in module.parameters())

    def forward(self, x_BR: Tensor, keys: Tensor | None = None) -> Tensor:
        """[B, R] and the examples' dropout keys int64 [B] -> logits float32 [B, T]."""
        switch = self.switch if self.training and torch.is_grad_enabled() else None
        of_task, shared = [x_BR] * len(self.towers), x_BR
        for level in list(self.levels)[:-1] if self.kind == "ple" else ():
            of_task, shared = level(of_task, shared, keys, None)
        of_task = [_cut(switch, x, task) for task, x in enumerate(of_task)]
        if self.kind == "mmoe":
            experts = self.experts(x_BR, keys)
            of_task = [
                gate(x, _cut(switch, experts, task))
                for task, (gate, x) in enumerate(zip(self.gates, of_task, strict=True))
            ]
        if self.kind == "ple":
            of_task, _ = self.levels[-1](of_task, shared, keys, switch)
        logits = [tower(x, keys).squeeze(1).float() for tower, x in zip(self.towers, of_task, strict=True)]
        if self.kind == "esmm":
            for task in range(1, len(logits)):
                logits[task] = _logit_of_product(_cut(switch, logits[task - 1], task), logits[task])
        return torch.stack([_cut(switch, logit, task) for task, logit in enumerate(logits)], dim=1)


def _logit_of_product(u: Tensor, c: Tensor) -> Tensor:
    """logit(sigmoid(u) sigmoid(c))."""
    return -torch.logsumexp(torch.stack([-u, -c, -u - c]), dim=0)
