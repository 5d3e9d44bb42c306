"""Parameters and training FLOPs per example of a run's model, by part and by layer; nothing is built.

With --roofline also the predicted time of a step on a device, by part.
"""

import json
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from megarec.commands import example_configs
from megarec.config.load import load_config
from megarec.data.schema import schema_of
from megarec.errors import ArgumentParser, UserError, exits_cleanly
from megarec.run.cost import Parts, as_json, total
from megarec.run.spec import ModelSpec, resolve
from megarec.scaling.ladder import published

LADDER = example_configs() / "ladder"


@exits_cleanly
def main() -> None:
    parser = ArgumentParser(description="Count a run's parameters and training FLOPs per example.")
    parser.add_argument("--config", type=Path, metavar="C.json", help="the JSON of a run")
    parser.add_argument("--ladder", action="store_true", help="count the configs of ds_configs/ladder instead")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value", help="override the config")
    parser.add_argument("--roofline", metavar="DEVICE", help="predict a step's time by part on a device: H200, ...")
    parser.add_argument("--batch", type=int, metavar="B", help="examples of a rank (its share of data.batch_size)")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    arguments = parser.parse_args()
    if arguments.ladder == (arguments.config is not None):
        raise UserError("give one of --config C.json and --ladder")
    if arguments.ladder and arguments.set:
        raise UserError("--set goes with --config: the published figures are those of the ladder as it is")
    if arguments.ladder and arguments.roofline is not None:
        raise UserError("--roofline goes with --config: a prediction is one of a config and a batch")
    if arguments.batch is not None and arguments.roofline is None:
        raise UserError("--batch goes with --roofline DEVICE: counts are those of one example")
    if arguments.batch is not None and arguments.batch < 1:
        raise UserError(f"--batch {arguments.batch}: expected at least 1")
    if arguments.ladder:
        count_ladder(arguments.json)
    elif arguments.roofline is not None:
        show_roofline(arguments.config, arguments.set, arguments.roofline, arguments.batch, arguments.json)
    else:
        count_one(arguments.config, arguments.set, arguments.json)


def count_one(path: Path, overrides: list[str], in_json: bool) -> None:
    spec = resolved(path, overrides)
    cost, reasons = spec.cost, spec.reasons
    known = None if overrides else published(path)  # an override may make it another model
    if in_json:
        print(json.dumps({**as_json(cost), "published": known and known._asdict(), "choices": reasons}))
        return
    print(*reasons, sep="\n", end="\n" if reasons else "")
    console = Console()
    console.print(cost_table("part", cost.parts))
    console.print(cost_table("layer", {name: total(parts) for name, parts in cost.layers.items()}))
    print(f"{cost.sparse_parameters:,} sparse + {cost.dense_parameters:,} dense parameters")
    print(f"{cost.mac:,} multiply-accumulates forward, {cost.flop:,} training FLOP/example")
    if known:
        print(f"published ({known.source}): {known.flop:,.0f} FLOP/example; ours {cost.flop / known.flop - 1:+.2%}")
    if known and known.parameters:
        print(f"published: {known.parameters:,} parameters; ours {cost.parameters - known.parameters:+,}")


def resolved(path: Path, overrides: list[str] | None = None) -> ModelSpec:
    """The model of a config; its data need not be here where it names a schema."""
    config = load_config(path, overrides)
    return resolve(config, schema_of(config.data))


def show_roofline(path: Path, overrides: list[str], device: str, batch: int | None, in_json: bool) -> None:
    """A predicted step, by part; the import takes seconds, which counting alone does not need."""
    from megarec.planning import roofline
    from megarec.planning.hardware import load_hardware

    config = load_config(path, overrides)
    spec = resolve(config, schema_of(config.data))
    step = roofline.predict_step(config, spec, device, batch)
    if in_json:
        print(json.dumps({**as_json(spec.cost), "roofline": step.as_json()}))
        return
    table = Table(show_footer=True)
    table.add_column("part", "step")
    table.add_column("ms", f"{1e3 * step.seconds:,.2f}", justify="right")
    table.add_column("bound by")
    for title in ("GFLOP", "GB", "launches"):
        table.add_column(title, justify="right")
    table.add_column("ms, fused", f"{1e3 * step.fused_seconds:,.2f}", justify="right")
    for name, part in step.parts.items():
        numbers = f"{part.flop / 1e9:,.1f}", f"{part.bytes / 1e9:,.2f}", f"{part.launches:,}"
        table.add_row(name, f"{1e3 * part.seconds:,.2f}", part.bound, *numbers, f"{1e3 * part.fused_seconds:,.2f}")
    Console().print(table)
    known = load_hardware(device)
    ranks = f"{step.ranks} rank{'s' * (step.ranks > 1)} of one host"
    print(f"PREDICTED, NOT MEASURED: {step.examples:,} examples a rank, {ranks}, {known.name}")
    print(f"{step.examples / step.seconds:,.0f} examples/s a rank, MFU {step.mfu:.1%}; fused {step.fused_mfu:.1%}")
    for key in ("gemm_tflops", "memory_tb_s", "host_link_gb_s"):
        figure = getattr(known, key)
        if figure is not None:
            print(f"{key} {figure.value:.4g}: {figure.source}")
    print("fused: each run of operations that only move memory as one kernel, which is what a compiler could reach")


def cost_table(title: str, parts: Parts) -> Table:
    whole = total(parts)
    table = Table(show_footer=True)
    table.add_column(title, "total")
    table.add_column("parameters", f"{whole.parameters:,}", justify="right")
    table.add_column("training MFLOP/example", f"{whole.flop / 1e6:,.3f}", justify="right")
    table.add_column("share", justify="right")
    for name, part in parts.items():
        table.add_row(name, f"{part.parameters:,}", f"{part.flop / 1e6:,.3f}", f"{part.flop / whole.flop:.1%}")
    return table


def count_ladder(in_json: bool) -> None:
    figures = {path: published(path) for path in LADDER.glob("*.json")}
    known = sorted(((figure.flop, path) for path, figure in figures.items() if figure), key=lambda row: row[0])
    counted = [(path.stem, resolved(path).cost, flop) for flop, path in known]
    if in_json:
        print(json.dumps({name: {**as_json(cost), "published_flop_per_example": flop} for name, cost, flop in counted}))
        return
    table = Table(Column("config", no_wrap=True), "dense parameters", "GFLOP/example", "published", "difference")
    for name, cost, flop in counted:
        gflop, dense = f"{cost.flop / 1e9:.3f}", f"{cost.dense_parameters:,}"
        table.add_row(name, dense, gflop, f"{flop / 1e9:g}", f"{cost.flop / flop - 1:+.1%}")
    Console().print(table)


if __name__ == "__main__":
    main()
