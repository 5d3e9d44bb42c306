"""The whole dense model: input layer and over-arch, from looked-up embeddings to the logit.

`build_over_arch` builds a config's model: modules `forward(x_BND, keys) -> logits [B]` that know no process group.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from megarec.config.models import (
    AfnConfig,
    AutoIntConfig,
    DcnConfig,
    DeepFmConfig,
    DlrmConfig,
    DnnConfig,
    FinalMlpConfig,
    FmConfig,
    LrConfig,
    MaskNetConfig,
    OverArchConfig,
    WukongConfig,
    XDeepFmConfig,
)
from megarec.models.baselines.afn import Afn
from megarec.models.baselines.autoint import AutoInt
from megarec.models.baselines.dnn import Dnn
from megarec.models.baselines.finalmlp import FinalMlp
from megarec.models.baselines.fm import DeepFm, Fm
from megarec.models.baselines.masknet import MaskNet
from megarec.models.baselines.xdeepfm import XDeepFm
from megarec.models.blocks import number_dropouts, shift_vanishes
from megarec.models.cpu_gemm import fast_cpu_gemm
from megarec.models.dcn import Dcn
from megarec.models.dlrm import Dlrm
from megarec.models.inputs import EmbeddedColumns, InputLayer
from megarec.models.multi_task import TaskHeads
from megarec.models.sequences import SequenceInput, SequenceLayer
from megarec.models.wukong import LayerNormFactory, Wukong, torch_layer_norm


def build_over_arch(
    n: int,
    dense: int,
    config: OverArchConfig,
    layer_norm: LayerNormFactory = torch_layer_norm,
    headless: bool = False,
) -> nn.Module:
    """The dense model over n embeddings of width d per example.

    Args:
        n: embeddings per example in X_0.
        dense: how many of them, the last ones, come from numeric features.
        config: the model and its sizes.
        layer_norm: makes a LayerNorm over (width, with bias or not), where the model has any.
        headless: without the maps that make the logit: their input is the output, [B, columns] (multi_task.py).

    Raises:
        UserError: sizes that do not fit together.
    """
    match config:
        case WukongConfig():
            return Wukong(n, config, layer_norm, headless=headless)
        case DlrmConfig():
            return Dlrm(n, dense, config, headless=headless)
        case DcnConfig():
            return Dcn(n, config, headless=headless)
        case LrConfig() | DnnConfig():
            return Dnn(n, config, headless=headless)
        case FmConfig():
            return Fm(n, config, headless=headless)
        case DeepFmConfig():
            return DeepFm(n, config, headless=headless)
        case XDeepFmConfig():
            return XDeepFm(n, config, headless=headless)
        case AutoIntConfig():
            return AutoInt(n, config, headless=headless)
        case MaskNetConfig():
            return MaskNet(n, config, layer_norm, headless=headless)
        case FinalMlpConfig():
            return FinalMlp(n, config, headless=headless)
        case AfnConfig():
            return Afn(n, config, layer_norm, headless=headless)


def shift_of_inputs_vanishes(config: OverArchConfig, headless: bool) -> bool:
    """Whether a constant that is added to X_0, the same for every example, changes no logit (`shift_vanishes`)."""
    match config:
        case DnnConfig():
            return shift_vanishes(config, config.head, headless)
        case FinalMlpConfig():  # every layer of its streams has a normalisation
            return config.norm == "batch" and not any(config.gates or ())
        case _:
            return False


def shift_of_some_inputs_vanishes(config: OverArchConfig, headless: bool) -> bool:
    """Whether that holds for some embeddings of X_0 only: those of AFN's separate ones that the MLP sees."""
    return (
        isinstance(config, AfnConfig)
        and config.embeddings == "separate"
        and shift_vanishes(config, config.head, headless)
    )


class Recommender(nn.Module):
    """The module that the DeepSpeed engine wraps: all dense parameters; the tables stay outside.

    Args:
        layout: how the looked-up embeddings lie in [B, layout.width].
        numeric: how many numeric features there are.
        config: the over-arch and the input MLPs.
        embedding_dropout: probability per element of the looked-up embeddings.
        layer_norm: makes a LayerNorm over (width, with bias or not).
        sequences: what is read position by position; `layout` has the embeddings that their blocks make, last among
            those of full width.
        labels: T, how many are predicted.

    Attributes:
        width: columns of the looked-up embeddings.

    Raises:
        UserError: sizes that do not fit together, or data without features.
    """

    def __init__(
        self,
        layout: EmbeddedColumns,
        numeric: int,
        config: OverArchConfig,
        embedding_dropout: float = 0.0,
        layer_norm: LayerNormFactory = torch_layer_norm,
        sequences: Sequence[SequenceInput] = (),
        labels: int = 1,
    ) -> None:
        super().__init__()
        self.width, self.sequences = layout.width, None
        if sequences:
            made = config.dim * sum(own.embeddings for own in sequences)
            full = config.dim * layout.full_embeddings - made
            self.sequences = SequenceLayer(sequences, layout.width - made, full, config, layer_norm)
            self.width = self.sequences.width
        self.inputs = InputLayer(
            layout, numeric, config, embedding_dropout, last_bias=not shift_of_inputs_vanishes(config, labels > 1)
        )
        n, dense = self.inputs.embeddings, self.inputs.numeric_embeddings
        self.over_arch = build_over_arch(n, dense, config, layer_norm, headless=labels > 1)
        self.tasks: TaskHeads | None = None
        if labels > 1:
            columns: int = self.over_arch.columns  # type: ignore[assignment]
            self.tasks = TaskHeads(columns, config, labels)
        number_dropouts(self)

    def logits(self, x_BND: Tensor, keys: Tensor | None = None) -> Tensor:
        """X_0 [B, n, d] -> logits float32 [B], or of several labels [B, T]."""
        emitted: Tensor = self.over_arch(x_BND, keys)
        return emitted.float() if self.tasks is None else self.tasks(emitted, keys)

    def forward(self, numeric: Tensor, embedded: Tensor, keys: Tensor | None = None) -> Tensor:
        """Numeric [B, f], looked-up embeddings [B, width], dropout keys int64 [B] -> logits float32 [B], or of several
        labels [B, T].

        The inputs are cast to the parameters' dtype. Keys are needed in training when there is dropout.
        """
        dtype = next(self.parameters()).dtype
        with fast_cpu_gemm(embedded.device, dtype):
            return self.logits(self.embed(numeric.to(dtype), embedded.to(dtype), keys), keys)

    def embed(self, numeric: Tensor, embedded: Tensor, keys: Tensor | None = None) -> Tensor:
        """X_0 [B, N, D], the first step of `forward`."""
        if self.sequences is not None:
            embedded = self.sequences(embedded)
        x_BND: Tensor = self.inputs(numeric, embedded, keys)
        return x_BND
