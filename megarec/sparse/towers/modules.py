"""The dense modules of towers (DMT, arXiv 2403.00877, section 3): fewer or narrower embeddings leave than enter.

    DLRM    concat(c embeddings, linear in all of the tower; p embeddings of each embedding, linear in it)
    DCN     linear(cross layers(flattened embeddings))
    Wukong  one interaction layer, linear(...) of each embedding where D differs from N

They know no process group: any number of towers runs on one process, or each on its host. They compute in the type
of their parameters, float32, and have no dropout.

Shape suffixes: B examples, F embeddings of the tower, N their width, O embeddings that leave (n_t), D their width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megarec.config.base import Activation
from megarec.config.models import WukongConfig
from megarec.config.towers import DcnTowerConfig, DlrmTowerConfig, WukongTowerConfig
from megarec.models.blocks import MLP
from megarec.models.dcn import CrossLayer
from megarec.models.wukong import InteractionLayer, LayerSizes, torch_layer_norm
from megarec.sparse.towers.sizes import TowerSizes


class DlrmTower(nn.Module):
    """Two linear branches; O = c + p F.

    Args:
        features: F.
        width: N.
        c: embeddings made of the whole tower.
        p: embeddings made of each embedding; one map for all embeddings of the tower.
        dim: D.
        bias: whether the maps have a bias.
    """

    def __init__(self, features: int, width: int, c: int, p: int, dim: int, bias: bool) -> None:
        super().__init__()
        self.dim = dim
        self.whole = MLP(features * width, [], c * dim, bias=bias) if c else None
        self.each = MLP(width, [], p * dim, bias=bias) if p else None

    def forward(self, x_BFN: Tensor) -> Tensor:
        """[B, F, N] -> [B, c + p F, D]: those of the whole tower first, then those of the first embedding, ..."""
        parts = []
        if self.whole is not None:
            parts.append(self.whole(x_BFN.flatten(1)))
        if self.each is not None:
            parts.append(self.each(x_BFN).flatten(1))
        flat = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        return flat.unflatten(1, (-1, self.dim))


class DcnTower(nn.Module):
    """Cross layers over the flattened embeddings, then a linear projection to O x D.

    Args:
        features: F.
        width: N.
        outputs: O.
        dim: D.
        layers: cross layers.
        rank: of their products; None: full.
        bias: whether cross layers and projection have a bias.
    """

    def __init__(
        self, features: int, width: int, outputs: int, dim: int, layers: int, rank: int | None, bias: bool
    ) -> None:
        super().__init__()
        self.dim = dim
        columns = features * width
        self.layers = nn.ModuleList(CrossLayer(columns, rank, bias) for _ in range(layers))
        self.projection = MLP(columns, [], outputs * dim, bias=bias)

    def forward(self, x_BFN: Tensor) -> Tensor:
        """[B, F, N] -> [B, O, D]."""
        x_BE = first_BE = x_BFN.flatten(1)
        for layer in self.layers:
            x_BE = layer(first_BE, x_BE)
        return self.projection(x_BE).unflatten(1, (-1, self.dim))


class WukongTower(nn.Module):
    """A Wukong interaction layer at width N; where D differs, one linear map N -> D for all embeddings it emits.

    Args:
        sizes: of the layer.
        width: N.
        dim: D.
        bias: whether MLP, norms and map have a bias.
        activation: of the MLP.
    """

    def __init__(self, sizes: LayerSizes, width: int, dim: int, bias: bool, activation: Activation = "relu") -> None:
        super().__init__()
        config = WukongConfig(dim=width, bias=bias, activation=activation)
        self.interaction = InteractionLayer(sizes, config, torch_layer_norm)
        self.projection = MLP(width, [], dim, bias=bias) if dim != width else None

    def forward(self, x_BFN: Tensor) -> Tensor:
        """[B, F, N] -> [B, O, D]."""
        out_BON: Tensor = self.interaction(x_BFN)
        return out_BON if self.projection is None else self.projection(out_BON)


def build_tower(sizes: TowerSizes, tower: int) -> nn.Module:
    """The module of one tower: [B, F_t, N] -> [B, n_t, D]."""
    features, outputs = sizes.inputs[tower], sizes.outputs[tower]
    match sizes.module:
        case DlrmTowerConfig(c=c, p=p):
            assert c is not None and p is not None
            return DlrmTower(features, sizes.width, c, p, sizes.dim, sizes.bias)
        case DcnTowerConfig(layers=layers, rank=rank):
            return DcnTower(features, sizes.width, outputs, sizes.dim, layers, rank, sizes.bias)
        case WukongTowerConfig():
            return WukongTower(sizes.interaction(tower), sizes.width, sizes.dim, sizes.bias, sizes.activation)


class TowerModules(nn.Module):
    """The modules of some towers: all of them on one process, its host's on a rank.

    A parameter's name starts with `towers.<t>.`, t counted over all towers, so that `models.initial.initialize` gives
    it the same first value on every topology.

    Args:
        sizes: of all towers.
        towers: which ones are here, rising.
    """

    def __init__(self, sizes: TowerSizes, towers: Sequence[int]) -> None:
        super().__init__()
        self.width = sizes.width
        self.columns = [sizes.inputs[tower] * sizes.width for tower in towers]
        self.towers = nn.ModuleDict({str(tower): build_tower(sizes, tower) for tower in towers})

    def forward(self, x: Tensor) -> Tensor:
        """[B, columns of these towers, tower after tower] -> [B, sum of their n_t x D], tower after tower."""
        x = x.to(next(self.parameters()).dtype)
        blocks = x.split(self.columns, dim=1)
        emitted = [
            tower(block.unflatten(1, (-1, self.width))).flatten(1)
            for tower, block in zip(self.towers.values(), blocks, strict=True)
        ]
        return torch.cat(emitted, dim=1) if len(emitted) > 1 else emitted[0]
