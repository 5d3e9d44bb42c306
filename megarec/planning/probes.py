"""What models do with memory, seen in one pass of a few examples on the meta device: nothing is computed."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megarec.config.sections import RunConfig
from megarec.dense.layers import recompute_layers
from megarec.dense.memory import saved_activations
from megarec.dense.settings import settings_of
from megarec.dense.side import keep_gradient
from megarec.planning.memo import Same, remembered
from megarec.run.spec import ModelSpec
from megarec.sparse.towers.modules import TowerModules

_EXAMPLES = 4


@dataclass(frozen=True)
class DensePass:
    """A forward and a backward pass of the dense model.

    Attributes:
        saved: whether it saves the embeddings that it sees for its backward pass.
        gradient: bytes of memory that their gradient has, of an example: of a part of X_0 all of X_0's.
        arrival: its parameters, by their place in the model, in the order in which their gradients arrive.
    """

    saved: bool
    gradient: float
    arrival: tuple[int, ...]


@dataclass(frozen=True)
class TowerPass:
    """A forward pass of tower modules.

    Attributes:
        saved: whether they save what they take in; `made_saved`: what they make.
    """

    saved: bool
    made_saved: bool


def embeddings_type(config: RunConfig) -> torch.dtype:
    """Of the embeddings that the dense model sees (run/build.py)."""
    return torch.bfloat16 if settings_of(config.deepspeed).dtype is torch.bfloat16 else torch.float32


@remembered(lambda config, spec: (Same(spec), settings_of(config.deepspeed).dtype, config.dense.recompute))
def dense_pass(config: RunConfig, spec: ModelSpec) -> DensePass:
    """What a run's dense model does, without tensor parallelism."""
    dtype = settings_of(config.deepspeed).dtype
    model = spec.meta_model().to(dtype)
    recompute_layers(model, config.dense.recompute)
    gradients: list[Tensor] = []
    with torch.device("meta"), arrivals(model) as order:
        embedded = torch.empty(_EXAMPLES, model.width, dtype=embeddings_type(config))
        numeric, keys = torch.empty(_EXAMPLES, spec.numeric), torch.empty(_EXAMPLES, dtype=torch.int64)
        with saved_activations({}, model) as saved:
            made = model(numeric, keep_gradient(embedded, gradients), keys)
        made.sum().backward()
    memory = gradients[0].untyped_storage().nbytes()
    return DensePass(_storage(embedded) in saved, memory / _EXAMPLES, tuple(order))


@remembered(lambda spec, towers: (Same(spec), towers))
def tower_pass(spec: ModelSpec, towers: tuple[int, ...]) -> TowerPass:
    """What the modules of some towers do."""
    modules = spec.towers.modules
    assert modules is not None
    with torch.device("meta"), saved_activations({}) as saved:
        bank = TowerModules(modules, towers)
        columns = sum(modules.inputs[tower] for tower in towers) * modules.width
        taken = torch.empty(_EXAMPLES, columns, requires_grad=True)
        made: Tensor = bank(taken)
    return TowerPass(_storage(taken) in saved, _storage(made) in saved)


@contextmanager
def arrivals(model: nn.Module) -> Iterator[list[int]]:
    """The parameters whose gradients arrive inside, by their place in the model, in the order of their arrival."""
    order: list[int] = []
    places = {parameter: place for place, parameter in enumerate(model.parameters())}
    hooks = [p.register_post_accumulate_grad_hook(lambda own: order.append(places[own])) for p in places]
    yield order
    for hook in hooks:
        hook.remove()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
