"""What every section of a run's JSON is made of, and what the section of every dense model has."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, model_validator

# Every number has a range: a value outside is a typo or hostile, never a run. Bounds on sizes
# keep counting a model cheap; whether it fits the machine is another question (run/fits.py).
Count = Annotated[int, Field(ge=0, le=10**12)]  # of steps, examples, validations
Positive = Annotated[int, Field(gt=0, le=10**12)]
Size = Annotated[int, Field(gt=0, le=2**20)]  # a width, or how many embeddings
Layers = Annotated[int, Field(gt=0, le=1_000)]
MOST_LINEAR = 100_000  # linear layers of one kind in a model: their number is what takes time to build
Ranks = Annotated[int, Field(gt=0, le=2**20)]
Widths = Annotated[list[Size], Field(max_length=1_000)]
PerLayer = Size | Widths
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0, le=1e6)]
Above0 = Annotated[float, Field(ge=1e-30, le=1e6)]  # the smallest that float32 can divide by
Betas = tuple[Probability, Probability]
Activation = Literal["relu", "silu", "gelu", "leaky_relu", "tanh", "sigmoid"]
Norm = Literal["none", "layer", "batch"]


class Section(BaseModel):
    """A frozen section: strict types, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, serialize_by_alias=True, allow_inf_nan=False)


def by_name(default: str) -> Discriminator:
    """Sections of one key are distinguished by their `name`; one without a name is `default`."""

    def name(section: Any) -> Any:
        return section.get("name", default) if isinstance(section, dict) else getattr(section, "name", None)

    return Discriminator(name)


class TasksConfig(Section):
    """How several labels (data.label) are predicted from what the model emits; with one label it is not used."""

    name: Literal["shared", "mmoe", "ple", "esmm"] = Field(
        "shared",
        description="before each label's own MLP (model.head): nothing; experts mixed by a gate a label; experts of "
        "each label's own beside shared ones; nothing, and each label's probability is a product (docs/tasks.md)",
    )
    experts: Size = Field(4, description="mmoe: experts; ple: those of a level that all labels share")
    expert: Annotated[list[Size], Field(min_length=1, max_length=1_000)] = Field(
        [64], description="mmoe, ple: widths of an expert's layers, each with an activation"
    )
    own_experts: Size = Field(1, description="ple: those of a level that a label has for itself")
    levels: Layers = Field(1, description="ple: levels; one is the paper's CGC")


class SequenceConfig(Section):
    """Lists in order whose rows are not pooled: a target attends to what came before it (docs/sequences.md)."""

    features: Annotated[list[str], Field(min_length=1, max_length=100)] = Field(
        description="lists in order (schema.json names their newest end) that share positions"
    )
    target: Annotated[list[str], Field(min_length=1, max_length=100)] = Field(
        description="single-valued features: what attends, such as the item that is ranked; the first lists are "
        "compared with them one by one, further ones (such as a rating) lie beside these"
    )
    block: Literal["din", "hstu"] = Field(description="din: target attention; hstu: one layer of pointwise attention")
    max_length: Annotated[int, Field(gt=0, le=100_000)] = Field(
        50, description="positions: the newest ids of a list that are looked up"
    )
    tables: Literal["own", "target"] = Field(
        "own", description="own: as the data say; target: a list shares the table of its target, whose ids it has"
    )
    mlp: Widths | None = Field(None, description="din: hidden widths of the activation unit; null: [80, 40]")
    heads: Size | None = Field(None, description="hstu: attention heads; null: 1")
    position_bias: bool | None = Field(None, description="hstu: a learned number a position; null: true")

    @model_validator(mode="after")
    def _fits(self) -> "SequenceConfig":
        if len(self.features) < len(self.target):
            raise ValueError(
                f"{len(self.features)} features and {len(self.target)} targets: give each target the list that is "
                "compared with it"
            )
        others = {"din": ("heads", "position_bias"), "hstu": ("mlp",)}[self.block]
        for name in others:
            if getattr(self, name) is not None:
                raise ValueError(f"{name} is not a key of block {self.block!r}; leave it out")
        return self


class ModelConfig(Section):
    """What every dense model has: the input layer's MLPs and the head."""

    name: str
    dim: Size = Field(64, description="d: width of every embedding")
    head: Widths = Field([256], description="hidden widths of the MLP that ends in the logit")
    bias: bool = Field(True, description="false drops every bias of the dense model")
    activation: Activation = Field(
        "relu",
        description="relu as published; silu: a smooth one in place of every ReLU, with which rounding does not grow "
        "(docs/parity.md); the others are of published recipes",
    )
    norm: Norm = Field(
        "none",
        description="before every hidden activation of the MLPs that end in the logit (head, AFN's mlp, FinalMLP's "
        "mlp1 and mlp2): LayerNorm, or BatchNorm over the global batch, the same on every topology",
    )
    dropout: Probability = Field(
        0.0, description="after every hidden layer of the MLPs; the mask is the same on every topology"
    )
    numeric_mlp: Widths = Field([64], description="hidden widths of the MLP over numeric features")
    numeric_bias: list[bool] | None = Field(
        None, description="whether each layer of that MLP has a bias, its last one included; null: as bias"
    )
    numeric_embeddings: Size = Field(1, description="embeddings of width d that the numeric MLP emits")
    small_mlp: Widths = Field([64], description="hidden widths of the MLP over the grouped small embeddings")
    small_embeddings: Size = Field(1, description="embeddings of width d that the small-embedding MLP emits")
    tasks: TasksConfig = Field(TasksConfig(), description="how several labels are predicted")
    sequences: Annotated[list[SequenceConfig], Field(max_length=100)] = Field(
        [], description="lists that a block reads position by position in front of the model, in place of pooling"
    )
