"""Where every Triton kernel of the project starts, and whether one can."""

import functools
import importlib.util
import os
from typing import Any


def launch(kernel: Any, programs: int, *arguments: Any, warps: int = 4, **constants: Any) -> None:
    """Start a kernel on a grid of so many programs, if there is any."""
    if programs:
        start(kernel, programs, arguments, {"num_warps": warps, **constants})


def start(kernel: Any, programs: int, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """What `launch` comes to; tests/device/simulated.py takes its place."""
    kernel[(programs,)](*arguments, **options)


@functools.cache
def triton_problem(device: str) -> str | None:
    """Why kernels in Triton cannot run on this kind of device ("cuda" stands for ROCm as well); None: they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton has no kernels for CPUs; TRITON_INTERPRET=1 interprets them, slowly"
    return None
