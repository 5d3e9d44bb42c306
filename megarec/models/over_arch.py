"""Which over-arch a config asks for: modules `forward(x_BND, keys) -> logits [B]` that know no process group."""

from torch import nn

from megarec.config.baseline_sections import (
    AfnConfig,
    AutoIntConfig,
    DeepFmConfig,
    DnnConfig,
    FinalMlpConfig,
    FmConfig,
    LrConfig,
    MaskNetConfig,
    XDeepFmConfig,
)
from megarec.config.sections import DcnConfig, DlrmConfig, OverArchConfig, WukongConfig
from megarec.models.baselines.afn import Afn
from megarec.models.baselines.autoint import AutoInt
from megarec.models.baselines.dnn import Dnn
from megarec.models.baselines.finalmlp import FinalMlp
from megarec.models.baselines.fm import DeepFm, Fm
from megarec.models.baselines.masknet import MaskNet
from megarec.models.baselines.xdeepfm import XDeepFm
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
        case LrConfig() | DnnConfig():
            return Dnn(n, config)
        case FmConfig():
            return Fm(n, config)
        case DeepFmConfig():
            return DeepFm(n, config)
        case XDeepFmConfig():
            return XDeepFm(n, config)
        case AutoIntConfig():
            return AutoInt(n, config)
        case MaskNetConfig():
            return MaskNet(n, config, layer_norm)
        case FinalMlpConfig():
            return FinalMlp(n, config)
        case AfnConfig():
            return Afn(n, config, layer_norm)
