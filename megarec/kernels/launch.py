"""Where every Triton kernel of the project starts, and whether one can."""

import functools
import importlib.util
import os
from typing import Any


def launch(kernel: Any, programs: int, *arguments: Any, warps: int = 4, **constants: Any) -> None:
    """Start a kernel on a grid of that many programs, if there is any."""
    if programs:
        start(kernel, programs, arguments, {"num_warps": warps, **constants})


def start(kernel: Any, programs: int, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Called by `launch`; tests/device/simulated.py replaces it."""
    kernel[(programs,)](*arguments, **options)


@functools.cache
def triton_problem(device: str) -> str | None:
    """Why kernels in Triton cannot run on this kind of device ("cuda" stands for ROCm as well); None: they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        import triton
    except (ImportError, OSError) as error:
        return f"triton cannot be imported ({' '.join(str(error).split())})"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device == "cpu":
        return "Triton has no kernels for CPUs (with TRITON_INTERPRET=1 it interprets them, slowly)"
    if device == "cuda":
        try:
            triton.runtime.driver.active.get_current_target()
        except Exception as error:  # any requirement: a C compiler, headers, a driver
            return f"Triton does not start ({' '.join(str(error).split())})"
    return None
