"""A new dense model in one file: a gated cross network (GDCN, arXiv 2311.04635), trained for a few steps.

    x_{l+1} = x_0 * (W_l x_l + b_l) * sigmoid(V_l x_l) + x_l,  x_0 = flatten(X_0)

python docs/examples/add_a_model.py                                           # one rank, on the quickstart's data
deepspeed --num_gpus 2 docs/examples/add_a_model.py parallel.tensor=2         # two ranks: the same losses

Here the model is hooked in from outside. To keep it, put each part where its comment says, and add its case to
megarec/parity/cases.py. Shape suffixes: B examples, N embeddings of an example, D their width, C = N x D columns.
"""

import sys
import time
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megarec.config.base import ModelConfig, Positive
from megarec.config.load import load_config
from megarec.config.sections import RunConfig
from megarec.models import recommender
from megarec.models.blocks import MLP
from megarec.run import cost
from megarec.run.cost_parts import Part, Parts, count_mlp
from megarec.training.trainer import train

ROOT = Path(__file__).resolve().parents[2]


class GdcnConfig(ModelConfig):  # megarec/config/models.py, and its name in MODELS there
    name: Literal["gdcn"] = "gdcn"
    layers: Positive = 2


class Gdcn(nn.Module):  # megarec/models/gdcn.py: what X_0 [B, N, D] becomes; it knows no process group
    def __init__(self, n: int, config: GdcnConfig) -> None:
        super().__init__()
        columns = n * config.dim
        self.cross = nn.ModuleList(MLP(columns, [], columns) for _ in range(config.layers))
        self.gates = nn.ModuleList(MLP(columns, [], columns, bias=False) for _ in range(config.layers))
        self.head = MLP(columns, config.head, 1, dropout=config.dropout)

    def forward(self, x_BND: Tensor, keys: Tensor | None = None) -> Tensor:
        x0_BC = x_BC = x_BND.flatten(1)
        for cross, gate in zip(self.cross, self.gates, strict=True):
            x_BC = x0_BC * cross(x_BC) * torch.sigmoid(gate(x_BC)) + x_BC
        return self.head(x_BC, keys).squeeze(1)


def count_gdcn(n: int, config: GdcnConfig) -> dict[str, Parts]:  # megarec/run/cost.py: GFLOP/example and MFU
    columns = n * config.dim
    layer = {"cross": Part(2 * columns * columns + columns, 2 * columns * columns)}
    head = {"head": count_mlp(columns, config.head, 1, bias=True)}
    return {f"layers.{index}": layer for index in range(config.layers)} | {"head": head}


class GdcnRun(RunConfig):
    model: GdcnConfig


if __name__ == "__main__":
    recommender.build_over_arch = lambda n, dense, config, norm, headless: Gdcn(n, config)  # a case in that function
    cost._count_over_arch = lambda n, dense, config, headless: count_gdcn(n, config)  # a case in that function
    overrides = ["train.max_steps=40", "train.output_dir=runs/gdcn", *(a for a in sys.argv[1:] if a[:2] != "--")]
    base = load_config(ROOT / "ds_configs/movielens-100k.json", overrides).model_dump(mode="json")
    run = GdcnRun.model_validate(base | {"model": {"name": "gdcn", "dim": 16, "head": [64]}})
    train(run, resume=False, started=time.time())
