"""Where a run's tables lie and why: kind, ranks and bytes of every table, bytes and lookups of every rank."""

import dataclasses
import json
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from megarec.config.load import load_config
from megarec.data.schema import schema_of
from megarec.distributed.topology import Topology, check_divides, check_job
from megarec.errors import ArgumentParser, exits_cleanly
from megarec.run.spec import resolve
from megarec.sparse.run_placement import Explanation, RankLoad, TablePlacement, explain

MOST_ROWS = 1_000  # of a table: more take minutes to lay out


@exits_cleanly
def main() -> None:
    parser = ArgumentParser(description="Show where a run's tables lie, and why; nothing is built.")
    parser.add_argument("--config", type=Path, required=True, metavar="C.json", help="the JSON of a run")
    parser.add_argument("--hosts", type=int, required=True, metavar="H")
    parser.add_argument("--ranks-per-host", type=int, required=True, metavar="L")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value", help="override the config")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    arguments = parser.parse_args()
    check_job(arguments.hosts, arguments.ranks_per_host)
    config = load_config(arguments.config, arguments.set)
    world_size = arguments.hosts * arguments.ranks_per_host
    check_divides(world_size, arguments.ranks_per_host, config.parallel.tensor)
    topology = Topology(0, world_size, arguments.ranks_per_host, config.parallel.tensor)
    spec = resolve(config, schema_of(config.data))
    found = explain(config, spec.layout, spec.towers, topology)
    if arguments.json:
        print(json.dumps({**dataclasses.asdict(found), "imbalance": found.imbalance}))
    else:
        show(found)


def _mib(held: TablePlacement | RankLoad) -> tuple[str, str]:
    """Of weights, and of what is kept beside them."""
    return f"{held.bytes / 2**20:,.2f}", f"{held.state_bytes / 2**20:,.2f}"


def show(found: Explanation) -> None:
    console = Console()
    tables = Table(
        *(
            Column(name, no_wrap=name != "why")
            for name in ("table", "rows", "columns", "kind", "ranks", "MiB", "state", "why")
        )
    )
    for t in found.tables:
        ranks = ", ".join(map(str, t.ranks)) if len(t.ranks) <= 4 else f"{t.ranks[0]} .. {t.ranks[-1]} ({len(t.ranks)})"
        tables.add_row(t.table, f"{t.rows:,}", str(t.columns), t.kind, ranks, *_mib(t), t.why)
    console.print(tables)
    loads = Table("rank", "shards", "MiB", "state", "lookups a step")
    for load in found.ranks[:MOST_ROWS]:
        loads.add_row(str(load.rank), str(load.shards), *_mib(load), f"{load.lookups:,.0f}")
    console.print(loads)
    if len(found.ranks) > MOST_ROWS:
        print(f"... and {len(found.ranks) - MOST_ROWS:,} ranks more; --json has them all")
    print("largest rank over the mean: " + ", ".join(f"{name} {value:.2f}" for name, value in found.imbalance.items()))


if __name__ == "__main__":
    main()
