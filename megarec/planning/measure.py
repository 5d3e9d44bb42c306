"""The figures of the machine that this runs on, as a JSON that `plan --hardware FILE` takes.

    python tools/plan.py --measure runs/this-machine.json                                   one rank, no links
    torchrun --nproc_per_node 2 tools/plan.py --measure runs/this-machine.json              two, and their links

All ranks of a job measure at the same time, since they share a machine's cores and memory; a figure is the slowest
rank's. Over several hosts (a launcher of many hosts, or namespaces) the network is measured as well.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megarec.config.sections import EmbeddingConfig, RunConfig
from megarec.data.batch import Batch, Ids
from megarec.distributed.collectives import Ledger, gather_numbers, raise_together
from megarec.distributed.process import start_process
from megarec.distributed.topology import ONE_RANK, Topology, build_topology
from megarec.errors import UserError
from megarec.files import check_json_output, write_json
from megarec.planning.hardware import load_hardware
from megarec.planning.held_memory import available_bytes
from megarec.planning.roofline import lookup_bytes, update_bytes
from megarec.sparse.layout import EmbeddingLayout, Feature, Table
from megarec.sparse.side import SparseSide
from megarec.training.profiling import data_sheet_tflops, measure_gemm_tflops

COPIED = 128 * 2**20  # bytes: more than any cache here holds
TABLES, ROWS, COLUMNS, EXAMPLES = 8, 200_000, 64, 4_096
SMALL, LARGE = 64, 16 * 2**20  # bytes of a rank's message, for delay and rate
REPETITIONS = 5


def measure(path: Path) -> None:
    """Measure on all ranks of the job that a launcher started, or on this one alone, and write a machine's JSON.

    Raises:
        UserError: the launcher's variables are no job's, or the file cannot be written; before anything is measured
            where that can be known. On all ranks alike.
    """
    model = {"name": "dlrm"}
    config = RunConfig.model_validate({"model": model, "data": {"path": "-"}})
    joined = dist.is_initialized()
    device = start_process(config)
    topology = build_topology(None, tensor=1)
    _on_rank_0(lambda: check_json_output("--measure", path, "this-machine.json"), topology, device)
    figures = {**_rank_figures(config, device, topology), **_link_figures(device, topology)}
    table = gather_numbers(list(figures.values()), topology, device)
    slowest = {name: _slowest(name, [row[i] for row in table]) for i, name in enumerate(figures)}

    def write() -> None:
        try:
            write_json(path, _as_json(slowest, device, topology))
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
        load_hardware(str(path))  # what was written is what is read
        print(f"{path}: {', '.join(f'{name} {value:.3g}' for name, value in slowest.items())}")

    _on_rank_0(write, topology, device)
    if dist.is_initialized() and not joined:
        dist.destroy_process_group()


def _on_rank_0(work: Callable[[], None], topology: Topology, device: torch.device) -> None:
    """Its UserError is every rank's; collective."""
    found = None
    try:
        if topology.rank == 0:
            work()
    except UserError as error:
        found = error
    raise_together(found, topology, device)


def _slowest(name: str, values: list[float]) -> float:
    return max(values) if "_us" in name else min(values)


