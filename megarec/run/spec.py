"""What a run's model is, resolved once from its config and the features of its data; nothing is built.

    features -> layout -> towers -> what the dense model reads -> sizes -> cost

Everything that builds, predicts, checks or counts a model takes a `ModelSpec`. It is the same on every rank and every
topology.
"""

import dataclasses
from dataclasses import dataclass

import torch

from megarec.config.models import OverArchConfig
from megarec.config.sections import RunConfig
from megarec.config.towers import IdentityTowerConfig
from megarec.data.schema import Schema
from megarec.models.inputs import OverArchInput
from megarec.models.recommender import Recommender
from megarec.models.sequences import SequenceInput
from megarec.models.wukong import LayerNormFactory, torch_layer_norm
from megarec.run.cost import Cost, count
from megarec.run.scale import resolve_scale
from megarec.sparse.layout import EmbeddingLayout, build_layout, sequence_inputs
from megarec.sparse.towers.sizes import ResolvedTowers, over_arch_config, over_arch_input, resolve_towers


@dataclass(frozen=True)
class ModelSpec:
    """A model before it is built; `resolve` makes it.

    Attributes:
        layout: of the features in use, their tables and columns.
        numeric: how many numeric features there are.
        towers: which features share a tower, and the sizes of the tower modules.
        columns: what the dense model reads: the layout, or what the tower modules emit; with the embeddings that
            blocks make of sequences.
        sizes: the config's model section, every size explicit; `dim` is the width of tables.
        dense_sizes: the same for the dense model alone; behind tower modules `dim` is the width that they emit.
        embedding_dropout: probability per element of the looked-up embeddings.
        cost: parameters and training FLOPs per example.
        labels: how many are predicted.
        reasons: why towers and `model.scale`, where they are given, chose these sizes; lines for the log.
        sequences: what the dense model reads position by position.
    """

    layout: EmbeddingLayout
    numeric: int
    towers: ResolvedTowers
    columns: OverArchInput
    sizes: OverArchConfig
    dense_sizes: OverArchConfig
    embedding_dropout: float
    cost: Cost
    labels: int
    reasons: tuple[str, ...]
    sequences: tuple[SequenceInput, ...] = ()

    @property
    def arriving(self) -> int:
        """Columns that the dense model takes of an example."""
        made = self.dense_sizes.dim * sum(own.embeddings for own in self.sequences)
        return self.columns.width - made + self.layout.sequence_columns

    def meta_model(self, layer_norm: LayerNormFactory = torch_layer_norm) -> Recommender:
        """The whole dense model on the meta device.

        Args:
            layer_norm: makes a LayerNorm over (width, with bias or not).

        Raises:
            UserError: sizes that do not fit together.
        """
        with torch.device("meta"):
            return Recommender(
                self.columns,
                self.numeric,
                self.dense_sizes,
                self.embedding_dropout,
                layer_norm,
                self.sequences,
                self.labels,
            )


def resolve(config: RunConfig, schema: Schema) -> ModelSpec:
    """Resolve a run's model.

    Raises:
        UserError: features, towers and sizes do not fit together, or `model.scale` is too small.
    """
    numeric, labels = len(schema.numeric), len(schema.predicted)
    apart = not isinstance(config.tower_module, IdentityTowerConfig)
    layout = build_layout(schema, config.embedding, config.model.dim, config.model.sequences, targets_apart=apart)
    towers = resolve_towers(config, layout)
    modules = towers.modules
    columns = over_arch_input(layout, modules)
    sequences = sequence_inputs(layout, config.model.sequences, columns.width, targets_apart=apart)
    if sequences:
        made = sum(own.embeddings for own in sequences)
        columns = dataclasses.replace(columns, full_embeddings=columns.full_embeddings + made)
    requested: OverArchConfig = over_arch_config(config.model, modules)
    dense_sizes, scale_reasons = resolve_scale(requested, columns, numeric, modules, sequences, labels)
    return ModelSpec(
        layout=layout,
        numeric=numeric,
        towers=towers,
        columns=columns,
        sizes=dense_sizes.model_copy(update={"dim": config.model.dim}),
        dense_sizes=dense_sizes,
        embedding_dropout=config.embedding.dropout,
        cost=count(dense_sizes, columns, numeric, layout.tables, modules, sequences, labels),
        labels=labels,
        sequences=sequences,
        reasons=(*towers.reasons, *scale_reasons),
    )
