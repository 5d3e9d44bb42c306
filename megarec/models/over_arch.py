"""Which over-arch a config asks for: modules `forward(x_BND, keys) -> logits [B]` that know no process group."""

from torch import nn

from megarec.config.sections import DcnConfig, DlrmConfig, OverArchConfig, WukongConfig
from megarec.models.dcn import Dcn
from megarec.models.dlrm import Dlrm
from megarec.models.wukong import LayerNormFactory, Wukong, torch_layer_norm


def build_over_arch(
    n: int, dense: int, config: OverArchConfig, layer_norm: LayerNormFactory = torch_layer_norm
) -> nn.Module:
    """The dense model over n embeddings of width d per example.

    Args:
        n: embeddings per example in X_0.
        dense: how many of them, the last ones, come from numeric features.
        config: the model and its sizes.
        layer_norm: makes a LayerNorm over (width, with bias or not), where the model has any.

    Raises:
        UserError: sizes that do not fit together.
    """
    match config:
        case WukongConfig():
            return Wukong(n, config, layer_norm)
        case DlrmConfig():
            return Dlrm(n, dense, config)
        case DcnConfig():
            return Dcn(n, config)
