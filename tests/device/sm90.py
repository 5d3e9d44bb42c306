"""Triton kernels compiled for an H100 or H200 (sm_90) without a GPU: registers, spills and shared memory of each.

`python -m tests.device.sm90 NAME ...` prints one JSON object. A process of its own: in the tests' Triton interprets.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megarec.models import fused_fm

# Of the published rows: layer 1 and later layers of 1.25 GFLOP, and the later ones of 108.
FM_SHAPES = [(723, 24, 160), (64, 24, 160), (384, 192, 160)]
GRADIENT_SHAPES = [(120, 723, 160), (56, 64, 160)]


def usage(
    kernel: Any, pointers: dict[str, str], scalars: dict[str, str], constants: dict[str, Any], warps: int = 4
) -> dict[str, Any]:
    """Compile a kernel.

    Args:
        pointers: types by name, such as "*bf16"; aligned to 16 bytes, as torch's tensors are.
        scalars: types by name, such as "i32".
        constants: its tl.constexpr arguments.
    """
    names = kernel.arg_names
    signature = {name: (pointers | scalars).get(name, "constexpr") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    compiled = triton.compile(
        ASTSource(kernel, signature, values, aligned), target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}
    )
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+).*LOCAL:(\d+)", told).groups())  # type: ignore[union-attr]
    return {
        "registers": registers,
        "spilled_bytes": stack + local,
        "shared_bytes": compiled.metadata.shared,
        "tensor_cores": "wgmma" in compiled.asm["ptx"] or "mma.sync" in compiled.asm["ptx"],
    }


def fm_norm(n: int, k: int, dim: int) -> dict[str, Any]:
    kernel = fused_fm.fm_norm_kernel
    wide = dict.fromkeys(("means", "rstds"), "*fp32")
    pointers = dict.fromkeys(("x", "y", "weight", "bias", "fm", "output"), "*bf16") | wide
    sizes = {"N": n, "K": k, "D": dim, "BIAS": True, "FLAT": fused_fm._FLAT, **fused_fm.tile(n, k, dim)}
    return usage(kernel, pointers, {"eps": "fp32"}, sizes)


def weight_gradient(rows: int, n: int, dim: int) -> dict[str, Any]:
    kernel = fused_fm.weight_gradient_kernel
    pointers, scalars = {"dp": "*bf16", "x": "*bf16", "sums": "*fp32"}, {"examples": "i32", "in_group": "i32"}
    return usage(kernel, pointers, scalars, {"O": rows, "N": n, "D": dim, **fused_fm.tile(rows, n, dim)})


if __name__ == "__main__":
    groups = {"fm_norm": (fm_norm, FM_SHAPES), "weight_gradient": (weight_gradient, GRADIENT_SHAPES)}
    print(
        json.dumps(
            {
                f"{name} {' x '.join(map(str, shape))}": measure(*shape)
                for name in sys.argv[1:] or groups
                for measure, shapes in [groups[name]]
                for shape in shapes
            }
        )
    )
