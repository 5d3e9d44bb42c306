"""Towers of DMT (arXiv 2403.00877): which features they hold, and the module of each; part of a run's JSON."""

from typing import Annotated, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from megarec.config.base import Above0, Betas, Layers, Ranks, Rate, Section, Size, Widths, by_name


class IdentityTowerConfig(Section):
    """Towers without modules: they only say which features lie together on a host."""

    name: Literal["identity"] = "identity"


class TowerModuleConfig(Section):
    """What every tower module has. It is outside the DeepSpeed engine, as the tables are: neither in the gradient norm
    that `deepspeed.gradient_clipping` clips nor clipped.

    Attributes:
        EMITTED: the keys that say what a tower emits; `compression` derives them.
    """

    EMITTED: ClassVar[tuple[str, ...]]

    name: str
    compression: Annotated[float, Field(ge=1, le=1e6)] | None = Field(
        None,
        description="2, 4, 8, ...: how many times fewer numbers leave the towers than enter; derives the sizes of "
        "what they emit. null: those sizes are given",
    )
    dim: Size | None = Field(
        None, description="D: width of the embeddings that leave the towers; null: by compression, else model.dim"
    )
    optimizer: Literal["adamw", "adam", "sgd"] | None = Field(None, description="null: as dense")
    learning_rate: Rate | None = Field(None, description="null: as dense")
    betas: Betas | None = Field(None, strict=False, description="null: as dense")
    eps: Above0 | None = Field(None, description="null: as dense")
    weight_decay: Rate | None = Field(None, description="null: as dense")


class DlrmTowerConfig(TowerModuleConfig):
    """DMT-DLRM: a linear map of all of a tower's embeddings beside one of each; c + p F_t embeddings come out."""

    EMITTED: ClassVar[tuple[str, ...]] = ("c", "p")

    name: Literal["dlrm"]
    c: Annotated[int, Field(ge=0, le=2**20)] | None = Field(
        None, description="embeddings made of the whole tower; null: by compression"
    )
    p: Annotated[int, Field(ge=0, le=2**20)] | None = Field(
        None, description="embeddings made of each embedding; null: by compression"
    )


class DcnTowerConfig(TowerModuleConfig):
    """DMT-DCN: cross layers over the tower's flattened embeddings, then a linear projection."""

    EMITTED: ClassVar[tuple[str, ...]] = ("embeddings",)

    name: Literal["dcn"]
    embeddings: Size | None = Field(None, description="n_t: what each tower emits; null: by compression")
    layers: Layers = Field(1, description="cross layers")
    rank: Size | None = Field(128, description="of the low-rank cross products U V x; null: full products W x")


class WukongTowerConfig(TowerModuleConfig):
    """One interaction layer of Wukong over the tower's embeddings."""

    EMITTED: ClassVar[tuple[str, ...]] = ("num_fm", "num_lcb")

    name: Literal["wukong"]
    num_fm: Size | None = Field(None, description="n_F: embeddings each tower's FM block emits; null: by compression")
    num_lcb: Size | None = Field(
        None, description="n_L: embeddings each tower's linear compression block emits; null: by compression"
    )
    rank: Size = Field(24, description="k: columns of the projection Y of the optimized FM")
    mlp: Widths = Field([256], description="hidden widths of the FM block's MLP")


TowerModule = DlrmTowerConfig | DcnTowerConfig | WukongTowerConfig
TOWER_MODULES: dict[str, type[IdentityTowerConfig | TowerModule]] = {
    "identity": IdentityTowerConfig,
    "dlrm": DlrmTowerConfig,
    "dcn": DcnTowerConfig,
    "wukong": WukongTowerConfig,
}


TowerModuleSection = Annotated[
    Annotated[IdentityTowerConfig, Tag("identity")]
    | Annotated[DlrmTowerConfig, Tag("dlrm")]
    | Annotated[DcnTowerConfig, Tag("dcn")]
    | Annotated[WukongTowerConfig, Tag("wukong")],
    by_name("identity"),
]

TowerLists = Annotated[
    Annotated[Ranks, Tag("[number]")] | Annotated[list[list[str]], Tag("[lists]")],
    Discriminator(lambda value: "[lists]" if isinstance(value, list) else "[number]"),
]  # brackets: describe.py leaves such a tag out of a key


class TowersFile(Section):
    """towers.json, as tools/partition_towers.py writes it. All but `towers` is for people."""

    towers: list[list[str]] = Field(description="by tower, the names of its features")
    strategy: str | None = Field(None, description="how the features were assigned")
    seed: int | None = None
    cost: dict[str, list[float]] | None = Field(None, description="by kind of cost, that of each tower")
