"""A recipe of FuxiCTR's in plain torch: what tools/compare_recipe.py sets beside the translated run.

Nothing of megarec's is here: tables are `nn.Embedding`, L2 on all their rows is a term of the loss, torch's own Adam
steps everything, gradients are clipped over all parameters, rates drop to a tenth at every validation without
improvement, and the second in a row ends the run. Linear layers start by Xavier, tables with deviation 1e-4.
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

SPLITS = ("train", "valid", "test")
LEAST_IMPROVEMENT = 1e-6
LEAST_RATE = 1e-6


@dataclass(frozen=True)
class Rows:
    """A split: ids int64 [N, features] and labels float32 [N]."""

    ids: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Table:
    """A prepared data set as a table of ids.

    Attributes:
        sizes: rows of each feature's table.
    """

    features: tuple[str, ...]
    sizes: tuple[int, ...]
    splits: dict[str, Rows]


def read(directory: Path) -> Table:
    """The features with one id a row and a table of their own."""
    schema = json.loads((directory / "schema.json").read_text())
    taken = [f for f in schema["categorical"] if not f["multi_valued"] and f.get("table") is None]
    names = tuple(feature["name"] for feature in taken)
    splits = {}
    for split in SPLITS:
        columns = pq.read_table(directory / split, columns=[*names, schema["label"]])
        ids = np.stack([columns[name].to_numpy() for name in names], axis=1).astype(np.int64)
        labels = columns[schema["label"]].to_numpy().astype(np.float32)
        splits[split] = Rows(torch.from_numpy(ids), torch.from_numpy(labels))
    return Table(names, tuple(feature["rows"] for feature in taken), splits)


class Layers(nn.Sequential):
    """Linear layers, each with BatchNorm, ReLU and dropout behind it."""

    def __init__(self, inputs: int, widths: list[int], batch_norm: bool, dropout: float) -> None:
        parts: list[nn.Module] = []
        for width in widths:
            parts += [nn.Linear(inputs, width), *([nn.BatchNorm1d(width)] if batch_norm else []), nn.ReLU()]
            parts += [nn.Dropout(dropout)] if dropout else []
            inputs = width
        super().__init__(*parts)


class Plain(nn.Module):
    """A DNN; or cross layers beside it (DCNv2, parallel).

    Args:
        recipe: the keys of FuxiCTR's YAML.
        sizes: rows of the tables.
    """

    def __init__(self, recipe: dict[str, Any], sizes: tuple[int, ...]) -> None:
        super().__init__()
        dim = recipe["embedding_dim"]
        self.tables = nn.ModuleList(nn.Embedding(rows, dim) for rows in sizes)
        width = dim * len(sizes)
        hidden = recipe["hidden_units" if recipe["model"] == "DNN" else "parallel_dnn_hidden_units"]
        self.deep = Layers(width, hidden, recipe["batch_norm"], recipe["net_dropout"])
        layers = recipe.get("num_cross_layers", 0)
        self.cross = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.last = nn.Linear(hidden[-1] + (width if layers else 0), 1)
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.xavier_normal_(part.weight)
                nn.init.zeros_(part.bias)
            if isinstance(part, nn.Embedding):
                nn.init.normal_(part.weight, std=1e-4)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids [B, features] -> logits [B]."""
        first = torch.cat([table(ids[:, place]) for place, table in enumerate(self.tables)], dim=1)
        deep, x = self.deep(first), first
        for layer in self.cross:
            x = torch.addcmul(x, first, layer(x))
        logits: Tensor = self.last(torch.cat([x, deep], dim=1) if self.cross else deep)
        return logits.squeeze(1)

    def regularisation(self, weight: float) -> Tensor:
        """(weight / 2) |W|^2 of all rows of all tables."""
        squares = [part.square().sum() for part in self.tables.parameters()]
        return torch.stack(squares).sum() * (weight / 2)


def metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """AUC by ranks, ties at their mean, and LogLoss, in float64."""
    scores = logits.double().numpy()
    _, places, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[places]
    positive = labels.numpy() > 0
    above = ranks[positive].sum() - positive.sum() * (positive.sum() + 1) / 2
    auc = above / (positive.sum() * (~positive).sum())
    return {"auc": float(auc), "logloss": float(binary_cross_entropy_with_logits(logits.double(), labels.double()))}


@torch.no_grad()
def evaluated(model: Plain, rows: Rows, batch: int) -> dict[str, float]:
    model.eval()
    logits = torch.cat([model(part) for part in rows.ids.split(batch)])
    model.train()
    return metrics(logits, rows.labels)


def train(recipe: dict[str, Any], table: Table, seed: int) -> dict[str, float]:
    """AUC and LogLoss of the test split, of the best epoch by validation."""
    torch.manual_seed(seed)
    model, rows = Plain(recipe, table.sizes), table.splits["train"]
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe["learning_rate"])
    best, kept, without = -float("inf"), copy.deepcopy(model.state_dict()), 0
    for _ in range(recipe["epochs"]):
        for chosen in torch.randperm(len(rows.labels)).split(recipe["batch_size"]):
            loss = binary_cross_entropy_with_logits(model(rows.ids[chosen]), rows.labels[chosen])
            optimizer.zero_grad()
            (loss + model.regularisation(recipe["embedding_regularizer"])).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
        auc = evaluated(model, table.splits["valid"], recipe["batch_size"])["auc"]
        if auc >= best + LEAST_IMPROVEMENT:
            best, kept, without = auc, copy.deepcopy(model.state_dict()), 0
            continue
        without += 1
        for group in optimizer.param_groups:
            group["lr"] = max(group["lr"] * 0.1, LEAST_RATE)
        if without == recipe["early_stop_patience"]:
            break
    model.load_state_dict(kept)
    return evaluated(model, table.splits["test"], recipe["batch_size"])
