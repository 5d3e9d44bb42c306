"""Kernels of the sparse side compile for an H100 without a GPU: nothing spills, registers are those of the docs."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.processes import python

pytest.importorskip("triton", reason="triton is not installed")
ROOT = Path(__file__).resolve().parents[2]
SLACK = 8  # registers: what another compiler may take more


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, Any]]:
    done = python("-m", "tests.device.sm90", "tables", "regroup", cwd=ROOT, real=True)  # a fork interprets
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return found


def recorded() -> dict[str, dict[str, int]]:
    """Registers by case and kernel, from the table of the docs."""
    page = (ROOT / "docs/accelerators.md").read_text(encoding="utf-8")
    (header,) = re.findall(r"^\| registers a thread \| (.*) \|$", page, re.MULTILINE)
    cases = header.split(" | ")
    found: dict[str, dict[str, int]] = {case: {} for case in cases}
    for kernel, numbers in re.findall(r"^\| `(\w+)` \| ([\d |]+) \|$", page, re.MULTILINE):
        for case, number in zip(cases, numbers.split(" | "), strict=True):
            found[case][kernel] = int(number)
    return found


@pytest.mark.slow  # compiles every kernel
def test_registers_of_tables_are_those_recorded_and_nothing_spills(measured: dict[str, dict[str, Any]]) -> None:
    expected = recorded()
    assert {f"tables {case}" for case in expected} == {case for case in measured if case.startswith("tables")}
    for case, registers in expected.items():
        kernels = measured[f"tables {case}"]
        assert kernels.keys() == registers.keys()
        for kernel, used in kernels.items():
            assert used["spilled_bytes"] == 0, (case, kernel)
            assert used["registers"] <= registers[kernel] + SLACK, (case, kernel)
            # Rows are read and written 16 bytes at a time; six columns cannot.
            assert used["widest_access_bits"] == 128 or kernel.startswith("find_") or case.startswith("6,"), (
                case,
                kernel,
            )


def test_the_shuffle_of_the_exchange_compiles(measured: dict[str, dict[str, Any]]) -> None:
    for way in ("values", "blocks"):
        used = measured[f"regroup {way}"]["shuffle"]
        assert used["spilled_bytes"] == 0 and used["registers"] <= 128 and used["widest_access_bits"] == 128