def _rank_figures(config: RunConfig, device: torch.device, topology: Topology) -> dict[str, float]:
    source, target = (torch.ones(COPIED // 4, device=device) for _ in range(2))
    copying = _seconds(lambda: target.copy_(source), device, topology)
    number = torch.ones(1, device=device)

    def launches() -> None:
        for _ in range(1_000):
            number.add_(1)

    looking, updating = _tables(config.embedding, device, topology)
    layout = _layout()
    return {
        "gemm_tflops": measure_gemm_tflops(torch.bfloat16, device),
        "fp32_tflops": measure_gemm_tflops(torch.float32, device),
        "memory_gb": available_bytes(device) / 1e9 / (topology.ranks_per_host if device.type == "cpu" else 1),
        "memory_tb_s": 2 * COPIED / copying / 1e12,
        "lookup_gb_s": lookup_bytes(config, layout, EXAMPLES) / looking / 1e9,
        "update_gb_s": update_bytes(config, layout, EXAMPLES) / updating / 1e9,
        "launch_us": 1e6 * _seconds(launches, device, topology) / 1_000,
    }


def _layout() -> EmbeddingLayout:
    names = [f"table_{i}" for i in range(TABLES)]
    tables = tuple(Table(name, ROWS, COLUMNS) for name in names)
    features = tuple(Feature(name, name, "sum", False, COLUMNS * i, COLUMNS) for i, name in enumerate(names))
    return EmbeddingLayout(COLUMNS, tables, features, full_embeddings=TABLES, small_columns=0)


def _tables(config: EmbeddingConfig, device: torch.device, topology: Topology) -> tuple[float, float]:
    """Seconds of a lookup and of an update, without an exchange; the time of what lies between counts as lookup."""
    side = SparseSide(_layout(), config, ONE_RANK, seed=1, device=device, ledger=Ledger())
    random = torch.Generator().manual_seed(1)
    ids = {table.name: Ids(torch.randint(ROWS, (EXAMPLES,), generator=random)) for table in _layout().tables}
    none = torch.zeros(EXAMPLES, 0)
    batch = Batch(none, ids, torch.zeros(EXAMPLES), torch.arange(EXAMPLES), EXAMPLES).to(device)
    gradient = torch.ones(EXAMPLES, TABLES * COLUMNS, device=device)

    def look_up() -> Any:
        lookup = side.look_up(batch)
        _ = lookup.values  # lays them out
        return lookup

    def whole() -> None:
        lookup = look_up()
        lookup.backward(gradient)
        lookup.apply()

    looking = _seconds(look_up, device, topology)
    return looking, max(_seconds(whole, device, topology) - looking, 0.1 * looking)


def _link_figures(device: torch.device, topology: Topology) -> dict[str, float]:
    """Of the links that this job has; an all-to-all sends as much to each rank of a group."""
    found = {}
    if topology.tower is not None:
        local = topology.ranks_per_host
        delay, taken = (_all_to_all(size, topology.tower, device, topology) for size in (SMALL, LARGE))
        found["host_link_us"] = 1e6 * delay
        found["host_link_gb_s"] = LARGE * (local - 1) / local / max(taken - delay, 1e-9) / 1e9
    if topology.peer is not None:
        hosts, world = topology.hosts, topology.world_size
        delay, taken = (_all_to_all(size, topology.peer, device, topology) for size in (SMALL, LARGE))
        network = LARGE * (hosts - 1) / hosts / max(taken - delay, 1e-9) / 1e9
        numbers = torch.ones(LARGE // 4, device=device)
        short, long = (_all_reduce(part, device, topology) for part in (numbers[:16], numbers))
        passing = LARGE * (world - 1) / world / max((long - short) / 2, 1e-9) / 1e9
        found |= {"network_us": 1e6 * delay, "network_gb_s": network, "ring_us_per_host": 1e6 * short / 2 / hosts}
        found["ring_share"] = passing / topology.ranks_per_host / network
    return found


def _all_to_all(size: int, group: dist.ProcessGroup, device: torch.device, topology: Topology) -> float:
    sent = torch.ones(max(size // 4, group.size()) // group.size() * group.size(), device=device)
    received = torch.empty_like(sent)
    return _seconds(lambda: dist.all_to_all_single(received, sent, group=group), device, topology)


def _all_reduce(numbers: torch.Tensor, device: torch.device, topology: Topology) -> float:
    return _seconds(lambda: dist.all_reduce(numbers, group=topology.world), device, topology)


def _seconds(work: Callable[[], object], device: torch.device, topology: Topology) -> float:
    """The median of some calls that all ranks start together, after one that does not count."""
    taken = []
    for _ in range(1 + REPETITIONS):
        if topology.world is not None:
            dist.barrier(group=topology.world)
        start = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def _as_json(figures: dict[str, float], device: torch.device, topology: Topology) -> dict[str, Any]:
    when, job = time.strftime("%Y-%m-%d"), f"{topology.hosts} hosts x {topology.ranks_per_host} ranks"
    source = f"measured {when}, {job}, the slowest rank"
    made: dict[str, Any] = {name: {"value": float(f"{value:.4g}"), "source": source} for name, value in figures.items()}
    if "network_us" in made:  # an all-to-all over as many hosts reaches what was measured; nothing is taken off
        made["network_us"]["value"] = {str(topology.hosts): made["network_us"]["value"]}
        made["network_incast"] = {"value": 0.0, "source": f"in network_gb_s, {source}"}
    sheet = data_sheet_tflops(torch.bfloat16, device)
    if sheet is not None:
        made["peak_tflops"] = {"value": sheet, "source": "data sheet, dense, bf16"}
    name = "CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
    return {
        "name": name,
        "what": f"the machine that `plan --measure` ran on, {job}",
        "device": device.type,
        "ranks_per_host": {"value": topology.ranks_per_host, "source": source},
        **made,
    }
