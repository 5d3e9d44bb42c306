"""Triton's kernels compile for an H100 without a GPU: nothing spills, and registers are those that the docs record."""

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
def measured() -> dict[str, Any]:
    done = python("-m", "tests.sparse.triton_resources", cwd=ROOT, real=True)  # a fork has kernels to interpret
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
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


def test_registers_are_those_recorded_and_nothing_spills(measured: dict[str, Any]) -> None:
    expected = recorded()
    assert measured["kernels"].keys() == expected.keys()
    for case, kernels in measured["kernels"].items():
        assert kernels.keys() == expected[case].keys()
        for kernel, used in kernels.items():
            assert used["spilled"] == 0, (case, kernel)
            assert used["registers"] <= expected[case][kernel] + SLACK, (case, kernel)


def test_rows_are_read_and_written_16_bytes_at_a_time(measured: dict[str, Any]) -> None:
    for case, kernels in measured["widest"].items():
        rows = {bits for kernel, bits in kernels.items() if not kernel.startswith("find_")}
        assert rows == {128} or case.startswith("6,"), case


def test_on_a_cpu_triton_must_be_asked_to_interpret(measured: dict[str, Any]) -> None:
    table, remedy = "embedding.backend=\"triton\" cannot hold table 't'", 'use "auto"'
    why = "Triton's kernels need a GPU (with TRITON_INTERPRET=1 a CPU interprets them, slowly)"
    assert measured["refused"] == f"{table}: {why}; {remedy}"
