"""What a run's monitor shows beside what it measures: memory and bytes sent of the rank, and where the run's machine is
known, the time of a step and of the parts that training/step.py times.

The machine is the one that train.hardware names, or an accelerator that is known by its name. A part is timed by
itself, with nothing left from the one before it, as StepTimer does on an accelerator; a step overlaps them.
"""

import logging
import re
from collections import defaultdict

import torch

from megarec.config.deepspeed import micro_batch_size
from megarec.errors import UserError
from megarec.planning.dense_traffic import run_messages
from megarec.planning.hardware import Hardware, load_hardware
from megarec.planning.memory import predict
from megarec.planning.pieces import Piece, alone
from megarec.planning.planner import Plan, plan_run
from megarec.run.build import Run
from megarec.sparse.run_placement import place_run

MIB = 2**20
NAMES = {  # as torch calls devices whose links and memory a JSON of hardware/ describes
    r"V100-SXM": "v100", r"A100-SXM": "a100", r"H100 80GB HBM3": "h100", r"H100 PCIe": "h100-pcie", r"H200$": "h200",
    r"\bB200": "b200", r"GB200": "gb200", r"L40S": "l40s", r"A40$": "a40",
}  # fmt: skip
_log = logging.getLogger(__name__)


def monitored_points(run: Run, machine: Hardware | None = None) -> dict[str, float]:
    """The points by tag, which are those of the measured points with `_predicted` behind them.

    Lists count with their mean length, and traffic is the ledger's, which does not see what DeepSpeed sends itself from
    ZeRO 1 on. Times are rank 0's to show. What the planner cannot predict of a run is left out.

    Args:
        machine: that the run is on; None: of an accelerator the one that has its name, if there is one.
    """
    try:
        found = _bytes(run)
    except UserError:  # a run that trains is not ended by what is only shown
        return {}
    if run.topology.rank == 0:
        machine = machine_of(run.device) if machine is None else machine
        if machine is not None:
            found |= _times(run, machine)
    return found


def machine_of(device: torch.device) -> Hardware | None:
    """The machine whose accelerator has the device's name; None: not known, as for every CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((load_hardware(kind) for pattern, kind in NAMES.items() if re.search(pattern, name)), None)


def _bytes(run: Run) -> dict[str, float]:
    config, spec, topology = run.config, run.spec, run.topology
    shards = place_run(config, spec.layout, spec.towers, topology)
    micro = micro_batch_size(config, topology.world_size)
    parts = predict(config, spec, topology, micro, shards, run.device)
    sent: dict[str, int] = defaultdict(int)
    for message in run_messages(config, spec, topology, shards):
        sent[message.group] += message.bytes
        sent["cross_host"] += message.cross_host_bytes
    held = {
        "tables": parts["tables"],
        "dense": parts["parameters"] + parts["optimizer"],
        "activations": parts["activations"],
    }
    return {
        **{f"workload/memory_mib/{part}_predicted": size / MIB for part, size in held.items()},
        **{f"workload/traffic_mib_per_step/{group}_predicted": size / MIB for group, size in sent.items()},
    }


def _times(run: Run, machine: Hardware) -> dict[str, float]:
    topology = run.topology
    try:
        if machine.device != run.device.type:
            raise UserError(f"hardware {machine.name} computes on {machine.device}, and the run on {run.device.type}")
        found = plan_run(run.config, run.spec, machine, topology.hosts, topology.ranks_per_host)
    except UserError as error:
        _log.warning("TensorBoard has no predicted time of a step: %s", error)
        return {}
    parts = {f"workload/time_ms/{part}_predicted": 1e3 * own for part, own in timed_parts(found).items()}
    return {**parts, "workload/examples_per_second_predicted": found.examples_per_second}


def timed_parts(plan: Plan) -> dict[str, float]:
    """Seconds of a `step` and of the parts that a run times; `data` is not predicted, and `forward` not under tensor
    parallelism, whose messages are not told apart by direction."""
    of_part: dict[str, set[str]] = defaultdict(set)
    for piece in plan.pieces:
        part = _timed_as(piece, plan.work.stage, plan.hardware.device)
        if part is not None:
            of_part[part].add(piece.name)
    if not plan.work.tensor:
        of_part["forward"] = {name for name in of_part["dense"] if name.removeprefix("start ").startswith("forward")}
    found = {part: alone(plan.pieces, names) for part, names in of_part.items()}
    ids = plan.timeline.exposed.get("ids")
    return {"step": plan.seconds, **found, **({} if ids is None else {"ids": ids})}


def _timed_as(piece: Piece, stage: int, device: str) -> str | None:
    """The part of training/step.py in which a piece runs; None: in none, or as far as the step waits (ids)."""
    name = piece.name.removeprefix("start ")
    if name.startswith(("ids", "wait for", "host waits", "end")):
        return None
    if name == "optimizer" or name == "weights":
        return "optimizer"
    if name.startswith("dense gradients") and device == "cpu" and not stage:
        return "optimizer"  # sent in the backward pass or after it, and waited for there (dense/side.py, apply)
    if name.startswith(("forward", "backward", "tensor links", "labels", "dense gradients", "weights")):
        return "dense"
    return "check" if name in ("check", "answer") else "exchange"
