"""The same numbers on the device: losses against a plain process on the CPU, two ranks on one device, a resumed run."""

import json
import os
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import get_args

import torch
import torch.distributed as dist

from megarec.config.load import load_config
from megarec.config.sections import EmbeddingConfig
from megarec.errors import UserError
from megarec.parity.cases import BF16_TOLERANCE, Case
from megarec.parity.reference import reference_losses
from megarec.parity.run import case_losses, write_base
from megarec.sparse.placement import place
from megarec.sparse.tables.local import choose_backends
from megarec.training.trainer import train
from tools.benchmarks.workload import equal_tables
from tools.gpu.context import Context

LIMIT = 1e-5
ACCUMULATION, BF16 = "deepspeed.gradient_accumulation_steps=4", "deepspeed.bf16.enabled=true"
TOWERS = "parallel.towers=2"


def backends(device: str) -> list[str]:
    """Table backends that this installation has on a device."""
    layout = equal_tables(1, 8, 8)
    shards, found = place(layout, "table", 1), []
    for name in get_args(EmbeddingConfig.model_fields["backend"].annotation):
        try:
            choose_backends(layout, shards, EmbeddingConfig(backend=name), torch.device(device))
        except UserError:
            continue
        found += [name] if name != "auto" else []
    return found


def _zero(stage: int) -> str:
    return f"deepspeed.zero_optimization.stage={stage}"


def _cases(device: str) -> list[Case]:
    """On one rank."""
    chosen = [Case(1, topology=(_zero(stage),)) for stage in range(4)]
    chosen += [Case(1, topology=(_zero(2), ACCUMULATION)), Case(1, topology=(_zero(2), BF16), tolerance=BF16_TOLERANCE)]
    for backend in backends(device):
        optimizers = ("rowwise_adagrad", "adagrad")
        numbers = [f"embedding.optimizer={name}" for name in optimizers]
        chosen += [Case(1, (number,), (_zero(1), f"embedding.backend={backend}")) for number in numbers]
    return chosen


_TWO_RANKS = [
    Case(2, topology=(_zero(1),)),
    Case(2, topology=(_zero(1), "embedding.placement=row")),
    Case(2, topology=(_zero(2), "embedding.placement=column")),
    Case(2, (TOWERS,), (_zero(1), "parallel.exchange=tower", "parallel.ranks_per_host=1")),
    Case(2, topology=(_zero(2), "parallel.tensor=2")),
]


def prepare_parity(context: Context) -> None:
    _prepare(context, _cases(context.device.type))


def prepare_ranks(context: Context) -> None:
    _prepare(context, _TWO_RANKS)


def _prepare(context: Context, cases: Sequence[Case]) -> None:
    """Data, and the losses of the reference, on the CPU."""
    path = write_base(context.directory)
    numbers = dict.fromkeys(case.numbers for case in cases)
    references = {chosen: reference_losses(load_config(path, list(chosen)), context.sizes.steps) for chosen in numbers}
    context.kept |= {"path": path, "cases": cases, "references": references}


def run_parity(context: Context) -> None:
    """Largest relative deviation of the losses, by case."""
    path: Path = context.kept["path"]
    failed: list[str] = []
    for case in context.kept["cases"]:
        reference = context.kept["references"][case.numbers]
        limit = case.tolerance if case.tolerance > LIMIT else LIMIT
        try:
            losses = case_losses(path, [*case.numbers, *case.topology], len(reference))
        except Exception as error:  # keep the others
            failed.append(f"{case.name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
            context.emit(case.name, "failed")
            _meet(context, case)
            continue
        _meet(context, case)
        deviation = max(abs(mine - its) / abs(its) for mine, its in zip(losses, reference, strict=True))
        context.emit(case.name, deviation, limit=limit)
    assert not failed, "; ".join(failed)
    context.check_limits()


def _meet(context: Context, case: Case) -> None:
    """Go on with the next case when the other rank does, whether it failed as well or not.

    Raises:
        RuntimeError: it does not arrive: it waits in an operation for this rank, or is gone.
    """
    if case.ranks == 1:
        return
    store: dist.Store = context.kept["store"]
    store.set(f"{case.name}/{context.rank}", "")
    try:
        store.wait([f"{case.name}/{rank}" for rank in range(case.ranks)], timedelta(seconds=10))
    except RuntimeError:
        message = f"{case.name}: the other rank is not done with it"
        raise RuntimeError(message) from None


def run_ranks(context: Context) -> None:
    """Both ranks compute on one device, and meet over gloo: NCCL takes one rank a device."""
    os.environ.update(RANK=str(context.rank), WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="2")
    store = dist.FileStore(str(context.shared / "store"), 2)
    context.kept["store"] = store
    dist.init_process_group("gloo", store=store, rank=context.rank, world_size=2, timeout=timedelta(seconds=60))
    run_parity(context)


def prepare_repeat(context: Context) -> None:
    context.kept["path"] = write_base(context.directory)


def run_repeat(context: Context) -> None:
    _repeat(context, deterministic=False)


def run_repeat_deterministic(context: Context) -> None:
    _repeat(context, deterministic=True)
    context.check_limits()


def _repeat(context: Context, deterministic: bool) -> None:
    """20 steps, the same again, and the same with a save, an end and a resume at step 10: checkpoints, bit by bit."""
    whole, half = (20, 10) if context.sizes.steps >= 20 else (4, 2)
    files = {}
    for name, legs in (("first", [whole]), ("again", [whole]), ("resumed", [half, whole])):
        output = context.directory / name
        for steps in legs:
            settings = {"max_steps": steps, "output_dir": str(output), "checkpoint_every": half, "log_every": half}
            overrides = [f"train.{key}={json.dumps(value)}" for key, value in settings.items()]
            overrides += [f"train.deterministic={json.dumps(deterministic)}", "embedding.optimizer=rowwise_adagrad"]
            config = load_config(context.kept["path"], overrides)
            train(config, resume=steps != legs[0], started=time.time())
        files[name] = _tensor_files(output, whole)
    assert files["first"], f"no checkpoint of step {whole} under {context.directory / 'first'}"
    limit = 0 if deterministic or context.device.type == "cpu" else None
    for name in ("again", "resumed"):
        differ = [file for file, data in files["first"].items() if files[name].get(file) != data]
        context.emit(f"{name}: checkpoint files that differ, of {len(files['first'])}", float(len(differ)), limit=limit)


def _tensor_files(output: Path, step: int) -> dict[str, bytes]:
    """The content of a step's checkpoint, by file."""
    directories = [
        path for path in (output / "checkpoints").iterdir() if path.is_dir() and path.name.endswith(str(step))
    ]
    return {file.name: file.read_bytes() for path in directories for file in path.glob("*.safetensors")}
