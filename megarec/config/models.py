"""Sections of the baselines that a larger model has to beat (models/baselines/); their papers are cited there."""

from typing import Annotated, Literal

from pydantic import Field, Tag, model_validator

from megarec.config.base import MOST_LINEAR, Above0, Layers, ModelConfig, PerLayer, Section, Size, Widths, by_name

NoHead = Annotated[list[Size], Field(max_length=0)]
NO_HEAD = "this model has no MLP at its end: stays empty"


class LrConfig(ModelConfig):
    """Logistic regression: the logit is linear in the embeddings, and so in the ids."""

    name: Literal["lr"]
    head: NoHead = Field([], description=NO_HEAD)
    numeric_mlp: Widths = Field([], description="as for every model; empty: linear in the numbers too")
    small_mlp: Widths = Field([], description="as for every model; empty: linear in the small embeddings too")


class FmConfig(ModelConfig):
    """Factorization machine (Rendle 2010): logistic regression plus the dot products of all pairs of embeddings."""

    name: Literal["fm"]
    head: NoHead = Field([], description=NO_HEAD)
    numeric_mlp: Widths = Field([], description="as for every model; empty: linear in the numbers")
    small_mlp: Widths = Field([], description="as for every model; empty: linear in the small embeddings")


class DnnConfig(ModelConfig):
    """One MLP, `head`, over the flattened embeddings."""

    name: Literal["dnn"]


class DeepFmConfig(ModelConfig):
    """DeepFM (arXiv 1703.04247): a factorization machine beside the MLP `head`."""

    name: Literal["deepfm"]


class XDeepFmConfig(ModelConfig):
    """xDeepFM (arXiv 1803.05170): a compressed interaction network and a linear map beside the MLP `head`."""

    name: Literal["xdeepfm"]
    cin: Annotated[list[Size], Field(min_length=1, max_length=1_000)] = Field(
        [100, 100], description="H_k: feature maps of each layer of the compressed interaction network"
    )


class AutoIntConfig(ModelConfig):
    """AutoInt+ (arXiv 1810.11921): self-attention over the embeddings beside the MLP `head`."""

    name: Literal["autoint"]
    layers: Layers = Field(3, description="self-attention layers")
    heads: Size = Field(2, description="H: attention heads of a layer")
    attention_dim: Size = Field(32, description="d': width of a head; a layer emits embeddings of width H d'")


class MaskNetConfig(ModelConfig):
    """MaskNet (arXiv 2102.07619), parallel: masked blocks side by side, then the MLP `head`."""

    name: Literal["masknet"]
    blocks: Layers = Field(3, description="u: mask blocks")
    mask: Size = Field(128, description="t: width of the aggregation layer of an instance-guided mask")
    width: Size = Field(64, description="q: columns that a block emits")


class FinalMlpConfig(ModelConfig):
    """FinalMLP (arXiv 2304.00902): two MLPs over gated embeddings, fused bilinearly."""

    name: Literal["finalmlp"]
    head: NoHead = Field([], description=NO_HEAD)
    mlp1: Annotated[list[Size], Field(min_length=1, max_length=1_000)] = Field(
        [256, 256], description="widths of the first stream's layers, each with a ReLU; its last one is fused"
    )
    mlp2: Annotated[list[Size], Field(min_length=1, max_length=1_000)] = Field(
        [256], description="the same for the second stream"
    )
    fusion_heads: Size = Field(1, description="k: sub-spaces of the bilinear fusion; divides both last widths")
    gates: tuple[list[int], list[int]] | None = Field(
        None,
        strict=False,
        description="by stream, the places in X_0 (from 0) of the embeddings that gate its input, such as the user's "
        "and the item's; an empty list: a learned vector; null: no gates",
    )
    gate_mlp: Widths = Field([64], description="hidden widths of the gates' MLPs")


class AfnConfig(ModelConfig):
    """AFN+ (arXiv 1909.03276): a logarithmic transformation layer with its MLP beside the MLP `head`."""

    name: Literal["afn"]
    neurons: Size = Field(64, description="N: logarithmic neurons, each a learned product of powers")
    mlp: Widths = Field([256], description="hidden widths of the MLP over the neurons")
    epsilon: Above0 = Field(
        1e-5, description="|x| is kept above it in ln |x|; the larger, the better conditioned (docs/models.md)"
    )
    embeddings: Literal["shared", "separate"] = Field(
        "shared",
        description="separate: of each pair of embeddings in X_0 the first goes to the neurons, the second to the "
        "head; give every feature two (embedding.features.*.embeddings, numeric_embeddings)",
    )


