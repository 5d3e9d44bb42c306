"""A check of megarec on one GPU in seven minutes: rates, the same numbers, MFU, memory, each beside a prediction.

python tools/gpu_check.py --out gpu.json                     # on a machine with a GPU; the ladder, tables, a run
python tools/gpu_check.py --out gpu.json --device cpu        # the same parts, small, in two minutes
python tools/gpu_check.py --out gpu.json --part ladder --part tables

Predictions are those of tools/gpu/predictions.py for an H200, made before a part runs. A part that fails, or takes
longer than its time, is in the table with its cause, and ends no other; the exit code is then 1.
"""

import importlib
import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megarec.errors import ArgumentParser, UserError, did_you_mean, exits_cleanly
from megarec.files import write_whole
from tools.gpu.runner import PARTS, expected, run_parts, serve

SECONDS = 420.0


@exits_cleanly
def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2:])
        return
    parser = ArgumentParser(description="Check megarec on one GPU: every part beside what was predicted for an H200.")
    parser.add_argument("--out", type=Path, required=True, metavar="F.json", help="everything that was found")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: the same parts, small (cuda)")
    parser.add_argument("--part", action="append", default=[], metavar="NAME", help=", ".join(p.name for p in PARTS))
    parser.add_argument("--tiny", action="store_true", help="so small that it takes seconds; measures nothing")
    arguments = parser.parse_args()
    names = [part.name for part in PARTS]
    for name in arguments.part:
        if name not in names:
            raise UserError(f"--part {name!r}: there is no such part; {did_you_mean(name, names)}")
    check_out(arguments.out)
    if arguments.device == "cpu":
        # Two ranks share the cores: threads that spin while they wait would take them all.
        os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_WAIT_POLICY": "passive"}
    machine = describe_machine(arguments.device)
    parts = [part for part in PARTS if not arguments.part or part.name in arguments.part]
    size = "tiny" if arguments.tiny else arguments.device
    problem: UserError | None = None

    def keep(found: dict[str, Any]) -> None:
        nonlocal problem
        problem = None
        try:
            write_whole(arguments.out, json.dumps({"machine": machine, **found}, indent=1).encode())
        except OSError as error:  # a disk that has filled up meanwhile: still print the table
            problem = UserError(f"--out {arguments.out}: cannot be written ({error.strerror}); what was found is above")

    with tempfile.TemporaryDirectory(prefix="megarec-gpu-") as directory:
        result = {"machine": machine, **run_parts(parts, arguments.device, size, Path(directory), SECONDS, keep)}
    keep(result)
    show(result)
    if problem is not None:
        raise problem
    sys.exit(1 if any("failed" in part for part in result["parts"].values()) else 0)


def check_out(out: Path) -> None:
    """Raise a UserError, before minutes of a GPU are spent, where the result could not be written."""
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no directory {out.parent}")
    if out.exists() and not out.is_file():
        raise UserError(f"--out {out}: is not a regular file; expected the name of a file to write, as gpu.json")
    if not os.access(out.parent, os.W_OK):
        raise UserError(f"--out {out}: {out.parent} cannot be written into; take another directory")


def describe_machine(device: str) -> dict[str, Any]:
    """Versions, and the device; imports the parts' modules, as parts are forks of this process on a CPU.

    Raises:
        UserError: there is no such device.
    """
    import torch

    if device == "cpu":
        from megarec.distributed.rank_pool import PRELOADED

        for module in PRELOADED:
            importlib.import_module(module)
        name = platform.machine()
    else:
        if not torch.cuda.is_available():
            raise UserError(
                f"--device cuda: torch {torch.__version__} finds no GPU here; --device cpu runs the same parts, small"
            )
        name = torch.cuda.get_device_name(0)
    cores = len(os.sched_getaffinity(0))
    return {"device": name, "torch": torch.__version__, "python": platform.python_version(), "cores": cores}


def show(result: dict[str, Any]) -> None:
    """The table, last of all; failures with their causes."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=", ".join(f"{key} {value}" for key, value in result["machine"].items()))
    for column in ("part", "what", "predicted for an H200", "measured"):
        table.add_column(column, overflow="fold")
    for name, part in result["parts"].items():
        for row in part["rows"]:
            value = row["value"] if isinstance(row["value"], str) else f"{row['value']:.4g} {row['unit']}".strip()
            table.add_row(name, row["what"], expected(result["predictions"], name, row["what"]), value)
        if "failed" in part:
            table.add_row(name, "FAILED", "", part["failed"])
        table.add_section()
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
