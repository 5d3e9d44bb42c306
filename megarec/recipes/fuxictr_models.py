"""FuxiCTR's models -> the model section of a run, one function each; keys that would make another model are refused.

A function takes the keys of its model, the width of embeddings and the names of the features in their order (None:
no data set was given), and returns what `model` has beside `dim`.
"""

from collections.abc import Callable, Sequence
from typing import Any

from megarec.recipes.keys import Keys

ACTIVATIONS = {
    "relu": "relu",
    "silu": "silu",
    "gelu": "gelu",
    "leakyrelu": "leaky_relu",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
}
Section = dict[str, Any]


def _activation(keys: Keys, *names: str, default: str = "ReLU") -> Section:
    """One activation for the model's MLPs."""
    found = {name: keys.take(name, default) for name in names}
    for name, value in found.items():
        one = {str(part).lower() for part in value} if isinstance(value, list) else {str(value).lower()}
        if len(one) != 1 or not one <= ACTIVATIONS.keys():
            keys.fail(name, value, f"expected one of {', '.join(ACTIVATIONS)} for all layers")
        found[name] = one.pop()
    if len(set(found.values())) > 1:
        keys.fail(names[-1], found[names[-1]], f"{names[0]} is {found[names[0]]!r}; one activation is of all MLPs here")
    for name, value in found.items():
        keys.note(name, value, "model.activation")
    activation = ACTIVATIONS[found[names[0]]]
    return {} if activation == "relu" else {"activation": activation}


def _dropout(keys: Keys, *names: str, remark: str = "") -> Section:
    """One dropout for the model's MLPs."""
    found: dict[str, float] = {}
    for name in names:
        value = keys.take(name, 0)
        rates = {*value} if isinstance(value, list) else {value}
        if len(rates) != 1:
            keys.fail(name, value, "expected one rate for all layers")
        keys.values[name] = rates.pop()
        found[name] = keys.number(name)
    if len(set(found.values())) > 1:
        keys.fail(names[-1], found[names[-1]], f"{names[0]} is {found[names[0]]}; one rate is of all MLPs here")
    for name, rate in found.items():
        keys.note(name, rate, "model.dropout", "differs" if rate and remark else "same", remark if rate else "")
    rate = found[names[0]]
    return {"dropout": rate} if rate else {}


def _norm(keys: Keys, *names: str, default: bool = False) -> Section:
    found = {name: keys.flag(name, default) for name in names}
    if len(set(found.values())) > 1:
        keys.fail(names[-1], found[names[-1]], f"{names[0]} is {found[names[0]]}; one model.norm is of both MLPs here")
    for name, on in found.items():
        keys.note(name, on, "model.norm", remark="over the global batch" if on else "")
    return {"norm": "batch"} if found[names[0]] else {}


def _widths(keys: Keys, name: str, target: str, default: Any) -> list[int]:
    value = keys.widths(name, default)
    keys.note(name, value, f"model.{target}")
    return value


def _size(keys: Keys, name: str, target: str, default: int) -> int:
    value = keys.integer(name, default)
    keys.note(name, value, f"model.{target}")
    return value


def _dnn(keys: Keys, dim: int, fields: Sequence[str] | None) -> Section:
    head = _widths(keys, "hidden_units", "head", [64, 64, 64])
    return (
        {"name": "dnn", "head": head}
        | _activation(keys, "hidden_activations")
        | _dropout(keys, "net_dropout")
        | _norm(keys, "batch_norm")
    )


def _deepfm(keys: Keys, dim: int, fields: Sequence[str] | None) -> Section:
    remark = "a linear map of the embeddings; FuxiCTR's first order has tables of its own"
    keys.note("(first order)", "tables", "", "differs", remark)
    return _dnn(keys, dim, fields) | {"name": "deepfm"}


