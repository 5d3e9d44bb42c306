"""A predicted step of a run on a cluster: memory, bytes, time by part, and whether towers pay; nothing is measured.

With --measure the figures of this machine, as a JSON that --hardware takes.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megarec.config.load import load_config
from megarec.config.sections import RunConfig
from megarec.data.schema import schema_of
from megarec.errors import ArgumentParser, UserError, exits_cleanly

if TYPE_CHECKING:
    from megarec.planning.hardware import Hardware
    from megarec.planning.towers_pay import TowersPay, Variant

ASSUMPTIONS = [
    "parts follow one another: what a run hides behind other work is won over this",
    "tables and towers are looked up and updated evenly by all ranks",
    "ids are spread evenly over the rows; lists have their mean length",
    "tower modules compute in fp32",
    "a flat all-to-all loses nothing but by its smaller messages (NCCL's PXN)",
]


@exits_cleanly
def main() -> None:
    parser = ArgumentParser(description="Predict a run's step on a cluster, and whether towers pay there.")
    parser.add_argument("--config", type=Path, metavar="C.json", help="the JSON of a run")
    parser.add_argument("--hardware", metavar="NAME", help="h100, ..., or the path of a machine's JSON")
    parser.add_argument("--hosts", type=int, metavar="H")
    parser.add_argument("--ranks-per-host", type=int, metavar="R", help="by default as many as a host has accelerators")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value", help="override the config")
    parser.add_argument("--measure", type=Path, metavar="FILE", help="measure this machine, and write its JSON")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    arguments = parser.parse_args()
    wanted = {"--config": arguments.config, "--hardware": arguments.hardware, "--hosts": arguments.hosts}
    if arguments.measure is not None:
        given = [name for name, value in wanted.items() if value is not None] + ["--set"] * bool(arguments.set)
        given += ["--ranks-per-host"] * (arguments.ranks_per_host is not None) + ["--json"] * arguments.json
        if given:
            raise UserError(f"--measure FILE stands alone: leave {', '.join(given)} out")
        from megarec.planning.measure import measure

        measure(arguments.measure)
        return
    missing = [name for name, value in wanted.items() if value is None]
    if missing:
        raise UserError(f"give {', '.join(missing)} (or --measure FILE alone)")
    from megarec.planning.hardware import load_hardware

    hardware = load_hardware(arguments.hardware)
    config = load_config(arguments.config, arguments.set)
    plan(config, hardware, arguments.hosts, arguments.ranks_per_host, arguments.json)


def plan(config: RunConfig, hardware: "Hardware", hosts: int, ranks_per_host: int | None, in_json: bool) -> None:
    """Print the plan of a run; the imports take seconds, which a bad command line need not wait for."""
    from megarec.distributed.process import quiet_libraries
    from megarec.distributed.topology import check_divides, check_job

    most = int(hardware.ranks_per_host.value)
    per_host = config.parallel.ranks_per_host or most if ranks_per_host is None else ranks_per_host
    check_job(hosts, per_host)
    if per_host > most:
        raise UserError(
            f"--ranks-per-host {per_host}: a host of {hardware.name} has {most} "
            f"({hardware.ranks_per_host.source}); give at most so many, and more --hosts"
        )
    if config.parallel.ranks_per_host not in (None, per_host):
        raise UserError(
            f"--ranks-per-host {per_host}, but the config has parallel.ranks_per_host="
            f"{config.parallel.ranks_per_host}; make them equal"
        )
    check_divides(hosts * per_host, per_host, config.parallel.tensor)
    quiet_libraries()
    from megarec.planning.towers_pay import compare

    schema = schema_of(config.data)
    found = compare(config, schema, hosts, per_host, hardware)
    result = as_json(config, hardware, hosts, per_host, found)
    if in_json:
        print(json.dumps(result))
    else:
        show(result, found)


def as_json(config: RunConfig, hardware: "Hardware", hosts: int, per_host: int, found: "TowersPay") -> dict[str, Any]:
    from megarec.dense.settings import settings_of
    from megarec.distributed.topology import Topology
    from megarec.planning.memory import largest_rank
    from megarec.planning.roofline import Clock
    from megarec.run.spec import resolve

    ranks = hosts * per_host
    job = Topology(0, ranks, per_host, config.parallel.tensor)
    memory = largest_rank(config, resolve(config, schema_of(config.data)), job, torch.device(hardware.device))
    limit = int(1e9 * hardware.memory_gb.value)
    peak = 1e12 * Clock(hardware).peak(settings_of(config.deepspeed).dtype.itemsize)
    run = found.run
    flat = found.variants[0]
    return {
        "hardware": hardware.name,
        "hosts": hosts,
        "ranks_per_host": per_host,
        "examples_per_rank": config.data.batch_size // ranks,
        "fits": memory["total"] <= limit,
        "memory_bytes": {**memory, "available": limit},
        "step_ms": _step_ms(run),
        "examples_per_second": config.data.batch_size / run.total,
        "mfu": run.flop / run.total / peak,
        "bytes_per_link": _bytes(run),
        "towers": {
            "rows": [
                {"variant": variant.name, "not_possible": variant.impossible}
                if variant.impossible is not None
                else {
                    "variant": variant.name,
                    "compression": variant.compression,
                    "bytes_per_link": _bytes(variant),
                    "step_ms": _step_ms(variant),
                    "ratio_to_flat": variant.total / flat.total,
                }
                for variant in found.variants
            ],
            "pays": found.pays,
            "best": found.best and found.best.name,
            "sentence": found.sentence,
        },
        "assumptions": ASSUMPTIONS,
    }


def _step_ms(variant: "Variant") -> dict[str, float]:
    assert variant.seconds is not None
    return {**{name: 1e3 * seconds for name, seconds in variant.seconds.items()}, "total": 1e3 * variant.total}


def _bytes(variant: "Variant") -> dict[str, int]:
    """Of a rank and step: `dense` is what gradients and weights of the dense model add, in a ring over the ranks."""
    return {"host": variant.host_bytes, "network": variant.network_bytes, "dense": variant.dense_bytes}


def show(result: dict[str, Any], found: "TowersPay") -> None:
    from rich.console import Console
    from rich.table import Column, Table

    examples, ranks = result["examples_per_rank"], result["hosts"] * result["ranks_per_host"]
    print(
        f"PREDICTED, NOT MEASURED: {result['hosts']} hosts x {result['ranks_per_host']} {result['hardware']}, "
        f"{examples:,} examples a rank, {examples * ranks:,} a step"
    )
    parts = list(dict.fromkeys(name for v in found.variants if v.seconds for name in v.seconds))
    table = Table("ms of a step", Column("MB to other hosts", justify="right"), title_justify="left")
    for name in (*parts, "total", "of flat"):
        table.add_column(name, justify="right")
    flat = found.variants[0]
    impossible = []
    for variant in found.variants:
        if variant.seconds is None:
            impossible.append(f"{variant.name} is not possible: {variant.impossible}")
            continue
        cells = [f"{1e3 * variant.seconds[name]:,.2f}" if name in variant.seconds else "" for name in parts]
        total = f"{1e3 * variant.total:,.2f}", f"{variant.total / flat.total:.2f}"
        table.add_row(variant.name, f"{variant.network_bytes / 1e6:,.1f}", *cells, *total)
    Console().print(table)
    print(*impossible, sep="\n", end="\n" if impossible else "")
    memory = result["memory_bytes"]
    fits = "fits" if result["fits"] else "DOES NOT FIT"
    print(
        f"this run: {result['step_ms']['total']:,.2f} ms a step, {result['examples_per_second']:,.0f} examples/s, MFU "
        f"{result['mfu']:.1%}; {memory['total'] / 1e9:,.1f} GB on its largest rank: {fits} into "
        f"{memory['available'] / 1e9:,.1f}"
    )
    print(result["towers"]["sentence"])


if __name__ == "__main__":
    main()
