"""Parameters and training FLOPs per example of the baselines' over-archs; counted as cost.py does."""

from collections.abc import Sequence

from megarec.config.models import (
    AfnConfig,
    AutoIntConfig,
    BaselineConfig,
    DeepFmConfig,
    DnnConfig,
    FinalMlpConfig,
    FmConfig,
    LrConfig,
    MaskNetConfig,
    XDeepFmConfig,
)
from megarec.models.baselines.afn import embeddings_of_each, last_bias
from megarec.models.baselines.finalmlp import fusion_sizes, gate_contexts
from megarec.run.cost_parts import Part, Parts, count_head, count_mlp


def count_baseline(n: int, config: BaselineConfig, headless: bool = False) -> dict[str, Parts]:
    """The layers over n embeddings per example; `head` comes last and holds all that makes the logit.

    Args:
        headless: what makes the logit is counted, but it is that of several labels: biases whose shift vanishes go.

    Raises:
        UserError: sizes that do not fit together.
    """
    columns = n * config.dim
    head = count_head(config, columns, config.head)
    linear = count_mlp(columns, [], 1, bias=False)
    match config:
        case LrConfig() | FmConfig() | DnnConfig():
            return {"head": {"head": head}}
        case DeepFmConfig():
            return {"head": {"linear": linear, "head": head}}
        case XDeepFmConfig():
            widths = [n, *config.cin]
            layers = [_count_cin_layer(a, b, n, config.dim) for a, b in zip(widths[:-1], config.cin, strict=True)]
            cin_output = count_mlp(sum(config.cin), [], 1, bias=False)
            return _numbered(layers) | {"head": {"linear": linear, "cin_output": cin_output, "head": head}}
        case AutoIntConfig():
            width = config.heads * config.attention_dim
            layers = [_count_attention(n, inputs, width) for inputs in [config.dim, *[width] * (config.layers - 1)]]
            attention_output = count_mlp(n * width, [], 1, bias=False)
            return _numbered(layers) | {"head": {"attention_output": attention_output, "head": head}}
        case MaskNetConfig():
            return _count_masknet(columns, config)
        case FinalMlpConfig():
            return _count_finalmlp(n, config)
        case AfnConfig():
            return _count_afn(n, config, headless)


def emitted_columns(n: int, config: BaselineConfig) -> int:
    """Columns that leave a model without the maps that make its logit."""
    match config:
        case LrConfig() | DnnConfig():
            return n * config.dim
        case FmConfig() | DeepFmConfig():
            return (n + 1) * config.dim
        case XDeepFmConfig():
            return n * config.dim + sum(config.cin)
        case AutoIntConfig():
            return n * (config.dim + config.heads * config.attention_dim)
        case MaskNetConfig():
            return config.blocks * config.width
        case FinalMlpConfig():
            return config.mlp1[-1] + 2 * config.mlp2[-1]
        case AfnConfig():
            return (embeddings_of_each(n, config) + config.neurons) * config.dim


def _numbered(layers: Sequence[Parts]) -> dict[str, Parts]:
    return {f"layers.{index}": parts for index, parts in enumerate(layers)}


def _count_cin_layer(inputs: int, outputs: int, n: int, dim: int) -> Parts:
    weights = outputs * inputs * n
    return {"cin": Part(weights, weights * dim)}


def _count_attention(n: int, inputs: int, width: int) -> Parts:
    projections = 4 * inputs * width
    return {"projection": Part(projections, n * projections), "attention": Part(0, 2 * n * n * width)}


def _layer_norm(width: int, bias: bool) -> Part:
    return Part(width * (2 if bias else 1))


def _count_masknet(columns: int, config: MaskNetConfig) -> dict[str, Parts]:
    block = {
        "mask": count_mlp(columns, [config.mask], columns, config.bias),
        "hidden": count_mlp(columns, [], config.width, bias=False),
        "layer_norm": _layer_norm(config.width, config.bias),
    }
    head = count_head(config, config.blocks * config.width, config.head)
    norm = {"layer_norm": _layer_norm(config.dim, config.bias)}
    return {"norm": norm} | _numbered([block] * config.blocks) | {"head": {"head": head}}


def _count_finalmlp(n: int, config: FinalMlpConfig) -> dict[str, Parts]:
    columns = n * config.dim
    layers: dict[str, Parts] = {}
    for index, places in enumerate(gate_contexts(n, config)):
        inputs = (len(places) or 1) * config.dim
        gate = count_mlp(inputs, config.gate_mlp, columns, config.bias)
        layers[f"gates.{index}"] = {"gate": gate.plus(Part(0 if places else config.dim))}
    for index, widths in enumerate((config.mlp1, config.mlp2)):
        layers[f"streams.{index}"] = {"stream": _count_stream(config, columns, widths)}
    sizes = fusion_sizes(config)
    weights = sizes.heads * sizes.first * sizes.second
    head = count_mlp(config.mlp1[-1] + config.mlp2[-1], [], 1, config.bias)
    return layers | {"head": {"fusion": Part(weights, weights), "head": head}}


def _count_stream(config: FinalMlpConfig, columns: int, widths: list[int]) -> Part:
    stream = count_head(config, columns, widths[:-1], widths[-1])
    if config.norm == "none":
        return stream
    return stream.plus(_layer_norm(widths[-1], config.bias and config.norm != "batch"))  # BatchNorm's bias is the MLP's


def _count_afn(n: int, config: AfnConfig, headless: bool) -> dict[str, Parts]:
    each, products = embeddings_of_each(n, config), config.neurons * config.dim
    powers = each * config.neurons
    norms = _layer_norm(each * config.dim, config.bias).plus(
        _layer_norm(products, config.bias and last_bias(config, headless))
    )
    mlp = count_head(config, products, config.mlp)
    head = count_head(config, each * config.dim, config.head)
    return {
        "layers.0": {"powers": Part(powers, powers * config.dim), "layer_norm": norms},
        "head": {"mlp": mlp, "head": head},
    }
