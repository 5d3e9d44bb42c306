"""The reference of every parity claim: one process, whole tables, all towers, plain torch; no exchange, no engine.

Shares with the system under test only the model's modules (proven against the equations on their own) and sizes, the
loader and the initial values.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, embedding_bag, logsigmoid

from megarec.config.sections import DenseConfig, EmbeddingConfig, RunConfig
from megarec.config.towers import IdentityTowerConfig
from megarec.data.batch import Batch, Ids
from megarec.data.schema import load_schema, selected
from megarec.data.stream import open_training
from megarec.models.initial import initialize, materialize
from megarec.models.norms import apply_statistics
from megarec.run.spec import resolve
from megarec.sparse.layout import EmbeddingLayout, Feature
from megarec.sparse.tables.initial import initial_rows
from megarec.sparse.towers.assignment import tower_columns
from megarec.sparse.towers.modules import TowerModules
from megarec.sparse.towers.replicas import TowerOptimizer, resolve_optimizer
from megarec.sparse.towers.sizes import ResolvedTowers


class ReferenceStep(NamedTuple):
    """Mean loss of a global batch before its update, and the norm of the dense gradient before clipping."""

    loss: float
    gradient_norm: float


def reference_losses(config: RunConfig, steps: int) -> list[float]:
    """Mean training loss of each of the first `steps` global batches."""
    return [step.loss for step in reference_steps(config, steps)]


def reference_steps(config: RunConfig, steps: int) -> list[ReferenceStep]:
    """The first `steps` global batches; float32 on one process."""
    schema = selected(load_schema(Path(config.data.path)), config.data)
    loader = open_training(
        config.data,
        schema,
        batch_size=config.data.batch_size,
        rank=0,
        world_size=1,
        seed=config.train.seed,
        prefetch=1,
        pin_memory=False,
    )
    spec = resolve(config, schema)
    towers = PlainTowers(config, spec.layout, spec.towers)
    model = spec.meta_model()
    materialize(model, torch.device("cpu"))
    initialize(model, config.train.seed)
    optimizer = plain_optimizer(model.parameters(), config.dense)
    tables = PlainTables(spec.layout, config.embedding, config.train.seed)
    averages = PlainAverages(config, model, tables, towers)
    done = []
    for step in range(steps):
        epoch, position = divmod(step, loader.steps_per_epoch)
        batch = next(iter(loader.batches(epoch, start=position)))
        embedded = tables.look_up(batch)
        sequences, rows = tables.look_up_sequences(batch)
        logits = model(batch.numeric, torch.cat([towers.forward(embedded), sequences], dim=1), batch.keys)
        loss = plain_loss(logits.float(), batch, config)
        smoothing = config.train.label_smoothing
        minimised = plain_loss(logits.float(), batch, config, smoothing) if smoothing else loss
        (minimised + tables.looked_up_l2(embedded, rows) / batch.size).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.deepspeed["gradient_clipping"])
        optimizer.step()
        optimizer.zero_grad()
        apply_statistics(model)
        towers.update()
        tables.update(batch)
        averages.update()
        done.append(ReferenceStep(float(loss.detach()), float(norm)))
    if evaluates(config):
        epoch, position = divmod(steps, loader.steps_per_epoch)
        batch = next(iter(loader.batches(epoch, start=position)))
        averages.take_over()
        with torch.no_grad():
            logits = model.eval()(batch.numeric, towers.forward(tables.look_up(batch)), batch.keys)
            done.append(ReferenceStep(float(binary_cross_entropy_with_logits(logits, batch.labels)), 0.0))
    return done


def evaluates(config: RunConfig) -> bool:
    """Whether evaluation takes other weights than the last step: then the loss of the next batch, evaluated, comes
    after the losses of the steps."""
    return config.model.norm == "batch" or config.train.ema is not None


def plain_loss(logits: Tensor, batch: Batch, config: RunConfig, smoothing: float = 0.0) -> Tensor:
    """The objective, by its definition: of one label the mean cross-entropy; of several a sum over labels and the
    examples that have one, over the number of all examples (dense/objective.py)."""
    if batch.weights is None and not batch.some_missing and logits.dim() == 1:
        smooth = batch.labels * (1 - smoothing) + smoothing / 2 if smoothing else batch.labels
        return binary_cross_entropy_with_logits(logits, smooth.to(logits.dtype))
    names = config.data.label if isinstance(config.data.label, list) else [""]
    weights = torch.ones(batch.size) if batch.weights is None else batch.weights
    total = torch.zeros((), dtype=logits.dtype)
    columns = zip(names, logits.view(batch.size, -1).T, batch.labels.view(batch.size, -1).T, strict=True)
    for name, logit, label in columns:
        there = (label == 0) | (label == 1)
        y = label[there].to(logits.dtype) * (1 - smoothing) + smoothing / 2
        x, w = logit[there], weights[there].to(logits.dtype)
        loss = -(w * (y * logsigmoid(x) + (1 - y) * logsigmoid(-x))).sum() / batch.size
        total = total + config.train.label_weights.get(name, 1.0) * loss
    return total


def plain_optimizer(
    parameters: Iterable[nn.Parameter], settings: DenseConfig | TowerOptimizer
) -> torch.optim.Optimizer:
    """torch's SGD, Adam or AdamW, not fused."""
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, rate, weight_decay=decay)
    kind = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, rate, betas=settings.betas, eps=settings.eps, weight_decay=decay)


