"""One call from a run's `model` section to the dense model."""

from megarec.config.sections import WukongConfig
from megarec.embeddings.layout import EmbeddingLayout
from megarec.models.recommender import Recommender
from megarec.models.wukong import LayerNormFactory, torch_layer_norm


def build_model(
    config: WukongConfig,
    layout: EmbeddingLayout,
    numeric: int,
    embedding_dropout: float = 0.0,
    layer_norm: LayerNormFactory = torch_layer_norm,
) -> Recommender:
    """The dense model of a run."""
    return Recommender(layout, numeric, config, embedding_dropout, layer_norm)
