"""The figures of the machine that this runs on, as a JSON that `plan --hardware FILE` takes.

    python tools/plan.py --measure runs/this-machine.json                                   one rank, no links
    torchrun --nproc_per_node 2 tools/plan.py --measure runs/this-machine.json              two, and their links

All ranks of a job measure at the same time, since they share a machine's cores and memory; a figure is the slowest
rank's. Over several hosts (a launcher of many hosts, or namespaces) the network is measured as well. Products are
measured by shape (SIDES) and type, collectives by size (measure_links.py); a figure's source names what was measured.
"""

import os
import time
from collections.abc import Callable, Sequence
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
from megarec.models.cpu_gemm import fast_cpu_gemm
from megarec.planning.hardware import load_hardware
from megarec.planning.held_memory import available_bytes
from megarec.planning.measure_links import Timed, collective_seconds, link_figures, rounded, sustained, timer
from megarec.planning.measure_tables import SHAPES, Sample, costs_of, samples
from megarec.planning.roofline import lookup_bytes, update_bytes
from megarec.sparse.layout import EmbeddingLayout, Feature, Table
from megarec.sparse.side import SparseSide
from megarec.training.profiling import data_sheet_tflops, measure_gemm_tflops

COPIED = 128 * 2**20  # bytes: more than any cache here holds
TABLES, ROWS, COLUMNS, EXAMPLES = 8, 200_000, 64, 4_096
ROWS_OF_A_PRODUCT, SIDES = 2_048, (16, 64, 256, 1024)  # [2048, side] x [side, side], the last one's rate a large one's
TYPES = {"gemm": torch.bfloat16, "fp32": torch.float32}
REPETITIONS = 7
WINDOW = 0.1  # seconds of a timing of a rank's own work: many slices of a scheduler's


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
    made = machine(config, device, topology)

    def write() -> None:
        try:
            write_json(path, made)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
        load_hardware(str(path))  # what was written is what is read
        figures = {name: figure["value"] for name, figure in made.items() if isinstance(figure, dict)}
        print(f"{path}: {', '.join(f'{name} {value}' for name, value in figures.items())}")

    _on_rank_0(write, topology, device)
    if dist.is_initialized() and not joined:
        dist.destroy_process_group()


def machine(config: RunConfig, device: torch.device, topology: Topology) -> dict[str, Any]:
    """The content of a machine's JSON, the same on all ranks; collective."""
    timed = timer(device, topology, REPETITIONS)
    # CPU seconds are a rank's time only where it has a core of its own.
    alone = device.type == "cpu" and topology.hosts == 1 and topology.world_size <= (os.cpu_count() or 1)
    tables = samples(config.embedding) if alone else []
    figures = {
        **_rank_figures(config, device, topology, timed),
        **_products(device, timed),
        **collective_seconds(timed, device, topology),
        **{f"tables_us {index}": 1e6 * sample.seconds for index, sample in enumerate(tables)},
    }
    table = gather_numbers(list(figures.values()), topology, device)
    slowest = {name: _slowest(name, [row[i] for row in table]) for i, name in enumerate(figures)}
    tables = [s._replace(seconds=1e-6 * slowest[f"tables_us {index}"]) for index, s in enumerate(tables)]
    return _as_json(slowest, device, topology) | _table_costs(tables, topology)


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