def _dcn(keys: Keys, dim: int, fields: Sequence[str] | None) -> Section:
    structure = keys.text("model_structure", "parallel")
    if structure not in ("parallel", "stacked", "crossnet_only"):
        keys.fail("model_structure", structure, "expected parallel, stacked or crossnet_only")
    keys.must_be(
        "use_low_rank_mixture", False, "the mixture of low-rank experts is not supported; expected false", False
    )
    keys.unused("low_rank", "num_experts")
    own, other = "parallel_dnn_hidden_units", "stacked_dnn_hidden_units"
    if structure == "stacked":
        own, other = other, own
    head = [] if structure == "crossnet_only" else _widths(keys, own, "head", [])
    keys.unused(other, *([own] if structure == "crossnet_only" else []))
    keys.note("model_structure", structure, "model.structure")
    section = {"name": "dcn", "layers": _size(keys, "num_cross_layers", "layers", 3), "rank": None, "head": head}
    section |= {"structure": "parallel" if structure == "parallel" else "stacked"}
    return section | _activation(keys, "dnn_activations") | _dropout(keys, "net_dropout") | _norm(keys, "batch_norm")


def _autoint(keys: Keys, dim: int, fields: Sequence[str] | None) -> Section:
    heads = _size(keys, "num_heads", "heads", 1)
    width = keys.integer("attention_dim", 8)
    if heads < 1 or width % heads:
        keys.fail("attention_dim", width, f"expected a multiple of num_heads={heads}")
    keys.note("attention_dim", width, "model.attention_dim", remark="of one head here, of all heads in FuxiCTR")
    keys.must_be("use_residual", True, "layers have a residual here; expected true", True)
    keys.must_be("use_scale", False, "scores are not scaled here; expected false", False)
    keys.must_be("use_wide", False, "there is no wide part here; expected false", False)
    keys.must_be("layer_norm", False, "attention has no LayerNorm here; expected false", False)
    if width == dim:
        keys.note("(residual)", "identity", "", "differs", "a matrix here, where the widths agree as well")
    section = {"name": "autoint", "heads": heads, "attention_dim": width // heads}
    section |= {"layers": _size(keys, "attention_layers", "layers", 2)}
    section |= {"head": _widths(keys, "dnn_hidden_units", "head", [64, 64, 64])}
    remark = "of the MLP; FuxiCTR's is of the attention's weights as well"
    return (
        section
        | _activation(keys, "dnn_activations")
        | _dropout(keys, "net_dropout", remark=remark)
        | _norm(keys, "batch_norm")
    )


def _masknet(keys: Keys, dim: int, fields: Sequence[str] | None) -> Section:
    kind = keys.text("model_type", "SerialMaskNet")
    if kind != "ParallelMaskNet":
        keys.fail("model_type", kind, "expected ParallelMaskNet, the one that is here")
    keys.note("model_type", kind, "", remark="the one that is here")
    for key in ("emb_layernorm", "net_layernorm"):
        keys.must_be(key, True, "LayerNorms are a part of the model here; expected true", True)
    remark = "one gain and bias for all embeddings; FuxiCTR's are by feature"
    keys.note("(LayerNorm of embeddings)", "by feature", "", "differs", remark)
    ratio = keys.number("reduction_ratio", 1)
    if fields is None:
        keys.fail("reduction_ratio", ratio, "the width that it gives depends on the features: name them with --dataset")
    mask = int(len(fields) * dim * ratio)
    if mask < 1:
        keys.fail("reduction_ratio", ratio, f"makes {mask} of {len(fields)} x {dim} columns; expected at least 1")
    keys.note("reduction_ratio", ratio, "model.mask", remark=f"{len(fields)} features x {dim} x the ratio")
    section = {"name": "masknet", "blocks": _size(keys, "parallel_num_blocks", "blocks", 1), "mask": mask}
    section |= {"width": _size(keys, "parallel_block_dim", "width", 64)}
    section |= {"head": _widths(keys, "dnn_hidden_units", "head", [64, 64, 64])}
    remark = "of hidden layers of MLPs; FuxiCTR's is behind a block as well, and not in its mask"
    return section | _activation(keys, "dnn_hidden_activations") | _dropout(keys, "net_dropout", remark=remark)


def _finalmlp(keys: Keys, dim: int, fields: Sequence[str] | None) -> Section:
    section: Section = {"name": "finalmlp"}
    section |= {f"mlp{i}": _widths(keys, f"mlp{i}_hidden_units", f"mlp{i}", [64, 64, 64]) for i in (1, 2)}
    section |= {"fusion_heads": _size(keys, "num_heads", "fusion_heads", 1)}
    use = keys.flag("use_fs", True)
    keys.note("use_fs", use, "model.gates")
    hidden = _widths(keys, "fs_hidden_units", "gate_mlp", [64])
    contexts = [keys.take(f"fs{i}_context", []) or [] for i in (1, 2)]
    if use:
        section |= {"gates": [_places(keys, i, names, fields) for i, names in enumerate(contexts, 1)]}
        section |= {"gate_mlp": hidden}
        if any(contexts):
            keys.note("(gates)", "tables", "", "differs", "gates read the model's embeddings; FuxiCTR's have their own")
    remark = "not behind a stream's last layer, where FuxiCTR has it too"
    dropout = _dropout(keys, "mlp1_dropout", "mlp2_dropout", remark=remark)
    activation = _activation(keys, "mlp1_hidden_activations", "mlp2_hidden_activations")
    return section | dropout | activation | _norm(keys, "mlp1_batch_norm", "mlp2_batch_norm")


def _places(keys: Keys, stream: int, names: Any, fields: Sequence[str] | None) -> list[int]:
    key = f"fs{stream}_context"
    if not isinstance(names, list):
        keys.fail(key, names, "expected a list of features")
    if names and fields is None:
        keys.fail(key, names, "places of features depend on all of them: name them with --dataset")
    for name in names:
        if name not in (fields or ()):
            keys.fail(key, names, f"{name!r} is not a feature of the data set")
    keys.note(key, names, "model.gates", remark="" if names else "a learned vector")
    return [list(fields or ()).index(name) for name in names]


def _wukong(keys: Keys, dim: int, fields: Sequence[str] | None) -> Section:
    rank = keys.take("fmp_rank_k", 8)
    section: Section = {"name": "wukong", "fm": "full" if rank is None else "optimized"}
    if rank is not None:
        keys.values["fmp_rank_k"] = rank
        section["rank"] = _size(keys, "fmp_rank_k", "rank", 8)
    else:
        keys.note("fmp_rank_k", None, "model.fm", remark="full")
    section |= {"layers": _size(keys, "num_wukong_layers", "layers", 3)}
    section |= {"num_lcb": _size(keys, "lcb_features", "num_lcb", 40)}
    section |= {"num_fm": _size(keys, "fmb_features", "num_fm", 40)}
    section |= {"mlp": _widths(keys, "fmb_mlp_units", "mlp", [32, 32])}
    section |= {"head": _widths(keys, "mlp_hidden_units", "head", [32, 32])}
    keys.must_be("layer_norm", True, "LayerNorm is a part of a layer here; expected true", True)
    keys.note("(FM block)", "ReLU at its end", "", "differs", "its MLP ends linear here, as in the paper")
    remark = "of all MLPs; FuxiCTR's is of the FM blocks' alone"
    dropout = _dropout(keys, "net_dropout", remark=remark)
    activation = _activation(keys, "fmb_mlp_activations", "mlp_hidden_activations", default="relu")
    return section | dropout | activation | _norm(keys, "mlp_batch_norm", default=True)


MODELS: dict[str, Callable[[Keys, int, Sequence[str] | None], Section]] = {
    "DNN": _dnn,
    "DCNv2": _dcn,
    "FinalMLP": _finalmlp,
    "DeepFM": _deepfm,
    "AutoInt": _autoint,
    "MaskNet": _masknet,
    "WuKong": _wukong,
}
