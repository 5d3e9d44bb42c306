"""Predictions from an exported model in one process, without an engine.

model = megarec.load_model("exported")       # python tools/checkpoint.py export runs/r exported
logits = model.predict(batch)                # what the run's own evaluation computes
"""

import json
from math import prod
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import safe_open
from torch import Tensor

from megarec.checkpoint.format import FileEntry, checked_size, read_header
from megarec.checkpoint.offline import MODEL_CONFIG, MODEL_FILE, MODEL_FORMAT
from megarec.checkpoint.sparse import TABLES, TOWERS
from megarec.checkpoint.writing import verify_file
from megarec.config.sections import RunConfig
from megarec.config.towers import IdentityTowerConfig
from megarec.data.batch import Batch
from megarec.data.schema import Schema
from megarec.dense.masters import DENSE as DENSE
from megarec.dense.parallelize import computing_type
from megarec.distributed.collectives import Ledger
from megarec.distributed.topology import ONE_RANK
from megarec.errors import DamagedCheckpoint, UserError
from megarec.models.initial import materialize
from megarec.models.recommender import Recommender
from megarec.run.spec import resolve
from megarec.sparse.side import SparseSide
from megarec.sparse.towers.modules import TowerModules
from megarec.sparse.towers.replicas import resolve_optimizer
from megarec.sparse.towers.sizes import ResolvedTowers


class Predictor:
    """A trained model; `load_model` builds it.

    Attributes:
        config: of the run that trained it.
        schema: the features that a batch must have.
    """

    def __init__(self, config: RunConfig, schema: Schema, sparse: SparseSide, model: Recommender) -> None:
        self.config, self.schema = config, schema
        self._sparse, self._model = sparse, model

    @torch.no_grad()
    def predict(self, batch: Batch) -> Tensor:
        """Logits float32 [B]; their sigmoid is the predicted probability of the label."""
        logits: Tensor = self._model(batch.numeric, self._sparse.look_up(batch).values, batch.keys)
        return logits


def load_model(path: str | Path, device: str | torch.device = "cpu") -> Predictor:
    """Read what `tools/checkpoint.py export` wrote.

    Raises:
        UserError: a file is missing, damaged, or its tensors are not those of its config; nothing was allocated.
    """
    directory, device = Path(path), torch.device(device)
    config, schema, entry = _read_about(directory)
    file = checked_size(directory, MODEL_FILE, entry)
    verify_file(file, entry)
    spec = resolve(config, schema)
    model = spec.meta_model()
    expected = {DENSE + name: tuple(p.shape) for name, p in model.named_parameters()}
    expected |= {f"{TABLES}{table.name}/weight": (table.rows, table.columns) for table in spec.layout.tables}
    expected |= _tower_shapes(spec.towers)
    _check(file, expected)

    module = config.tower_module
    sparse = SparseSide(
        spec.layout,
        config.embedding.model_copy(update={"optimizer": "sgd"}),  # it keeps no state
        ONE_RANK,
        seed=config.train.seed,
        device=device,
        ledger=Ledger(),
        towers=spec.towers,
        tower_optimizer=None if isinstance(module, IdentityTowerConfig) else resolve_optimizer(module, config.dense),
    )
    materialize(model, device)
    model.to(computing_type(config.deepspeed)).eval()
    with safe_open(file, "pt") as tensors, torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors.get_tensor(DENSE + name))
        for name, (_, tensor) in sparse.state().items():
            if name.endswith("/weight"):
                tensor.copy_(tensors.get_tensor(TABLES + name))
        for name, parameter in sparse.modules.bank.named_parameters() if sparse.modules else ():
            parameter.copy_(tensors.get_tensor(TOWERS + name))
    return Predictor(config, schema, sparse, model)


def _read_about(directory: Path) -> tuple[RunConfig, Schema, FileEntry]:
    path = directory / MODEL_CONFIG
    try:
        about: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if about["format"] != MODEL_FORMAT or about["version"] != 1:
            raise ValueError(f"format {about['format']!r}, version {about['version']!r}")
        config = RunConfig.model_validate(about["config"])
        return config, Schema.model_validate(about["schema"]), FileEntry.model_validate(about["file"])
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); tools/checkpoint.py export writes it") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the config of an exported model ({' '.join(str(error).split())})") from error


def _tower_shapes(towers: ResolvedTowers) -> dict[str, tuple[int, ...]]:
    if towers.towers is None or towers.modules is None:
        return {}
    with torch.device("meta"):
        bank = TowerModules(towers.modules, range(len(towers.towers)))
    return {TOWERS + name: tuple(parameter.shape) for name, parameter in bank.named_parameters()}


def _check(file: Path, expected: dict[str, tuple[int, ...]]) -> None:
    """Before anything is allocated: the file has these tensors, and so at least their size."""
    there = read_header(file)
    for name, shape in expected.items():
        if name not in there or there[name].shape != shape:
            found = f"{list(there[name].shape)}" if name in there else "missing"
            raise DamagedCheckpoint(f"{file}: {name} is {found}, {MODEL_CONFIG} says {list(shape)}")
    if unknown := sorted(set(there) - set(expected)):
        raise DamagedCheckpoint(f"{file}: {unknown[0]} is there, but not in the model of {MODEL_CONFIG}")
    assert sum(prod(tensor.shape) for tensor in there.values()) == sum(map(prod, expected.values()))
