"""A predicted step of a run on a cluster: memory, bytes, time by part, whether towers pay, and what to choose; nothing
is measured.

With --measure the figures of this machine, as a JSON that --hardware takes.
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from megarec.config.load import load_config
from megarec.config.sections import RunConfig
from megarec.data.schema import Schema, schema_of
from megarec.errors import ArgumentParser, UserError, did_you_mean, exits_cleanly
from megarec.files import check_output_file, write_whole

if TYPE_CHECKING:
    from rich.console import Console

    from megarec.planning.hardware import Hardware
    from megarec.planning.planner import Plan
    from megarec.planning.search import Allowed, Chosen
    from megarec.planning.towers_pay import TowersPay, Variant

ALLOWED: tuple["Allowed", ...] = ("messages", "modules", "batch")
ASSUMPTIONS = [
    "on an accelerator ids, dense gradients and messages of micro-batches travel beside other work, as the code lets "
    "them; on a CPU parts follow one another",
    "tables and towers are looked up, sent and updated evenly by all ranks; lists have their mean length",
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
    parser.add_argument(
        "--choose", action="store_true", help="search for the fastest settings that fit, and plan those"
    )
    parser.add_argument(
        "--allow",
        default="",
        metavar="LIST",
        help=f"with --choose, what may change the numbers as well: {', '.join(ALLOWED)}, separated by commas",
    )
    parser.add_argument(
        "--out", type=Path, metavar="C.json", help="with --choose, write the run with the chosen settings"
    )
    parser.add_argument("--trace", type=Path, metavar="T.json", help="write the step's timeline for Perfetto or Chrome")
    parser.add_argument("--html", type=Path, metavar="P.html", help="write one page: memory, links, timeline, scaling")
    arguments = parser.parse_args()
    wanted = {"--config": arguments.config, "--hardware": arguments.hardware, "--hosts": arguments.hosts}
    if arguments.measure is not None:
        given = [name for name, value in wanted.items() if value is not None] + ["--set"] * bool(arguments.set)
        given += ["--ranks-per-host"] * (arguments.ranks_per_host is not None) + ["--json"] * arguments.json
        given += [f"--{name}" for name in ("choose", "allow", "out", "trace", "html") if getattr(arguments, name)]
        if given:
            raise UserError(f"--measure FILE stands alone: leave {', '.join(given)} out")
        from megarec.planning.measure import measure

        measure(arguments.measure)
        return
    missing = [name for name, value in wanted.items() if value is None]
    if missing:
        raise UserError(f"give {', '.join(missing)} (or --measure FILE alone)")
    from megarec.planning.hardware import load_hardware

    allowed = allowed_of(arguments.allow)
    for option in ("allow", "out"):
        if getattr(arguments, option) and not arguments.choose:
            raise UserError(f"--{option} belongs to --choose: give both, or neither")
    files = Files(arguments.out, arguments.trace, arguments.html)
    files.check()
    hardware = load_hardware(arguments.hardware)
    config = load_config(arguments.config, arguments.set)
    asked = Asked(arguments.json, allowed if arguments.choose else None, files)
    plan(config, hardware, arguments.hosts, arguments.ranks_per_host, asked)


class Files(NamedTuple):
    """What to write beside the terminal's lines."""

    out: Path | None
    trace: Path | None
    html: Path | None

    def check(self) -> None:
        """Raise a UserError for what cannot be written, before the work."""
        for option, kind, path in (
            ("out", "JSON", self.out),
            ("trace", "JSON", self.trace),
            ("html", "HTML", self.html),
        ):
            if path is not None:
                check_output_file(path, option, kind)


class Asked(NamedTuple):
    """How to answer.

    Attributes:
        allowed: with --choose, what may change numbers; None: no choice is asked for.
    """

    in_json: bool
    allowed: "frozenset[Allowed] | None"
    files: Files


