"""One process becomes one true rank of a larger job: its memory, its FLOPs, every collective."""

import json
import os
from pathlib import Path
from typing import Any

from megarec.config.load import load_config
from megarec.data.schema import schema_of
from megarec.errors import ArgumentParser, exits_cleanly

# A step gathers, multiplies and frees gigabytes: in huge pages the kernel hands them out many times faster.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

PARTS = (
    "process", "runtime", "parameters", "gradients", "optimizer", "step", "activations", "tables", "towers",
    "averages", "communication", "exchange", "snapshot", "cached", "model_states", "total",
)  # fmt: skip


@exits_cleanly
def main() -> None:
    parser = ArgumentParser(description="Rehearse one true rank of a larger job in this process.")
    parser.add_argument("--config", type=Path, required=True, metavar="C.json", help="the JSON of a run")
    parser.add_argument("--hosts", type=int, required=True, metavar="H")
    parser.add_argument("--ranks-per-host", type=int, required=True, metavar="L")
    parser.add_argument("--rank", type=int, default=0, metavar="R", help="the rank to become (0)")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value", help="override the config")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.set)
    schema = schema_of(config.data)

    from megarec.distributed.process import quiet_libraries  # seconds of imports that a bad config can save

    quiet_libraries()
    from megarec.planning.rehearse import rehearse

    result = rehearse(config, schema, arguments.hosts, arguments.ranks_per_host, arguments.rank)
    if arguments.json:
        print(json.dumps(as_json(result)))
    else:
        show(result)


def as_json(result: Any) -> dict[str, Any]:
    return {
        "rank": result.topology.rank,
        "topology": result.topology.describe(),
        "peak_bytes": result.peak,
        "predicted_bytes": result.predicted,
        "predicted_bytes_of_the_run": result.predicted_real,
        "micro_batch": {"rehearsed": result.fit.micro_batch, "of_the_run": result.fit.real_micro_batch},
        "tables_cut_to_rows": result.fit.table_rows,
        "flop": {"executed": result.executed_flop, "counted": result.counted_flop},
        "collectives": result.collectives,
        "choices": result.choices,
        "wall_seconds": result.wall_seconds,
    }


def show(result: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    fitted = result.fit
    cost = fitted.cost
    print(f"rank {result.topology.rank} of {result.topology.describe()}")
    print(f"the run: {cost.dense_parameters:,} dense + {cost.sparse_parameters:,} sparse parameters")
    if fitted.micro_batch < fitted.real_micro_batch:
        print(f"rehearsed with {fitted.micro_batch} examples a micro-batch instead of {fitted.real_micro_batch}")
    if fitted.table_rows:
        print(f"rehearsed with tables cut to {fitted.table_rows:,} rows: whole ones do not fit into the memory here")
    print(*result.choices, sep="\n", end="\n\n")

    memory = Table(title="bytes of this rank, in MiB")
    for column in ("part", "measured peak", "predicted", "predicted for the run itself"):
        memory.add_column(column, justify="left" if column == "part" else "right")
    for part in PARTS:
        row = [values[part] / 2**20 for values in (result.peak, result.predicted, result.predicted_real)]
        memory.add_row(part, *(f"{value:,.1f}" for value in row), end_section=part in ("exchange", "cached"))
    console.print(memory)

    collectives = Table(title="collectives of one step on this rank")
    for column in ("group", "op", "dtype", "calls", "MiB"):
        collectives.add_column(column, justify="right" if column in ("calls", "MiB") else "left")
    for row in result.collectives:
        collectives.add_row(row["group"], row["op"], row["dtype"], f"{row['calls']:,}", f"{row['bytes'] / 2**20:,.3f}")
    console.print(collectives)

    executed, counted = result.executed_flop / 1e9, result.counted_flop / 1e9
    print(f"{executed:,.3f} GFLOP executed in one step, {counted:,.3f} counted ({executed / counted - 1:+.2%})")
    print(f"{result.wall_seconds:.1f} s; what came from other ranks was made up, so there are no results to report")


if __name__ == "__main__":
    main()