class PlainTowers:
    """All towers' modules on one process with an optimizer of their own, not clipped; without modules, nothing."""

    def __init__(self, config: RunConfig, layout: EmbeddingLayout, resolved: ResolvedTowers) -> None:
        self.bank: TowerModules | None = None
        if resolved.towers is None or resolved.modules is None:
            return
        assert not isinstance(config.tower_module, IdentityTowerConfig)
        self.order = [column for columns in tower_columns(layout, resolved.towers) for column in columns]
        self.bank = TowerModules(resolved.modules, range(len(resolved.towers)))
        initialize(self.bank, config.train.seed)
        settings = resolve_optimizer(config.tower_module, config.dense)
        self.optimizer = plain_optimizer(self.bank.parameters(), settings)

    def forward(self, embedded: Tensor) -> Tensor:
        """Pooled embeddings [B, layout.width] -> what the dense model sees."""
        if self.bank is None:
            return embedded
        emitted: Tensor = self.bank(embedded[:, self.order])
        return emitted

    def update(self) -> None:
        if self.bank is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()


class PlainAverages:
    """Of all weights and running statistics, over the steps; without `train.ema` nothing."""

    def __init__(self, config: RunConfig, model: nn.Module, tables: "PlainTables", towers: "PlainTowers") -> None:
        self.ema = config.train.ema
        weights = [*model.parameters(), *model.buffers(), *(towers.bank.parameters() if towers.bank else ())]
        if self.ema is not None:
            weights += [weight for weight in tables.weights.values() if len(weight) <= self.ema.table_rows]
        self.weights = [weight.detach() for weight in weights]
        self.averages = [weight.clone() for weight in self.weights]
        self.steps = 0

    def update(self) -> None:
        if self.ema is None:
            return
        self.steps += 1
        decay = min(self.ema.decay, (1 + self.steps) / (10 + self.steps))
        for weight, average in zip(self.weights, self.averages, strict=True):
            average.copy_(decay * average + (1 - decay) * weight)

    def take_over(self) -> None:
        if self.ema is not None:
            torch._foreach_copy_(self.weights, self.averages)


