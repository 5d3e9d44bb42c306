"""The tower modules that a rank runs, kept equal to their replicas, with their own optimizer.

Expert-parallel-like: a tower is an expert, its replicas are the ranks of its host (tower exchange) or all ranks (flat
exchange, where every rank runs all modules on its own examples).

Their optimizer is outside the DeepSpeed engine, by default with the dense model's hyper-parameters.
"""

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from megarec.config.sections import DenseConfig
from megarec.config.towers import TowerModule
from megarec.distributed.collectives import Channel, all_reduce_sum
from megarec.models.initial import initialize
from megarec.sparse.towers.modules import TowerModules
from megarec.sparse.towers.sizes import TowerSizes


class TowerOptimizer(NamedTuple):
    """Every hyper-parameter explicit; names as in the `dense` section. Gradients are not clipped."""

    optimizer: Literal["adamw", "adam", "sgd"]
    learning_rate: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


def resolve_optimizer(module: TowerModule, dense: DenseConfig) -> TowerOptimizer:
    """Keys that the module's section leaves open are as in `dense`."""
    own = {name: getattr(module, name) for name in TowerOptimizer._fields}
    return TowerOptimizer(**{name: getattr(dense, name) if value is None else value for name, value in own.items()})


def build_optimizer(parameters: Iterable[nn.Parameter], settings: TowerOptimizer) -> torch.optim.Optimizer:
    """torch's own SGD, or fused Adam or AdamW, at the base learning rate (the schedule scales it before each step)."""
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, settings.learning_rate, weight_decay=settings.weight_decay)
    return (torch.optim.Adam if settings.optimizer == "adam" else torch.optim.AdamW)(
        parameters,
        settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def states_of(settings: TowerOptimizer) -> dict[str, Tensor]:
    """State of such an optimizer, once it has stepped, for a parameter of shape [1]; a number without dimensions is one
    for the whole parameter."""
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    optimizer = build_optimizer([parameter], settings)
    optimizer.step()
    return dict(optimizer.state[parameter])


class TowerReplicas:
    """Modules of some towers on this rank.

    Args:
        sizes: of all towers' modules.
        towers: which ones this rank runs.
        replicas: the ranks that run the same ones.
    """

    def __init__(
        self,
        sizes: TowerSizes,
        towers: Sequence[int],
        settings: TowerOptimizer,
        replicas: Channel,
        seed: int,
        device: torch.device,
    ) -> None:
        self.replicas, self.settings, self._seed = replicas, settings, seed
        self.bank = TowerModules(sizes, towers)
        initialize(self.bank, seed)
        self.bank.to(device)
        self._optimizer = build_optimizer(self.bank.parameters(), settings)

    def __call__(self, x: Tensor) -> Tensor:
        """[examples, columns of these towers] -> [examples, what they emit], float32; see `TowerBank`."""
        emitted: Tensor = self.bank(x)
        return emitted

    def update(self) -> None:
        """One optimizer step, after a backward pass; every replica must take part.

        The gradients that arrived are of the mean over the global batch, each replica's over the examples it saw:
        their sum, not their mean, is the gradient wanted (over a host of L replicas a mean would be H times what
        belongs to a loss averaged over all G ranks, had it not been divided by G before).
        """
        gradients = [p.grad for p in self.bank.parameters() if p.grad is not None]
        if self.replicas.size > 1:
            flat = torch.cat([gradient.view(-1) for gradient in gradients])
            total = all_reduce_sum(flat, self.replicas, "tower gradients", "backward")
            for gradient, part in zip(gradients, total.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
        self._optimizer.step()
        self._optimizer.zero_grad()

    def skip(self) -> None:
        """In place of `update`: forget the gradients."""
        self._optimizer.zero_grad()

    def gradients(self) -> dict[str, Tensor]:
        """By parameter, the gradient of the last backward pass on this rank, not yet summed over the replicas."""
        return {name: p.grad for name, p in self.bank.named_parameters() if p.grad is not None}

    def scale_learning_rate(self, factor: float) -> None:
        """Set the rate to `factor` x the base rate."""
        for group in self._optimizer.param_groups:
            group["lr"] = factor * self.settings.learning_rate

    def memory_bytes(self) -> int:
        """Bytes of parameters and optimizer state."""
        return sum(tensor.nbytes for tensor in self.state_dict().values())

    def state_dict(self) -> dict[str, Tensor]:
        """Parameters, and the optimizer's state of each as "<parameter>/<what>"; live tensors."""
        named = dict(self.bank.named_parameters())
        state: dict[str, Tensor] = {name: parameter.detach() for name, parameter in named.items()}
        for name, parameter in named.items():
            for what, value in self._optimizer.state[parameter].items():
                state[f"{name}/{what}"] = value
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy what `state_dict` returned."""
        for name, parameter in self.bank.named_parameters():
            parameter.data.copy_(state[name])
            kept = {key.partition("/")[2]: t for key, t in state.items() if key.startswith(f"{name}/")}
            self._optimizer.state[parameter] = {what: tensor.clone() for what, tensor in kept.items()}

    def reset(self) -> None:
        """Set everything to what it was before the first step."""
        initialize(self.bank, self._seed)
        self._optimizer.state.clear()
