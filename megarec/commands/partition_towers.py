"""Which features share a tower: learned from a short training of the flat model, or by a baseline.

Beside towers.json: towers.png (the plane), towers-matrix.png, towers-interactions.npy (what a probe found).
"""

import argparse
import contextlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megarec.config.load import load_config
from megarec.errors import ArgumentParser, exits_cleanly
from megarec.files import check_json_output
from megarec.planning.partition.partition import Partition, Requested, check_requested, inside_and_across, partition
from megarec.planning.partition.report import write_partition
from megarec.signals import unwinding

MOST_NAMES = 40  # features of a tower that are listed


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description="Assign the categorical features of a run to towers.")
    parser.add_argument("--config", type=Path, required=True, metavar="C.json", help="the JSON of a run")
    parser.add_argument("--towers", type=int, required=True, metavar="T", help="a multiple of the hosts")
    parser.add_argument("--output", type=Path, required=True, metavar="towers.json", help="file for parallel.towers")
    parser.add_argument(
        "--strategy", default="coherent", help="coherent (default), diverse, strided, greedy, random, planted"
    )
    parser.add_argument(
        "--balance",
        type=float,
        metavar="R",
        help="cost of a tower, at most R x the mean (1.1, or more where features are too coarse)",
    )
    parser.add_argument(
        "--host-memory-gib", type=float, metavar="GIB", help="a tower's tables must fit into it (no limit)"
    )
    parser.add_argument(
        "--probe-steps", type=int, metavar="N", help="training steps of the probe, one epoch at most (300)"
    )
    parser.add_argument(
        "--measure",
        metavar="M",
        help="what the probe measures: difference (default) of a small DCNv2; cosine, as in DMT's paper",
    )
    parser.add_argument(
        "--interactions", type=Path, metavar="FILE.npy", help="what an earlier probe found, in place of a new probe"
    )
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value", help="override the config")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    return parser.parse_args()


@exits_cleanly
@unwinding()
def main() -> None:
    arguments = parse_arguments()
    say_to = sys.stderr if arguments.json else sys.stdout
    # With --json, output of libraries goes to standard error as well.
    with contextlib.redirect_stdout(sys.stderr) if arguments.json else contextlib.nullcontext():
        found, files = run(arguments, lambda line: print(line, file=say_to, flush=True))
    if arguments.json:
        print(json.dumps(as_json(found, files)))
    else:
        show(found, files)


def run(arguments: argparse.Namespace, say: Callable[[str], None]) -> tuple[Partition, list[Path]]:
    """Check, partition, write."""
    requested = Requested(
        towers=arguments.towers,
        strategy=arguments.strategy,
        balance=arguments.balance,
        host_memory_gib=arguments.host_memory_gib,
        probe_steps=arguments.probe_steps,
        interactions=arguments.interactions,
        measure=arguments.measure,
    )
    check_requested(requested)
    # Drop the config's parallel.towers: it may be the file that is about to be written.
    config = load_config(arguments.config, [f"parallel.towers={requested.towers}", *arguments.set])
    check_json_output("--output", arguments.output, "towers.json")
    found = partition(config, requested, say)
    return found, write_partition(found, arguments.output, Path(config.train.output_dir) / "tensorboard")


def as_json(found: Partition, files: list[Path]) -> dict[str, Any]:
    inside, across = _interactions(found, None)
    return {
        "strategy": found.strategy,
        "seed": found.seed,
        "towers": found.towers.features,
        "cost": found.cost,
        "over_mean": {kind: [_over_mean(costs, cost) for cost in costs] for kind, costs in found.cost.items()},
        "stress": found.picture and found.picture.stress,
        "interaction": {"inside": inside, "across": across},
        "adjusted_rand": found.agreement,
        "seconds": found.seconds,
        "choices": found.reasons,
        "files": [str(path) for path in files],
    }


def show(found: Partition, files: list[Path]) -> None:
    print(*found.reasons, sep="\n")
    table = Table(title=f"{found.strategy}; in brackets: against the mean of the towers")
    for column in ("tower", "features", "MiB", "lookups", "MFLOP", "inside", "across"):
        table.add_column(column, justify="right")
    for tower, names in enumerate(found.towers.features):
        costs = [_cost(found, kind, tower, unit) for kind, unit in (("bytes", 2**20), ("lookups", 1), ("flop", 1e6))]
        table.add_row(str(tower), str(len(names)), *costs, *map(_number, _interactions(found, tower)))
    Console().print(table)
    print("MiB of tables and their optimizer state; lookups and module MFLOP an example; mean interactions")
    for tower, names in enumerate(found.towers.features):
        rest = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
        print(f"tower {tower}: {', '.join(names[:MOST_NAMES])}{rest}")
    inside, across = (_number(value) for value in _interactions(found, None))
    if found.picture is not None:
        print(
            f"mean interaction {inside} inside towers, {across} across; stress of the plane {found.picture.stress:.3f}"
        )
    if found.agreement is not None:
        print(f"adjusted Rand index {found.agreement:.3f} with the data's hidden groups (1: found, near 0: chance)")
    print(", ".join(f"{name} {seconds:.1f} s" for name, seconds in found.seconds.items()))
    print("wrote", *files)


def _interactions(found: Partition, tower: int | None) -> tuple[float | None, float | None]:
    if found.picture is None:
        return None, None
    inside, across = inside_and_across(found.picture.interactions, found.tower_of_features(), tower)
    return (None if math.isnan(inside) else inside, None if math.isnan(across) else across)


def _over_mean(costs: list[float], cost: float) -> float | None:
    return cost * len(costs) / sum(costs) if sum(costs) else None


def _cost(found: Partition, kind: str, tower: int, unit: float) -> str:
    costs = found.cost[kind]
    ratio = _over_mean(costs, costs[tower])
    return "-" if ratio is None else f"{costs[tower] / unit:,.3g} ({ratio:.2f})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


if __name__ == "__main__":
    main()