class PlainTables:
    """Whole tables on one process, dense gradients, each optimizer written out."""

    def __init__(self, layout: EmbeddingLayout, config: EmbeddingConfig, seed: int) -> None:
        self.layout = layout
        self.config = config
        self.steps = 0
        self.dense: dict[str, torch.optim.Optimizer] = {}
        self.weights = {
            t.name: initial_rows(t, seed, config.initial_std_of(t.name), 0, t.rows).requires_grad_()
            for t in layout.tables
        }
        self.first = {name: torch.zeros_like(w) for name, w in self.weights.items()}
        self.second = {name: torch.zeros_like(w) for name, w in self.weights.items()}

    def look_up(self, batch: Batch) -> Tensor:
        """Pooled embeddings [B, layout.width]."""
        pooled = []
        for feature in self.layout.features:
            ids = batch.ids[feature.name]
            lengths = torch.ones(batch.size, dtype=torch.int64) if ids.lengths is None else ids.lengths
            offsets = lengths.cumsum(0) - lengths
            weight, values = self.weights[feature.table], ids.values.long()
            if ids.weights is None:
                pooled.append(embedding_bag(values, weight, offsets, mode=feature.pooling))
                continue
            summed = embedding_bag(values, weight, offsets, mode="sum", per_sample_weights=ids.weights)
            mean = feature.pooling == "mean"  # over the number of ids, whatever their weights
            pooled.append(summed / lengths.clamp(min=1).unsqueeze(1) if mean else summed)
        return torch.cat(pooled, dim=1) if pooled else torch.empty(batch.size, 0)

    def look_up_sequences(self, batch: Batch) -> tuple[Tensor, list[tuple[str, Tensor]]]:
        """The columns behind the pooled ones, example by example; and the rows of each table that were looked up."""
        by_name = {feature.name: feature for feature in self.layout.unpooled}
        rows_of, looked_up = dict[str, tuple[Tensor, ...]](), list[tuple[str, Tensor]]()
        for name in {name: None for sequence in self.layout.sequences for name in sequence.features}:
            feature = by_name[name]
            lists = [newest_of_list(batch.ids[name], example, feature) for example in range(batch.size)]
            # Once for all examples: the gradient of every single look-up would be as large as its table.
            looked_up.append((feature.table, self.weights[feature.table][torch.cat(lists)]))
            rows_of[name] = looked_up[-1][1].split([len(ids) for ids in lists])
        examples = []
        for example in range(batch.size):
            parts = [torch.empty(0)]
            for sequence in self.layout.sequences:
                rows = [rows_of[name][example] for name in sequence.features]
                missing = sequence.positions - len(rows[0])
                there = torch.cat(rows, dim=1).flatten()
                parts += [there, torch.zeros(missing * len(rows) * sequence.columns)]
                if sequence.masked:
                    parts += [torch.ones(len(rows[0])), torch.zeros(missing)]
            examples.append(torch.cat(parts))
        return torch.stack(examples), looked_up

    def looked_up_l2(self, embedded: Tensor, rows: list[tuple[str, Tensor]]) -> Tensor:
        """L2 of looked-up embeddings and of rows of sequences, summed over examples."""
        squares = embedded.pow(2).sum(dim=0)
        weights = [self.config.looked_up_l2(f.table) for f in self.layout.features for _ in range(f.columns)]
        of_rows = sum((self.config.looked_up_l2(table) * own.pow(2).sum() for table, own in rows), torch.zeros(()))
        return torch.tensor(weights) @ squares + of_rows

    @torch.no_grad()
    def update(self, batch: Batch) -> None:
        self.steps += 1
        if self.config.gradient_clipping is not None:
            self._clip(self.config.gradient_clipping)
        for table in self.layout.tables:
            weight = self.weights[table.name]
            assert weight.grad is not None
            rule = self.config.rule_of(table.name)
            weight -= self.config.learning_rate * rule.decay * weight
            if rule.all_rows:
                self._dense_step(table.name, 0.0 if rule.clipped else rule.coupled)
                continue
            rows = _touched(batch, [f for f in self.layout.looked_up if f.table == table.name])
            self._update_rows(table.name, rows, weight.grad[rows])
            weight.grad = None

    def _clip(self, most: float) -> None:
        """The gradients of all tables, with L2 on all rows in them, to a norm of at most `most`."""
        for name, weight in self.weights.items():
            assert weight.grad is not None
            weight.grad += self.config.rule_of(name).coupled * weight
        torch.nn.utils.clip_grad_norm_(list(self.weights.values()), most)

    def _dense_step(self, name: str, l2: float) -> None:
        """torch's own optimizer over the whole table; row-wise Adagrad has none."""
        weight, rate, eps = self.weights[name], self.config.learning_rate, self.config.eps
        if name not in self.dense:
            self.dense[name] = {
                "adam": lambda: torch.optim.Adam([weight], rate, eps=eps, weight_decay=l2),
                "adagrad": lambda: torch.optim.Adagrad([weight], rate, eps=eps, weight_decay=l2),
                "sgd": lambda: torch.optim.SGD([weight], rate, weight_decay=l2),
            }[self.config.optimizer]()
        self.dense[name].step()
        self.dense[name].zero_grad()

    def _update_rows(self, name: str, rows: Tensor, g: Tensor) -> None:
        rate, eps = self.config.learning_rate, self.config.eps
        m, v, w = self.first[name], self.second[name], self.weights[name]
        if self.config.optimizer == "sgd":
            w[rows] -= rate * g
        elif self.config.optimizer == "adagrad":
            v[rows] += g * g
            w[rows] -= rate * g / (v[rows].sqrt() + eps)
        elif self.config.optimizer == "rowwise_adagrad":
            v[rows] += (g * g).mean(dim=1, keepdim=True)
            w[rows] -= rate * g / (v[rows].sqrt() + eps)
        else:  # lazy Adam as torch.optim.SparseAdam: moments of touched rows, bias by the global step
            m[rows] = 0.9 * m[rows] + 0.1 * g
            v[rows] = 0.999 * v[rows] + 0.001 * g * g
            bias_1, bias_2 = 1 - 0.9**self.steps, 1 - 0.999**self.steps
            w[rows] -= rate * bias_2**0.5 / bias_1 * m[rows] / (v[rows].sqrt() + eps)


def _touched(batch: Batch, features: list[Feature]) -> Tensor:
    ids = [batch.ids[f.name].values for f in features if not f.positions]
    for feature in features:
        if feature.positions:
            ids += [newest_of_list(batch.ids[feature.name], example, feature) for example in range(batch.size)]
    return torch.cat(ids).long().unique()


def newest_of_list(ids: Ids, example: int, feature: Feature) -> Tensor:
    """Of an example, newest first, as many as the feature has positions."""
    if ids.lengths is None:
        return ids.values[example : example + 1].long()
    stop = int(ids.lengths[: example + 1].sum())
    own = ids.values[stop - int(ids.lengths[example]) : stop].long()
    return (own if feature.newest_first else own.flip(0))[: feature.positions]
