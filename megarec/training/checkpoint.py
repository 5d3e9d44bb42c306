"""Plain save and resume on the same topology: the engine's own files, the tables of each rank, one JSON of positions.

`latest` is written last, so it never names a checkpoint that is not whole.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import load_file, save_file

from megarec.embeddings.exchange import SparseSide
from megarec.errors import UserError
from megarec.topology import Topology

LATEST = "latest"
BEST = "best"


@dataclass
class Position:
    """Where a run stands; everything that is neither weights nor optimizer state.

    Attributes:
        step: optimizer steps done.
        best, since_best, since_drop, plateau_drops: of the validation's score (training.schedule).
        skipped_steps: steps that were not applied.
    """

    step: int = 0
    best: float = float("inf")
    since_best: int = 0
    since_drop: int = 0
    plateau_drops: int = 0
    skipped_steps: int = 0


def save(
    directory: Path, name: str, engine: Any, sparse: SparseSide, position: Position, topology: Topology, keep: int = 2
) -> None:
    """Write checkpoint `name` under `directory` from all ranks; collective. Older `step-*` beyond `keep` go."""
    target = directory / name
    if topology.rank == 0:
        target.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    engine.save_checkpoint(str(directory), tag=name, save_latest=False)
    save_file(sparse.state_dict(), target / _tables_file(topology.rank))
    dist.barrier()
    if topology.rank == 0:
        described = {"position": asdict(position), "topology": _shape(topology, engine)}
        (target / "run.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        if name != BEST:
            _publish(directory, name)
            steps = sorted(directory.glob("step-*"))
            for old in steps[:-keep]:
                shutil.rmtree(old)
    dist.barrier()


def set_aside(directory: Path) -> None:
    """Rename the checkpoints of an earlier run to `<directory>.previous`, replacing what was set aside before.

    A run that starts afresh must neither mix with them nor delete the only copy of a night's work.
    """
    if directory.is_dir():
        previous = directory.with_name(directory.name + ".previous")
        shutil.rmtree(previous, ignore_errors=True)
        directory.rename(previous)


def latest(directory: Path) -> str | None:
    """Name of the newest whole checkpoint under `directory`, if there is one."""
    pointer = directory / LATEST
    return pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else None


def load(directory: Path, name: str, engine: Any, sparse: SparseSide, topology: Topology) -> Position:
    """Read checkpoint `name` back into the same topology, optimizer states included; collective.

    (DeepSpeed 0.19.8 could load the weights alone, but at ZeRO-3 it then takes them from what `latest` names.)

    Raises:
        UserError: the checkpoint is incomplete or was written on another topology.
    """
    target = directory / name
    try:
        described = json.loads((target / "run.json").read_text(encoding="utf-8"))
        position = Position(**described["position"])
        written = described["topology"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{target}/run.json: not a readable checkpoint ({error}); remove {target}") from error
    if written != _shape(topology, engine):
        raise UserError(f"{target} was written on {written}, this job is {_shape(topology, engine)}; use the same")
    tables = target / _tables_file(topology.rank)
    if not tables.is_file():
        raise UserError(f"{tables} is missing: the checkpoint is incomplete; remove {target}")
    loaded, _ = engine.load_checkpoint(str(directory), tag=name)
    if loaded is None:
        raise UserError(f"{target}: DeepSpeed found no dense state there; remove {target}")
    sparse.load_state_dict(load_file(tables))
    return position


def _tables_file(rank: int) -> str:
    return f"tables-rank-{rank:05d}.safetensors"


def _shape(topology: Topology, engine: Any) -> dict[str, int]:
    return {"ranks": topology.world_size, "tensor": topology.tensor_size, "zero": engine.zero_optimization_stage()}


def _publish(directory: Path, name: str) -> None:
    temporary = directory / (LATEST + ".tmp")
    temporary.write_text(name + "\n", encoding="utf-8")
    temporary.replace(directory / LATEST)
