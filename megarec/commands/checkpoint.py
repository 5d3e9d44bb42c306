"""Inspect a checkpoint, verify it, rewrite it for another number of ranks, export its model."""

import argparse
import json
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megarec.checkpoint import offline, reading
from megarec.checkpoint.format import read_index
from megarec.errors import ArgumentParser, UserError, exits_cleanly, one_line
from megarec.serving.scorer.bundle import MANIFEST, Bundle, ScoringError
from megarec.serving.scorer.tables import TableType
from megarec.signals import unwinding

MOST_FILES = 16_384


@exits_cleanly
@unwinding()
def main() -> None:
    parser = ArgumentParser(description="Inspect, verify, reshape and export checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("inspect", "what is inside; only the index is read"),
        ("verify", "recompute every checksum; also of an export that scores raw rows"),
        ("reshape", "rewrite it for another number of ranks"),
        ("export", "the model alone: for megarec.load_model, or to score raw rows"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument(
            "checkpoint", type=Path, help="a run (its best checkpoint), a checkpoint, or a pointer (latest, best)"
        )
        if name in ("reshape", "export"):
            command.add_argument("target", type=Path, help="a directory that does not exist")
        if name == "export":
            add_export_options(command)
        if name == "reshape":
            command.add_argument("--ranks", type=int, required=True, help="how many files")
        command.add_argument("--json", action="store_true", help="one JSON object on standard output")
    arguments = parser.parse_args()
    if arguments.command == "verify" and (arguments.checkpoint / MANIFEST).is_file():
        good = verify_export(arguments.checkpoint)
        print(json.dumps(good) if arguments.json else f"{arguments.checkpoint}: {good['files']} files, good")
        return
    directory = offline.locate(arguments.checkpoint)
    if arguments.command == "inspect":
        inspect(directory, arguments.json)
        return
    if arguments.command == "verify":
        index = read_index(directory)
        reading.verify(directory, index)
        found: dict[str, object] = {"step": index.step, "bytes": index.bytes, "files": len(index.files), "good": True}
    elif arguments.command == "reshape":
        if not 1 <= arguments.ranks <= MOST_FILES:
            raise UserError(f"--ranks {arguments.ranks}: expected 1 to {MOST_FILES:,} files")
        index = offline.reshape(directory, arguments.target, arguments.ranks)
        found = {"step": index.step, "bytes": index.bytes, "files": len(index.files), "path": str(arguments.target)}
    else:
        found = {**export(directory, arguments), "path": str(arguments.target)}
    if arguments.json:
        print(json.dumps(found))
    else:
        shown = (f"{key} {value:.6g}" if isinstance(value, float) else f"{key} {value}" for key, value in found.items())
        print(f"{directory}: " + ", ".join(shown))


def add_export_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--format",
        choices=("native", "onnx", "torch"),
        default="native",
        help="native: for megarec.load_model (default); onnx: scores raw rows with numpy and onnxruntime alone; "
        "torch: the same with a torch.export program as well",
    )
    command.add_argument(
        "--data", type=Path, metavar="DIR", help="the prepared data set (default: of the run's config)"
    )
    command.add_argument(
        "--calibrate", action="store_true", default=None, help="probabilities with a temperature fitted on valid"
    )
    command.add_argument("--tables", choices=get_args(TableType), help="type of the tables' numbers (default: fp32)")


def export(directory: Path, arguments: argparse.Namespace) -> dict[str, object]:
    """Export the model of a checkpoint; returns what is printed about it."""
    if arguments.format == "native":
        for option in ("data", "tables", "calibrate"):
            if getattr(arguments, option) is not None:
                raise UserError(f"--{option} is for --format onnx and torch; leave it out, or choose one of these")
        return offline.export(directory, arguments.target)
    try:
        from megarec.serving.export.bundle import export_bundle
    except ImportError as error:
        what = f"--format {arguments.format} needs the packages of the extra 'export' ({error})"
        raise UserError(f"{what}: pip install 'megarec[export]'") from error
    return export_bundle(
        directory,
        arguments.target,
        arguments.data,
        arguments.tables or "fp32",
        program=arguments.format == "torch",
        calibrate=bool(arguments.calibrate),
    )


def verify_export(directory: Path) -> dict[str, object]:
    """Compare the checksums of an export that scores raw rows.

    Raises:
        UserError: a file is missing or differs.
    """
    try:
        bundle = Bundle(directory)
        bundle.verify()
    except ScoringError as error:
        raise UserError(error) from error
    files = bundle.manifest["files"].values()
    return {"bytes": sum(about["bytes"] for about in files), "files": len(files), "good": True}


def inspect(directory: Path, in_json: bool) -> None:
    found = offline.inspect(directory)
    if in_json:
        print(json.dumps(found))
        return
    topology = ", ".join(f"{key} {value}" for key, value in found["topology"].items())
    summary = f"{found['bytes']:,} bytes in {found['files']} files, {found['optimizer']}"
    print(one_line(f"{directory}: step {found['step']}, {summary}"))
    print(one_line(f"written on {topology}"))
    table = Table("tensor", "shape", "type")
    for name, tensor in found["tensors"].items():
        table.add_row(Text(one_line(name)), " x ".join(map(str, tensor["shape"])), tensor["dtype"])
    Console().print(table)


if __name__ == "__main__":
    main()