BaselineConfig = (
    LrConfig
    | FmConfig
    | DnnConfig
    | DeepFmConfig
    | XDeepFmConfig
    | AutoIntConfig
    | MaskNetConfig
    | FinalMlpConfig
    | AfnConfig
)
BASELINES: dict[str, type[BaselineConfig]] = {
    "lr": LrConfig,
    "fm": FmConfig,
    "dnn": DnnConfig,
    "deepfm": DeepFmConfig,
    "xdeepfm": XDeepFmConfig,
    "autoint": AutoIntConfig,
    "masknet": MaskNetConfig,
    "finalmlp": FinalMlpConfig,
    "afn": AfnConfig,
}
BaselineSection = (
    Annotated[LrConfig, Tag("lr")]
    | Annotated[FmConfig, Tag("fm")]
    | Annotated[DnnConfig, Tag("dnn")]
    | Annotated[DeepFmConfig, Tag("deepfm")]
    | Annotated[XDeepFmConfig, Tag("xdeepfm")]
    | Annotated[AutoIntConfig, Tag("autoint")]
    | Annotated[MaskNetConfig, Tag("masknet")]
    | Annotated[FinalMlpConfig, Tag("finalmlp")]
    | Annotated[AfnConfig, Tag("afn")]
)


class AttentiveConfig(Section):
    """Sizes of the attentive projection Y of Wukong's optimized FM (the paper does not disclose them)."""

    compressed: Size = Field(16, description="m: embeddings after the linear compression of the input")
    mlp: Widths = Field([64], description="hidden widths of the MLP that maps m x d to n x k")


class WukongConfig(ModelConfig):
    """Wukong (arXiv 2403.02545): layers of factorization machine blocks beside linear compression blocks."""

    name: Literal["wukong"] = "wukong"
    scale: Annotated[float, Field(gt=0, le=1e6)] | None = Field(
        None,
        description="target training GFLOP/example: layers, num_fm, num_lcb, rank and mlp follow by the paper's recipe",
    )
    layers: Layers = Field(2, description="l: interaction layers")
    num_fm: PerLayer = Field(16, description="n_F: embeddings an FM block emits; a number, or one per layer")
    num_lcb: PerLayer = Field(16, description="n_L: embeddings a linear compression block emits; as num_fm")
    rank: PerLayer = Field(24, description="k: columns of the projection Y of the optimized FM; as num_fm")
    mlp: Widths | Annotated[list[Widths], Field(max_length=1_000)] = Field(
        [512], description="hidden widths of the FM block's MLP; or a list per layer"
    )
    fm: Literal["optimized", "full"] = Field("optimized", description="X (X^T Y), or the basic X X^T")
    projection: Literal["static", "attentive"] = Field(
        "static", description="Y: a learned parameter, or computed from X"
    )
    attentive: AttentiveConfig = Field(AttentiveConfig(), description="sizes of the attentive projection")

    @model_validator(mode="after")
    def _can_be_built(self) -> "WukongConfig":
        per_layer = [len(widths) for widths in self.mlp if isinstance(widths, list)]
        linear = sum(per_layer) or self.layers * len(self.mlp)
        if linear > MOST_LINEAR:
            raise ValueError(
                f"layers={self.layers} with its mlp makes {linear:,} linear layers; expected at most {MOST_LINEAR:,}"
            )
        return self


SCALED_SIZES = ("layers", "num_fm", "num_lcb", "rank", "mlp")  # what WukongConfig.scale derives


class DlrmConfig(ModelConfig):
    """DLRM (arXiv 1906.00091): pairwise dot products of all embeddings; numeric_mlp is its bottom MLP, head its top."""

    name: Literal["dlrm"]


class DcnConfig(ModelConfig):
    """DCNv2 (arXiv 2008.13535): cross layers over the flattened embeddings, and the head behind or beside them."""

    name: Literal["dcn"]
    layers: Layers = Field(3, description="cross layers")
    rank: Size | None = Field(512, description="of the low-rank cross products U V x; null: full products W x")
    structure: Literal["stacked", "parallel"] = Field(
        "stacked", description="the head reads the last cross layer, or the embeddings beside the cross layers"
    )


OverArchConfig = WukongConfig | DlrmConfig | DcnConfig | BaselineConfig
MODELS: dict[str, type[OverArchConfig]] = {"wukong": WukongConfig, "dlrm": DlrmConfig, "dcn": DcnConfig, **BASELINES}


ModelSection = Annotated[
    Annotated[WukongConfig, Tag("wukong")]
    | Annotated[DlrmConfig, Tag("dlrm")]
    | Annotated[DcnConfig, Tag("dcn")]
    | BaselineSection,
    by_name("wukong"),
]
