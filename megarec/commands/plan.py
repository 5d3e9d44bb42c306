"""A predicted step of a run on a cluster: memory, bytes, time by part, and whether towers pay; nothing is measured.

With --measure the figures of this machine, as a JSON that --hardware takes.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megarec.config.load import load_config
from megarec.config.sections import RunConfig
from megarec.data.schema import schema_of
from megarec.errors import ArgumentParser, UserError, exits_cleanly

if TYPE_CHECKING:
    from megarec.planning.hardware import Hardware
    from megarec.planning.planner import Plan
    from megarec.planning.towers_pay import TowersPay, Variant

ASSUMPTIONS = [
    "on an accelerator ids, dense gradients and messages of micro-batches travel beside other work, as the code lets "
    "them; on a CPU parts follow one another",
    "tables and towers are looked up and updated evenly by all ranks; lists have their mean length",
    "ids follow a power law over the rows on an accelerator; on a CPU, and in bytes sent, they are spread evenly",
    "batches are with the rank in time",
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

    most = int(hardware.ranks_per_host.value)
    per_host = config.parallel.ranks_per_host or most if ranks_per_host is None else ranks_per_host
    quiet_libraries()
    from megarec.planning.planner import check_machine, plan_run
    from megarec.planning.towers_pay import compare
    from megarec.run.spec import resolve

    check_machine(config, hardware, hosts, per_host)
    schema = schema_of(config.data)
    made = plan_run(config, resolve(config, schema), hardware, hosts, per_host)
    found = compare(config, schema, hosts, per_host, hardware, made.work)
    result = as_json(made, found)
    if in_json:
        print(json.dumps(result))
    else:
        show(result, found)


def as_json(made: "Plan", found: "TowersPay") -> dict[str, Any]:
    flat = found.variants[0]
    return {
        "hardware": made.hardware.name,
        "hosts": made.hosts,
        "ranks_per_host": made.ranks_per_host,
        "examples_per_rank": made.examples,
        "fits": made.fits,
        "memory_bytes": {**made.memory, "available": made.available},
        "step_ms": _ms(made.timeline.exposed),
        "busy_ms": _ms(made.timeline.busy),
        "examples_per_second": made.examples_per_second,
        "mfu": made.mfu,
        "bytes_per_link": _per_link(made),
        "traffic": [sent._asdict() for sent in made.traffic],
        "towers": {
            "rows": [
                {"variant": variant.name, "not_possible": variant.impossible}
                if variant.impossible is not None
                else {
                    "variant": variant.name,
                    "compression": variant.compression,
                    "bytes_per_link": _bytes(variant),
                    "step_ms": _ms(variant.seconds or {}),
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


def _ms(seconds: dict[str, float]) -> dict[str, float]:
    return {**{name: 1e3 * own for name, own in seconds.items()}, "total": 1e3 * sum(seconds.values())}


def _per_link(made: "Plan") -> dict[str, int]:
    """Of the exchange, to the rank's host and to others; `dense` is what gradients and weights of the dense model add,
    in a ring over the ranks."""
    across = sum(message.cross_host_bytes for message in made.work.messages)
    inside = sum(message.bytes for message in made.work.messages) - across
    return {"host": inside, "network": across, "dense": int(sum(made.work.rings))}


def _bytes(variant: "Variant") -> dict[str, int]:
    """As `_per_link`."""
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
