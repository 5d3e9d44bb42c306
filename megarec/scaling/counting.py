"""What a run costs, from its config alone: nothing is built, and its data need not be here."""

from typing import Any, NamedTuple

from megarec.config.sections import OverArchConfig, RunConfig
from megarec.data.schema import schema_of
from megarec.embeddings.layout import build_layout
from megarec.models.cost import Cost, Part, count
from megarec.scaling.dial import resolve_scale
from megarec.towers.sizes import resolve_towers


class RunCost(NamedTuple):
    """The cost of a run's model.

    Attributes:
        model: its section, every size explicit.
        reasons: why `model.scale` and `tower_module`, where they are given, chose these sizes.
    """

    cost: Cost
    model: OverArchConfig
    reasons: tuple[str, ...]


def count_run(config: RunConfig) -> RunCost:
    """Parameters and training FLOPs per example of a run's model.

    Raises:
        UserError: no schema is here, or sizes and features do not fit together.
    """
    schema = schema_of(config.data)
    layout = build_layout(schema, config.embedding, config.model.dim)
    _, modules, tower_reasons = resolve_towers(config, layout)
    model, reasons = resolve_scale(config.model, layout, len(schema.numeric), modules)
    return RunCost(count(model, layout, len(schema.numeric), modules), model, (*tower_reasons, *reasons))


def as_json(cost: Cost) -> dict[str, Any]:
    """A cost as `tools/flops.py --json` prints it."""
    return {
        "parameters": {
            "sparse": cost.sparse_parameters,
            "dense": cost.dense_parameters,
            "total": cost.parameters,
        },
        "training_flop_per_example": cost.flop,
        "forward_mac_per_example": cost.mac,
        "parts": {name: _part(part) for name, part in cost.parts.items()},
        "layers": {name: {key: _part(part) for key, part in layer.items()} for name, layer in cost.layers.items()},
    }


def _part(part: Part) -> dict[str, int]:
    return {"parameters": part.parameters, "forward_mac": part.mac, "training_flop": part.flop}
