"""Triton kernels compiled for an H100 or H200 (sm_90) without a GPU: registers, spills and shared memory of each.

`python -m tests.device.sm90 NAME ...` prints one JSON object. A process of its own: in the tests' Triton interprets.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megarec.config.sections import EmbeddingConfig
from megarec.kernels import fm, launch
from megarec.sparse.exchange.fused_regroup import FusedRegroup
from megarec.sparse.layout import EmbeddingLayout, Feature, Table
from megarec.sparse.lookups import plan_lookups
from megarec.sparse.placement import place
from megarec.sparse.tables.base import LocalIds, group_lookups
from megarec.sparse.tables.triton_backend import TritonTables

# Of the published rows: layer 1 and later layers of 1.25 GFLOP, and the later ones of 108.
FM_SHAPES = [(723, 24, 160), (64, 24, 160), (384, 192, 160)]
GRADIENT_SHAPES = [(120, 723, 160), (56, 64, 160)]
# Columns, optimizer, weights, type of ids, output, weighted lists.
TABLES: dict[str, tuple[int, str, str, torch.dtype, torch.dtype, bool]] = {
    "160, fp16 to bf16": (160, "rowwise_adagrad", "fp16", torch.int32, torch.bfloat16, False),
    "160, lists": (160, "adagrad", "fp32", torch.int64, torch.float32, True),
    "6, SGD": (6, "sgd", "fp32", torch.int32, torch.float16, False),
    "2080": (2080, "rowwise_adagrad", "fp16", torch.int32, torch.float16, False),
    "8192, lists": (8192, "adagrad", "fp32", torch.int64, torch.float32, True),
}
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


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
    anywhere = kernel.do_not_specialize_on_alignment or ()
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in pointers if name not in anywhere}
    compiled = triton.compile(
        ASTSource(kernel, signature, values, aligned), target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}
    )
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+).*LOCAL:(\d+)", report).groups())  # type: ignore[union-attr]
    return {
        "registers": registers,
        "spilled_bytes": stack + local,
        "shared_bytes": compiled.metadata.shared,
        "widest_access_bits": max(
            map(_bits, re.findall(r"(?:ld|st)\.global\S*?((?:\.v\d)?\.b\d+)", compiled.asm["ptx"]))
        ),
        "tensor_cores": "wgmma" in compiled.asm["ptx"] or "mma.sync" in compiled.asm["ptx"],
    }


def _bits(access: str) -> int:
    """Of ".v4.b32" and the like."""
    vector = re.search(r"\.v(\d)", access)
    return int(access.rpartition("b")[2]) * (int(vector[1]) if vector else 1)


def of_started(run: Callable[[], object]) -> dict[str, Any]:
    """What `usage` says of every kernel that `run` starts, by name; none runs."""
    found: dict[str, Any] = {}

    def record(kernel: Any, programs: int, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        given = dict(zip(kernel.arg_names, arguments, strict=False))
        pointers = {name: POINTERS[value.dtype] for name, value in given.items() if isinstance(value, Tensor)}
        scalars = {
            name: "fp32" if isinstance(value, float) else "i32" for name, value in given.items() if name not in pointers
        }
        constants = {name: value for name, value in options.items() if name != "num_warps"}
        found[kernel.__name__] = usage(kernel, pointers, scalars, constants, options["num_warps"])

    with patch.object(launch, "start", record):
        run()
    return found


def tables(
    columns: int, optimizer: str, weights: str, ids: torch.dtype, output: torch.dtype, lists: bool
) -> dict[str, Any]:
    """A lookup and an update."""
    feature = Feature("t", "t", "sum", lists, 0, columns, weighted=lists)
    layout = EmbeddingLayout(columns, (Table("t", 5, columns),), (feature,), 1, 0)
    placed = place(layout, "table", 1)
    shards = group_lookups(plan_lookups(layout, placed, 1).slots[0], placed)
    config = EmbeddingConfig(optimizer=optimizer, weights=weights)  # type: ignore[arg-type]
    held = TritonTables(shards, config, torch.device("cpu"), output)
    values, offsets = torch.zeros(512, dtype=ids), torch.arange(513, dtype=ids)
    bags = LocalIds(values, offsets, (512,), 512, torch.ones(512) if lists else None)
    return of_started(lambda: held.update(bags, held.look_up(bags)))


def regroup(to_blocks: bool) -> dict[str, Any]:
    """The shuffle of 160 columns from two senders, in 16 bits, means among them."""
    shuffle = FusedRegroup([160, 160], [(1, 0, 160, 0), (0, 0, 160, -1)], torch.device("cpu"))
    blocks, divisors = torch.zeros(320 * 64, dtype=torch.float16), torch.ones(1, 64)
    gradient = torch.zeros(64, 320, dtype=torch.bfloat16)
    if to_blocks:
        return of_started(lambda: shuffle.scatter(gradient, divisors, 64, torch.bfloat16, 4))
    return of_started(lambda: shuffle.assemble(blocks, divisors, 64, torch.bfloat16))


def fm_norm(n: int, k: int, dim: int) -> dict[str, Any]:
    kernel = fm.fm_norm_kernel
    wide = dict.fromkeys(("means", "rstds"), "*fp32")
    pointers = dict.fromkeys(("x", "y", "weight", "bias", "fm", "output"), "*bf16") | wide
    sizes = {"N": n, "K": k, "D": dim, "BIAS": True, "FLAT": fm.FLAT, **fm.tile(n, k, dim)}
    return usage(kernel, pointers, {"eps": "fp32"}, sizes)


def weight_gradient(rows: int, n: int, dim: int) -> dict[str, Any]:
    kernel = fm.weight_gradient_kernel
    pointers, scalars = {"dp": "*bf16", "x": "*bf16", "sums": "*fp32"}, {"examples": "i32", "in_group": "i32"}
    return usage(kernel, pointers, scalars, {"O": rows, "N": n, "D": dim, **fm.tile(rows, n, dim)})


if __name__ == "__main__":
    groups: dict[str, tuple[Callable[..., dict[str, Any]], dict[str, tuple[Any, ...]]]] = {
        "fm_norm": (fm_norm, {" x ".join(map(str, shape)): shape for shape in FM_SHAPES}),
        "weight_gradient": (weight_gradient, {" x ".join(map(str, shape)): shape for shape in GRADIENT_SHAPES}),
        "regroup": (regroup, {"values": (False,), "blocks": (True,)}),
        "tables": (tables, TABLES),
    }
    print(
        json.dumps(
            {
                f"{name} {case}": measure(*arguments)
                for name in sys.argv[1:] or groups
                for measure, cases in [groups[name]]
                for case, arguments in cases.items()
            }
        )
    )
