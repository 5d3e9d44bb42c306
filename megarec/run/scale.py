"""One dial, `model.scale`, sets every size of a Wukong by the paper's recipe (arXiv 2403.02545, section 5.1).

    l = 2 .. 8 first, at the widths of the paper's smallest model: n_F = n_L = 8, k = 24, MLP 3 x 8/15 k d;
    then w = n_F = n_L = k and the MLP's 3 x 8/15 w d grow together (n_F and n_L catch up with k = 24 first).

At d = 160 that gives MLP 3 x 2048 for k = 24, 4096 for 48, 8192 for 96 and 16384 for 192: four of the paper's seven
rows lie on this path (two others widen n_F before k, one doubles the MLP alone). n_F, n_L and k stay multiples of 8
and the MLP's widths of 8, from 1024 on of 64, so that tensor parallelism up to 8 ways splits them into aligned GEMMs.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import count as count_up
from typing import Any

from megarec.config.models import OverArchConfig, WukongConfig
from megarec.errors import UserError
from megarec.models.inputs import EmbeddedColumns, input_embeddings
from megarec.models.sequences import SequenceInput
from megarec.run.cost import count
from megarec.sparse.towers.sizes import TowerSizes

FEWEST_LAYERS, MOST_LAYERS = 2, 8
NARROWEST, SMALLEST_RANK = 8, 24
STEP = 8


def resolve_scale(
    config: OverArchConfig,
    columns: EmbeddedColumns,
    numeric: int,
    modules: TowerSizes | None = None,
    sequences: Sequence[SequenceInput] = (),
    labels: int = 1,
) -> tuple[OverArchConfig, tuple[str, ...]]:
    """The dense model's sizes, all explicit, and the reasons for them; `config` itself where `scale` is not given.

    The sizes are those on the recipe's path whose training GFLOP/example, tower modules, input layer and head
    included, lies nearest to `scale`: over 8 or more embeddings of d >= 16 within 15 % of it, but 20 % between
    2 and 3 layers and 25 % with the full FM, whose cost grows with the square of n_F + n_L.

    Args:
        config: `scale` is the target; dim, head and everything else that the recipe leaves alone stay as they are.
            Behind tower modules dim is the width that they emit.
        columns: what the dense model reads; it fixes n.
        numeric: how many numeric features there are.
        modules: the tower modules, if there are any; their cost counts.
        sequences: what is read position by position; its cost counts.
        labels: how many are predicted.

    Raises:
        UserError: `scale` lies below the smallest model of the recipe.
    """
    if not isinstance(config, WukongConfig) or config.scale is None:
        return config, ()
    scale, n = config.scale, input_embeddings(columns, numeric, config)
    candidates = _candidates(config, scale, columns, numeric, modules, sequences, labels)
    smallest, least = candidates[0]
    if scale < least:
        raise UserError(
            f"model.scale={scale:g}: the smallest model of the recipe ({_sizes(smallest)}) takes "
            f"{_rounded_up(least)} GFLOP/example over these n={n} embeddings of d={config.dim}; "
            "ask for at least that, lower model.dim, or state the sizes yourself"
        )
    best, gflop = min(candidates, key=lambda candidate: abs(candidate[1] - scale))
    deepest = max(cost for model, cost in candidates if model.num_lcb == NARROWEST)
    return best, _reasons(scale, best, gflop, n, deepest)


def _candidates(
    config: WukongConfig,
    scale: float,
    columns: EmbeddedColumns,
    numeric: int,
    modules: TowerSizes | None,
    sequences: Sequence[SequenceInput],
    labels: int,
) -> list[tuple[WukongConfig, float]]:
    """Models on the path and their GFLOP/example, rising, to the first beyond twice the scale.

    One that costs no more than a narrower one is left out (a residual vanishes where n' happens to equal n), so
    that a larger scale never gives smaller widths.
    """
    candidates: list[tuple[WukongConfig, float]] = []
    for model in _path(config):
        gflop = count(model, columns, numeric, (), modules, sequences, labels).flop / 1e9
        if not candidates or gflop > candidates[-1][1]:
            candidates.append((model, gflop))
        if gflop > 2 * scale:
            return candidates
    raise AssertionError("the path has no end")


def _path(config: WukongConfig) -> Iterator[WukongConfig]:
    """The recipe's models from the smallest up, endlessly; no size ever shrinks."""
    for layers in range(FEWEST_LAYERS, MOST_LAYERS):
        yield _with_sizes(config, layers, NARROWEST)
    for width in count_up(NARROWEST):
        yield _with_sizes(config, MOST_LAYERS, width)


def _with_sizes(config: WukongConfig, layers: int, width: int) -> WukongConfig:
    """Between multiples of 8 the MLP grows with the width; n_L, n_F and k take their steps of 8 one after the other."""
    hidden = _aligned(8 / 15 * max(width, SMALLEST_RANK) * config.dim)
    sizes: dict[str, Any] = {
        "layers": layers,
        "num_fm": (width + 3) // STEP * STEP,
        "num_lcb": (width + 6) // STEP * STEP,
        "rank": max(width // STEP * STEP, SMALLEST_RANK),
        "mlp": [hidden] * 3,
    }
    return config.model_copy(update=sizes | {"scale": None})


def _aligned(width: float) -> int:
    multiple = 8 if width < 1024 else 64
    return max(multiple, round(width / multiple) * multiple)


def _sizes(config: WukongConfig) -> str:
    assert isinstance(config.mlp[0], int)
    return (
        f"layers={config.layers}, num_fm={config.num_fm}, num_lcb={config.num_lcb}, rank={config.rank}, "
        f"mlp={len(config.mlp)} x {config.mlp[0]}"
    )


def _rounded_up(value: float) -> str:
    """Four digits, never below the value: the value in a message must be enough."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 3)
    return f"{math.ceil(value / unit) * unit:.4g}"


def _reasons(scale: float, config: WukongConfig, gflop: float, n: int, deepest: float) -> tuple[str, ...]:
    chosen = (
        f"scale: {_sizes(config)}: {gflop:.4g} GFLOP/example over n={n}, d={config.dim}; asked for {scale:g} "
        f"({round(gflop / scale - 1, 3) + 0.0:+.1%})"
    )
    if config.layers < MOST_LAYERS or config.num_lcb == NARROWEST:
        why = f"scale: layers grow first, {FEWEST_LAYERS} to {MOST_LAYERS}, at the recipe's smallest widths"
    else:
        why = (
            f"scale: {MOST_LAYERS} layers at the recipe's smallest widths reach {deepest:.4g} GFLOP/example; beyond, "
            "num_fm, num_lcb, rank and mlp (8/15 x rank x dim) widen together: num_lcb alone plateaus"
        )
    return chosen, why
