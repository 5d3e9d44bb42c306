"""The input and output sizes of the tower modules, and how they are derived (DMT, arXiv 2403.00877, section 3).

F features of width N enter T towers, F_t of them tower t (a feature with several embeddings counts once for each);
n_t embeddings of width D leave it. The compression is F N / (sum n_t D): the message between hosts shrinks by that
factor. D is one number over all towers, since the dense model sees sum n_t embeddings of width D.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from megarec.config.base import MOST_LINEAR, Activation, ModelConfig
from megarec.config.sections import RunConfig
from megarec.config.towers import DcnTowerConfig, DlrmTowerConfig, IdentityTowerConfig, TowerModule, WukongTowerConfig
from megarec.errors import UserError
from megarec.models.inputs import OverArchInput
from megarec.models.wukong import LayerSizes
from megarec.sparse.layout import EmbeddingLayout
from megarec.sparse.towers.assignment import Towers, assign_towers

Model = TypeVar("Model", bound=ModelConfig)

NEAR = 0.02  # a compression this near to the requested one is accepted


@dataclass(frozen=True)
class TowerSizes:
    """The sizes of all towers' modules.

    Attributes:
        module: the config's section; c and p of a DLRM tower are explicit.
        bias: whether linear maps and norms have one (model.bias).
        width: N.
        dim: D.
        inputs: F_t by tower.
        outputs: n_t by tower.
        activation: of the MLP of a Wukong tower (model.activation).
    """

    module: TowerModule
    bias: bool
    width: int
    dim: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    activation: Activation = "relu"

    @property
    def compression(self) -> float:
        """The compression that is reached."""
        return sum(self.inputs) * self.width / (sum(self.outputs) * self.dim)

    def output_columns(self, towers: Sequence[int]) -> int:
        """Columns that these towers emit for an example."""
        return sum(self.outputs[tower] for tower in towers) * self.dim

    def interaction(self, tower: int) -> LayerSizes:
        """The interaction layer of a Wukong tower; where n_t is derived, half of it is n_L and the rest n_F."""
        module = self.module
        assert isinstance(module, WukongTowerConfig)
        num_lcb = module.num_lcb or self.outputs[tower] // 2
        num_fm = module.num_fm or self.outputs[tower] - num_lcb
        return LayerSizes(self.inputs[tower], num_fm, num_lcb, module.rank, list(module.mlp))


class ResolvedTowers(NamedTuple):
    """The towers and sizes of a config.

    Attributes:
        towers: None: the config has none.
        modules: None: none, or the identity; the dense model then sees the layout as it is.
        reasons: what was chosen and why, for the log.
    """

    towers: Towers | None
    modules: TowerSizes | None
    reasons: tuple[str, ...]


NO_TOWERS = ResolvedTowers(None, None, ())


def resolve_towers(config: RunConfig, layout: EmbeddingLayout) -> ResolvedTowers:
    """Towers and the sizes of their modules; the same on every topology.

    Raises:
        UserError: the assignment does not fit the features, a feature of a smaller width meets a tower module, or no
            sizes come near the compression.
    """
    requested, module = config.parallel.towers, config.tower_module
    if requested is None:
        return NO_TOWERS
    towers = assign_towers(layout, requested)
    held = f"towers: {len(towers)}, of {', '.join(str(len(names)) for names in towers.features)} features"
    if isinstance(module, IdentityTowerConfig):
        return ResolvedTowers(towers, None, (f"{held}; no tower modules",))
    columns = {feature.name: feature.columns for feature in layout.features}
    for name, width in columns.items():
        if width % layout.dim:
            raise UserError(
                f"tower_module.name={module.name!r} takes embeddings of width model.dim={layout.dim}, but "
                f"embedding.features.{name}.width={width}: leave that width out, or set tower_module.name='identity'"
            )
    deep = len(module.mlp) if isinstance(module, WukongTowerConfig) else getattr(module, "layers", 1)
    if len(towers.features) * deep > MOST_LINEAR:
        raise UserError(
            f"tower_module: {deep:,} layers in each of {len(towers.features):,} towers; expected at most "
            f"{MOST_LINEAR:,} in all"
        )
    inputs = [sum(columns.get(name, 0) for name in names) // layout.dim for names in towers.features]
    if 0 in inputs:
        raise UserError(
            f"parallel.towers[{inputs.index(0)}] holds sequences alone, and tower_module.name={module.name!r} takes "
            "pooled features: put another feature into that tower"
        )
    sizes, why = module_sizes(module, layout.dim, inputs, config.model.bias, config.model.activation)
    return ResolvedTowers(towers, sizes, (held, why))


def module_sizes(
    module: TowerModule, width: int, inputs: Sequence[int], bias: bool, activation: Activation = "relu"
) -> tuple[TowerSizes, str]:
    """The sizes of all modules, and the reason for them.

    Args:
        module: with what the towers emit, or a compression that derives it.
        width: N.
        inputs: F_t by tower.

    Raises:
        UserError: the compression asks for less than one number an embedding.
    """
    requested = module.compression
    if requested is None:
        dim, outputs = _given(module, width, inputs)
    elif isinstance(module, DlrmTowerConfig):
        module = _dlrm_preset(module, requested, width, inputs)
        dim, outputs = _given(module, width, inputs)
    else:
        dim, outputs = _proportional_preset(module, requested, width, inputs)
    sizes = TowerSizes(module, bias, width, dim, tuple(inputs), tuple(outputs), activation)
    flow = f"{sum(inputs)} embeddings of {width} -> {sum(outputs)} of {dim} ({', '.join(map(str, outputs))} by tower)"
    chosen = f", c={module.c}, p={module.p}" if isinstance(module, DlrmTowerConfig) else ""
    asked = "sizes as given" if requested is None else f"asked for {requested:g}"
    return sizes, f"tower modules: {module.name}{chosen}: {flow}, compression {sizes.compression:.3g} ({asked})"


def _given(module: TowerModule, width: int, inputs: Sequence[int]) -> tuple[int, list[int]]:
    """D and n_t of explicit sizes (config/load.py refuses a section that lacks one)."""
    match module:
        case DlrmTowerConfig(c=int(c), p=int(p)):
            outputs = [c + p * features for features in inputs]
        case DcnTowerConfig(embeddings=int(embeddings)):
            outputs = [embeddings] * len(inputs)
        case WukongTowerConfig(num_fm=int(num_fm), num_lcb=int(num_lcb)):
            outputs = [num_fm + num_lcb] * len(inputs)
        case _:
            raise AssertionError(f"sizes of {module!r} are missing")
    return module.dim or width, outputs


def _dlrm_preset(module: DlrmTowerConfig, compression: float, width: int, inputs: Sequence[int]) -> DlrmTowerConfig:
    """p = 1 and D = N / compression, exact for uneven towers as well; what rounding D leaves goes to c.

    A given D above N / compression lowers p to 0: c embeddings of the whole tower remain.
    """
    features, towers = sum(inputs), len(inputs)
    dim = module.dim or int(width / compression)
    if dim == 0:
        raise UserError(
            f"tower_module.compression={compression:g} exceeds model.dim={width}: less than one number an embedding "
            "would be left; lower it, or set tower_module.dim"
        )
    wanted = features * width / compression / dim  # embeddings over all towers
    p = int(wanted / features)
    c = max(round((wanted - p * features) / towers), 0 if p else 1)
    return module.model_copy(update={"c": c, "p": p, "dim": dim})


def _proportional_preset(
    module: DcnTowerConfig | WukongTowerConfig, compression: float, width: int, inputs: Sequence[int]
) -> tuple[int, list[int]]:
    """D and n_t: D is N, or the first of its halves with which whole n_t come near; n_t grow with F_t.

    With Wukong no less than 4: LayerNorm over two numbers keeps only their order, and no gradient.
    """
    wukong = isinstance(module, WukongTowerConfig)
    least, narrowest = (2, 4) if wukong else (1, 1)  # Wukong: one embedding of the FM block, one of the LCB
    wanted = sum(inputs) * width / compression

    def total(dim: int) -> int:
        return max(round(wanted / dim), least * len(inputs))

    def miss(dim: int) -> float:
        return abs(wanted / (total(dim) * dim) - 1)

    halvings = [width >> shift for shift in range(width.bit_length()) if width % (1 << shift) == 0]
    halvings = [dim for dim in halvings if dim >= narrowest] or [width]
    candidates = [module.dim] if module.dim else halvings
    dim = next((dim for dim in candidates if miss(dim) <= NEAR), min(candidates, key=miss))
    return dim, apportion(total(dim), inputs, least)


def apportion(total: int, weights: Sequence[int], least: int) -> list[int]:
    """Whole numbers near total x weight / sum of weights, at least `least` each, that add up to `total`."""
    parts, whole = [least] * len(weights), sum(weights)
    largest = [(least * whole - total * weight, place) for place, weight in enumerate(weights)]  # shortfalls, negative
    heapq.heapify(largest)
    for _ in range(total - sum(parts)):
        shortfall, place = largest[0]
        parts[place] += 1
        heapq.heapreplace(largest, (shortfall + whole, place))
    return parts


def over_arch_input(layout: EmbeddingLayout, modules: TowerSizes | None) -> OverArchInput:
    """The dense model's input: the layout, or what the tower modules emit, tower after tower."""
    if modules is None:
        return OverArchInput(layout.dim, layout.full_embeddings, layout.small_columns)
    return OverArchInput(modules.dim, sum(modules.outputs), small_columns=0)


def over_arch_config(model: Model, modules: TowerSizes | None) -> Model:
    """The dense model's sizes: `model.dim` is the width of tables; behind tower modules the dense model's is D."""
    return model if modules is None else model.model_copy(update={"dim": modules.dim})