def _rank_figures(config: RunConfig, device: torch.device, topology: Topology, timed: Timed) -> dict[str, float]:
    source, target = (torch.ones(COPIED // 4, device=device) for _ in range(2))
    number = torch.ones(1, device=device)

    def launches() -> None:
        for _ in range(1_000):
            number.add_(1)

    copying = sustained(timed, lambda: target.copy_(source), WINDOW)
    looking, updating = _tables(config.embedding, device, timed)
    layout = _layout()
    return {
        "memory_gb": available_bytes(device) / 1e9 / (topology.ranks_per_host if device.type == "cpu" else 1),
        "memory_tb_s": 2 * COPIED / copying / 1e12,
        "lookup_gb_s": lookup_bytes(config, layout, EXAMPLES) / looking / 1e9,
        "update_gb_s": update_bytes(config, layout, EXAMPLES) / updating / 1e9,
        "launch_us": 1e6 * sustained(timed, launches, WINDOW) / 1_000,
    }


def _products(device: torch.device, timed: Timed) -> dict[str, float]:
    """TFLOP/s by type and side, and `<type>_tflops` of a large one."""
    found = {}
    for name, dtype in TYPES.items():
        for side in SIDES:
            left, right = (torch.ones(rows, side, device=device, dtype=dtype) for rows in (ROWS_OF_A_PRODUCT, side))
            out = left @ right

            def multiply(left: Any = left, right: Any = right, out: Any = out) -> None:
                torch.matmul(left, right, out=out)

            with fast_cpu_gemm(device, dtype):  # as the model multiplies
                taken = sustained(timed, multiply, WINDOW)
            found[f"{name} {side}"] = 2e-12 * ROWS_OF_A_PRODUCT * side * side / taken
        on_cpu = device.type == "cpu"  # where a rank's best product is one that no other rank disturbed
        found[f"{name}_tflops"] = found[f"{name} {SIDES[-1]}"] if on_cpu else measure_gemm_tflops(dtype, device)
    return found


def _layout() -> EmbeddingLayout:
    names = [f"table_{i}" for i in range(TABLES)]
    tables = tuple(Table(name, ROWS, COLUMNS) for name in names)
    features = tuple(Feature(name, name, "sum", False, COLUMNS * i, COLUMNS) for i, name in enumerate(names))
    return EmbeddingLayout(COLUMNS, tables, features, full_embeddings=TABLES, small_columns=0)


def _tables(config: EmbeddingConfig, device: torch.device, timed: Timed) -> tuple[float, float]:
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

    looking = sustained(timed, look_up, WINDOW)
    return looking, max(sustained(timed, whole, WINDOW) - looking, 0.1 * looking)


def _as_json(figures: dict[str, float], device: torch.device, topology: Topology) -> dict[str, Any]:
    job, source = f"{topology.hosts} hosts x {topology.ranks_per_host} ranks", _source(topology)
    own = {name: value for name, value in figures.items() if " " not in name}
    made: dict[str, Any] = {name: {"value": rounded(value), "source": source} for name, value in own.items()}
    made |= _ramps(figures, source) | link_figures(figures, topology, source)
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


def _table_costs(tables: Sequence[Sample], topology: Topology) -> dict[str, Any]:
    """What work on tables costs on a CPU."""
    if not tables:
        return {}
    shapes = f"tables of one kind in {len(SHAPES)} shapes"
    source = f"{_source(topology)}; fitted on CPU seconds of {shapes} (planning/measure_tables.py)"
    value = {kind: {name: rounded(own) for name, own in costs.items()} for kind, costs in costs_of(tables).items()}
    return {"table_ns": {"value": value, "source": source}}


def _source(topology: Topology) -> str:
    job = f"{topology.hosts} hosts x {topology.ranks_per_host} ranks"
    return f"measured {time.strftime('%Y-%m-%d')}, {job}, the slowest rank"


def _ramps(figures: dict[str, float], source: str) -> dict[str, Any]:
    """Of products by type: the share of the largest one's rate that those of a smaller side reach."""
    found = {}
    for name in TYPES:
        rates = {side: figures[f"{name} {side}"] for side in SIDES}
        shares = {str(side): min(1.0, max(1e-3, rate / rates[SIDES[-1]])) for side, rate in rates.items()}
        said = ", ".join(f"{1e3 * rate:.3g}" for rate in rates.values())
        shape = f"products [{ROWS_OF_A_PRODUCT}, n] x [n, n] of n = {', '.join(map(str, SIDES))}: {said} GFLOP/s"
        found[f"{name}_ramp"] = {"value": rounded(shares), "source": f"{source}; {shape}"}
    return found
