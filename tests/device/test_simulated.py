"""The sparse side, a dense model and the step check on a simulated accelerator: devices, collectives, waits, launches.

An operation over two devices, or a collective of what NCCL does not take, fails the process that measures.
"""

import ast
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megarec.planning.roofline import GLUE_BYTES_A_COLUMN, GLUE_BYTES_IN_FP32
from tests.processes import python

ROOT = Path(__file__).resolve().parents[2]
CHECK = "tolist at training/faults/step_check.py"  # the one wait by design: all ranks decide alike
LISTS = "tolist at sparse/exchange/ids.py"  # how many values will come
UNIQUE = "unique_consecutive at sparse/tables/stacked.py"  # torch backend: how many rows were touched
# How often the host may wait in a step. These numbers may only fall.
WAITS: dict[str, dict[str, int]] = {
    "fused": {CHECK: 1},
    "fused, lists": {CHECK: 1, LISTS: 1},
    "fused, messages in 16 bits": {CHECK: 1},
    "triton": {CHECK: 1},
    "triton, lists": {CHECK: 1, LISTS: 1},
    "torch": {CHECK: 1, UNIQUE: 1},
    "torch, lists": {CHECK: 1, LISTS: 1, UNIQUE: 1},
    "torch, fp16 weights": {CHECK: 1, LISTS: 1, UNIQUE: 1},
    "column": {CHECK: 1, LISTS: 1, UNIQUE: 1, "tolist at sparse/tables/stacked.py": 1},
    "row": {CHECK: 1, LISTS: 2},
    "replicated": {CHECK: 1, LISTS: 1, UNIQUE: 3, "nonzero at sparse/tables/torch_backend.py": 3},
    "tower, lists": {CHECK: 1, LISTS: 2},
    "fused, lists, two micro-batches": {CHECK: 1, LISTS: 1},
    "tower, lists, two micro-batches": {CHECK: 1, LISTS: 2},
}
KERNELS = {
    "triton": 444,
    "triton, lists": 459,
    "fused": 464,
    "fused, lists": 487,
    "torch, lists": 512,
    "row": 614,
    "tower, lists": 475,
}
COLLECTIVES = {
    "fused": 4,
    "fused, lists": 5,
    "row": 5,
    "replicated": 2,
    "tower, lists": 9,
    "fused, lists, two micro-batches": 7,
    "tower, lists, two micro-batches": 11,
}


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore", "TRITON_INTERPRET": "1"}
    done = python("-m", "tests.device.measure", cwd=ROOT, env=environment, real=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def skip_without_triton(case: str) -> None:
    if case.startswith("triton"):
        pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.parametrize("case", WAITS)
def test_host_waits_of_a_step(measured: dict[str, Any], case: str) -> None:
    skip_without_triton(case)
    waits: Counter[str] = Counter()
    for place, count in measured[case]["waits"].items():
        waits[place.rpartition(":")[0]] += count
    assert waits == WAITS[case]


@pytest.mark.parametrize("case", KERNELS)
def test_kernels_of_a_step_stay_near_those_recorded(measured: dict[str, Any], case: str) -> None:
    skip_without_triton(case)
    assert measured[case]["launches"]["kernels"] == pytest.approx(KERNELS[case], rel=0.1)


@pytest.mark.parametrize("case", COLLECTIVES)
def test_collectives_of_a_step(measured: dict[str, Any], case: str) -> None:
    launches = measured[case]["launches"]
    assert sum(count for name, count in launches.items() if name.startswith("c10d")) == COLLECTIVES[case]


# Bytes a column of an example between lookup and first product, and back. They may only fall.
GLUE = {  # bytes a column; two of them are what a step's time is predicted by
    "tables in the type of the messages": GLUE_BYTES_A_COLUMN,
    "tables in float32": 40,
    "all in float32": GLUE_BYTES_IN_FP32,
}


@pytest.mark.parametrize("case", GLUE)
def test_bytes_around_the_exchange(measured: dict[str, Any], case: str) -> None:
    pytest.importorskip("triton", reason="without Triton the shuffle is several passes")
    assert GLUE[case] - 2 < measured["glue"][case] <= GLUE[case]


@pytest.mark.parametrize("case", ["fused", "fused, lists"])
def test_a_batch_is_one_copy_without_waiting(measured: dict[str, Any], case: str) -> None:
    assert measured[case]["launches"]["H2D"] == 1


def test_a_part_of_gpu_check_runs_there(measured: dict[str, Any]) -> None:
    assert len(measured["part of gpu_check"]) == 2 * 2 * 2, "time and rate of lookup and update, two spreads of ids"


HOT = ["sparse/exchange", "sparse/tables", "sparse/side.py", "training/step.py", "models", "dense/layers.py"]
ALLOWED = {  # where the host may wait, or where no accelerator is involved
    ("sparse/exchange/ids.py", "tolist"): "lengths of lists: sizes of the next message",
    ("sparse/exchange/ids.py", "torch.tensor"): "once, when the exchange is built",
    ("sparse/exchange/fused_regroup.py", "torch.tensor"): "once, when the exchange is built",
    ("sparse/tables/stacked.py", "torch.tensor"): "once, when the tables are built",
    ("sparse/tables/stacked.py", "tolist"): "row-wise Adagrad over column slices",
    (
        "sparse/tables/stacked.py",
        "int",
    ): "between chunks; an accelerator has one; steps are on the CPU",
    ("sparse/tables/stochastic.py", "torch.tensor"): "once, when the tables are built",
    ("sparse/side.py", "torch.tensor"): "once, when the sparse side is built",
    ("sparse/tables/triton_backend.py", "torch.tensor"): "once, when the tables are built",
    ("sparse/tables/local.py", "torch.tensor"): "once, when the tables are built",
    ("sparse/tables/local.py", "tolist"): "table usage, when it is logged",
}


def test_no_new_waits_in_hot_folders() -> None:
    found = {}
    for place in HOT:
        path = ROOT / "megarec" / place
        for file in [path] if path.suffix else sorted(path.rglob("*.py")):
            name = str(file.relative_to(ROOT / "megarec"))
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if (what := _waits(node)) and (name, what) not in ALLOWED:
                    found[f"{name}:{node.lineno}"] = what  # type: ignore[attr-defined]
    assert not found


def _waits(node: ast.AST) -> str | None:
    """What of this expression makes the host wait for an accelerator, if the tensor is there."""
    if not isinstance(node, ast.Call):
        return None
    match node.func:
        case ast.Attribute(attr="item" | "tolist" | "cpu" | "numpy" as name):
            return name
        case ast.Attribute(value=ast.Name(id="torch"), attr="tensor") if any(k.arg == "device" for k in node.keywords):
            return "torch.tensor"
        case ast.Name(id="float" | "int" as name) if node.args and isinstance(node.args[0], ast.Call | ast.Subscript):
            return name
    return None