def allowed_of(text: str) -> "frozenset[Allowed]":
    """The words of --allow.

    Raises:
        UserError: one that is not known.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    for word in words:
        if word not in ALLOWED:
            raise UserError(f"--allow {word}: {did_you_mean(word, ALLOWED)} (all: {', '.join(ALLOWED)})")
    return frozenset(word for word in ALLOWED if word in words)


def plan(config: RunConfig, hardware: "Hardware", hosts: int, ranks_per_host: int | None, asked: Asked) -> None:
    """Print the plan of a run; the imports take seconds, which a bad command line need not wait for."""
    from megarec.distributed.process import quiet_libraries

    most = int(hardware.ranks_per_host.value)
    per_host = config.parallel.ranks_per_host or most if ranks_per_host is None else ranks_per_host
    quiet_libraries()
    from megarec.planning import choice_report
    from megarec.planning.planner import check_machine, plan_run
    from megarec.planning.search import Search, Specs, choose
    from megarec.planning.towers_pay import compare

    check_machine(config, hardware, hosts, per_host)
    schema = schema_of(config.data)
    chosen = None
    if asked.allowed is None:
        made = plan_run(config, Specs(schema).of(config), hardware, hosts, per_host)
    else:
        search = Search(config, Specs(schema), hardware, hosts, per_host, asked.allowed)
        chosen = choose(search)
        if not chosen.fits:
            raise UserError(choice_report.nothing_fits(chosen, choice_report.remedies(search, chosen.best)))
        assert chosen.best.plan is not None
        config, made = chosen.best.config, chosen.best.plan
    found = compare(config, schema, hosts, per_host, hardware)
    result = as_json(made, found)
    if chosen is not None:
        result["choice"] = choice_report.as_json(chosen)
    write_files(asked.files, config, schema, made, chosen)
    if asked.in_json:
        print(json.dumps(result))
    else:
        if chosen is not None:
            show_choice(chosen)
        show(result, found)
    if not made.fits:
        raise UserError(
            f"the run does not fit: it needs {choice_report.missing_of(made)}; --choose looks for settings that fit, "
            "and says what would help where none do"
        )


def write_files(files: Files, config: RunConfig, schema: Schema, made: "Plan", chosen: "Chosen | None") -> None:
    """The chosen run, the trace and the page, as far as they are asked for."""
    from megarec.planning.page import page
    from megarec.planning.sweep import sweeps
    from megarec.planning.trace import write_trace

    if files.out is not None:
        _write(files.out, config.model_dump_json(indent=2, exclude_unset=True) + "\n")
    if files.trace is not None:
        write_trace(made, files.trace)
    if files.html is not None:
        curves = sweeps(config, schema, made.hardware, made.hosts, made.ranks_per_host)
        _write(files.html, page(made, curves, chosen))


def _write(path: Path, text: str) -> None:
    try:
        write_whole(path, text.encode())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error


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
    return {"host": inside, "network": across, "dense": made.work.sent.over_the_ring}


def _bytes(variant: "Variant") -> dict[str, int]:
    """As `_per_link`."""
    return {"host": variant.host_bytes, "network": variant.network_bytes, "dense": variant.dense_bytes}


def show_choice(chosen: "Chosen") -> None:
    """What is chosen and why, and the choice with one setting changed."""
    from rich.table import Table

    from megarec.planning import choice_report

    for title, (head, rows) in (
        (f"chosen of {chosen.looked_at:,} configs", choice_report.change_rows(chosen)),
        ("the choice with one setting changed, ms of a step", choice_report.alternative_rows(chosen)),
    ):
        table = Table(title=title, title_justify="left")
        for place, name in enumerate(head):
            table.add_column(name, justify="left" if place < 2 or name in ("chosen", "why") else "right")
        for row in rows:
            table.add_row(*row)
        console().print(table)


def console() -> "Console":
    """As wide as the terminal; where there is none, wide enough for a table."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160)


def show(result: dict[str, Any], found: "TowersPay") -> None:
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
    console().print(table)
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
