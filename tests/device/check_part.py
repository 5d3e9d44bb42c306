"""The part `tables` of tools/gpu_check.py on the simulated accelerator: its tensors must all be where they belong."""

import tempfile
from pathlib import Path
from unittest.mock import patch

import torch

from tests.device.simulated import DEVICE, simulated
from tools.gpu import tables
from tools.gpu.context import SIZES, Context


class Event:
    """Of a device whose clock stands still."""

    def __init__(self, device: torch.device, enable_timing: bool) -> None: ...

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, last: "Event") -> float:
        return 1.0


def tables_part() -> list[str]:
    """What the part measures, with tables in plain torch."""
    with (
        tempfile.TemporaryDirectory() as name,
        simulated(),
        patch.object(torch, "Event", Event),
        patch.object(tables, "forget", lambda device: None),
        patch.object(tables, "backends", lambda device: ["torch"]),
    ):
        context = Context(DEVICE, SIZES["tiny"], Path(name), Path(name), rank=0)
        tables.run(context)
    return [row["what"] for row in context.kept["rows"]]
