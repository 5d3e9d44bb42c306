"""What every section of a run's JSON is made of, and what the section of every dense model has."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field

Positive = Annotated[int, Field(gt=0)]
PerLayer = Positive | list[Positive]
Probability = Annotated[float, Field(ge=0, lt=1)]
Rate = Annotated[float, Field(ge=0)]
Activation = Literal["relu", "silu"]


class Section(BaseModel):
    """A frozen section: strict types, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, serialize_by_alias=True)


def by_name(default: str) -> Discriminator:
    """Sections of one key are told apart by their `name`; one without a name is `default`."""

    def name(section: Any) -> Any:
        return section.get("name", default) if isinstance(section, dict) else getattr(section, "name", None)

    return Discriminator(name)


class ModelConfig(Section):
    """What every dense model has: the input layer's MLPs and the head."""

    name: str
    dim: Positive = Field(64, description="d: width of every embedding")
    head: list[Positive] = Field([256], description="hidden widths of the MLP that ends in the logit")
    bias: bool = Field(True, description="false drops every bias of the dense model")
    activation: Activation = Field(
        "relu",
        description="relu as published; silu: a smooth one in place of every ReLU, with which rounding does not grow "
        "(docs/parity.md)",
    )
    dropout: Probability = Field(
        0.0, description="after every hidden layer of the MLPs; the mask is the same on every topology"
    )
    numeric_mlp: list[Positive] = Field([64], description="hidden widths of the MLP over numeric features")
    numeric_bias: list[bool] | None = Field(
        None, description="whether each layer of that MLP has a bias, its last one included; null: as bias"
    )
    numeric_embeddings: Positive = Field(1, description="embeddings of width d that the numeric MLP emits")
    small_mlp: list[Positive] = Field([64], description="hidden widths of the MLP over the grouped small embeddings")
    small_embeddings: Positive = Field(1, description="embeddings of width d that the small-embedding MLP emits")
