"""Registers and spills of every kernel that a lookup and an update start, compiled for sm_90 without a GPU, as JSON.

A process of its own: the other tests have Triton interpret its kernels.

    python -m tests.sparse.triton_resources
"""

import json
import os
import re
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megarec.config.sections import EmbeddingConfig
from megarec.errors import UserError
from megarec.sparse.layout import EmbeddingLayout, Feature, Table
from megarec.sparse.lookups import plan_lookups
from megarec.sparse.placement import place
from megarec.sparse.tables import triton_backend
from megarec.sparse.tables.base import LocalIds, group_lookups
from megarec.sparse.tables.local import choose_backends

CPU = torch.device("cpu")
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
# columns, optimizer, weights, type of ids, output, weighted lists
CASES: dict[str, tuple[int, str, str, torch.dtype, torch.dtype, bool]] = {
    "160, fp16 to bf16": (160, "rowwise_adagrad", "fp16", torch.int32, torch.bfloat16, False),
    "160, lists": (160, "adagrad", "fp32", torch.int64, torch.float32, True),
    "6, SGD": (6, "sgd", "fp32", torch.int32, torch.float16, False),
    "2080": (2080, "rowwise_adagrad", "fp16", torch.int32, torch.float16, False),
    "8192, lists": (8192, "adagrad", "fp32", torch.int64, torch.float32, True),
}


def launches(columns: int, optimizer: str, weights: str, ids: torch.dtype, output: torch.dtype, lists: bool) -> Any:
    """What a lookup and an update start: (kernel, arguments, warps, constants). Nothing runs."""
    layout = EmbeddingLayout(
        columns, (Table("t", 5, columns),), (Feature("t", "t", "sum", lists, 0, columns, weighted=lists),), 1, 0
    )
    shards = group_lookups(plan_lookups(layout, place(layout, "table", 1), 1).slots[0])
    config = EmbeddingConfig(optimizer=optimizer, weights=weights)  # type: ignore[arg-type]
    tables = triton_backend.TritonTables(shards, config, CPU, output)
    bags = LocalIds(
        torch.zeros(512, dtype=ids), torch.arange(513, dtype=ids), (512,), 512, torch.ones(512) if lists else None
    )
    seen: list[Any] = []

    def record(kernel: Any, programs: int, *args: Any, warps: int = 4, **constants: Any) -> None:
        seen.append((kernel, args, warps, constants))

    plain, triton_backend.launch = triton_backend.launch, record
    try:
        tables.update(bags, tables.look_up(bags))
    finally:
        triton_backend.launch = plain
    return seen


def compiled(kernel: Any, args: tuple[Any, ...], warps: int, constants: dict[str, Any]) -> Any:
    """As a launch on a GPU would compile it: pointers of torch's allocator are multiples of 16 bytes."""
    signature = dict.fromkeys(kernel.arg_names, "constexpr")
    aligned = {}
    for place_, (name, arg) in enumerate(zip(kernel.arg_names, args, strict=False)):
        if isinstance(arg, Tensor):
            signature[name] = POINTERS[arg.dtype]
            if name not in (kernel.do_not_specialize_on_alignment or ()):
                aligned[(place_,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(arg, float) else "i32"
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})


def resources(cubin: bytes, directory: Path) -> dict[str, int]:
    """As ptxas counts them. What does not fit into registers lies on the stack or in local memory."""
    path = directory / "kernel.cubin"
    path.write_bytes(cubin)
    told = subprocess.run([CUOBJDUMP, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    used = {name: int(count) for name, count in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", told)}
    return {"registers": used["REG"], "spilled": used["STACK"] + used["LOCAL"], "shared": used["SHARED"]}


def refused() -> str:
    """What a run on a CPU is told that asks for Triton."""
    layout = EmbeddingLayout(8, (Table("t", 5, 8),), (Feature("t", "t", "sum", False, 0, 8),), 1, 0)
    try:
        choose_backends(layout, place(layout, "table", 1), EmbeddingConfig(backend="triton"), CPU)
    except UserError as error:
        return str(error)
    return "nothing"


def main() -> None:
    measured: dict[str, Any] = {"refused": refused(), "widest": {}, "kernels": {}}
    with TemporaryDirectory() as directory:
        os.environ["TRITON_CACHE_DIR"] = directory
        for case, arguments in CASES.items():
            found = measured["kernels"][case] = {}
            for kernel, args, warps, constants in launches(*arguments):
                built = compiled(kernel, args, warps, constants)
                found[kernel.__name__] = resources(built.asm["cubin"], Path(directory))
                wide = re.findall(r"(?:ld|st)\.global\S*?((?:\.v\d)?\.b\d+)", built.asm["ptx"])
                measured["widest"].setdefault(case, {})[kernel.__name__] = max(map(_bits, wide))
    print(json.dumps(measured))


def _bits(access: str) -> int:
    vector = re.search(r"\.v(\d)", access)
    return int(access.rpartition("b")[2]) * (int(vector[1]) if vector else 1)


if __name__ == "__main__":
    main()
