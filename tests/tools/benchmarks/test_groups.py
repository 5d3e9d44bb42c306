"""The benchmark of the partitioner: what it asks the tools for, and what it makes of their answers."""

import json
from pathlib import Path

import pytest

from megarec.commands import partition_towers, prepare_data
from megarec.errors import UserError
from tools.benchmarks import groups
from tools.benchmarks.groups import BATCH, Case


def test_a_case_is_two_probes_and_four_partitions(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def call(tool: str, *options: object) -> str:
        called.append([tool, *map(str, options)])
        strategy = called[-1][called[-1].index("--strategy") + 1] if "--strategy" in called[-1] else ""
        interaction = {"inside": 0.3, "across": 0.2}
        return json.dumps({"strategy": strategy, "adjusted_rand": len(called), "interaction": interaction})

    monkeypatch.setattr(groups, "_call", call)
    result = groups.run((Case(features=128, steps=10, signal=2.0),))
    assert [row["strategy"] for row in result["rows"]] == ["coherent", "cosine", "diverse", "random"]
    assert [row["adjusted_rand"] for row in result["rows"]] == [2, 3, 4, 5] and result["ratios"] == {}
    assert {(row["features"], row["groups"], row["probe_steps"]) for row in result["rows"]} == {(128, 8, 10)}
    made, *partitioned = called
    parsed = prepare_data.parser().parse_args(made[1:])
    assert (parsed.features, parsed.groups, parsed.alone, parsed.signal) == (128, 8, 16, 2.0)
    assert parsed.examples * 8 // 10 >= 10 * BATCH  # a probe sees no example twice
    for command in partitioned:
        monkeypatch.setattr("sys.argv", command)
        assert partition_towers.parse_arguments().towers == 8
    assert sum("--probe-steps" in command for command in partitioned) == 2
    assert [command[command.index("--measure") + 1] for command in partitioned if "--measure" in command] == ["cosine"]


def test_a_tool_that_fails_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"prepare_data.py failed with exit code 2: .*--groups 1: expected at least 2"):
        groups._call("prepare_data.py", "grouped", "--groups", 1, "--output", tmp_path / "out")
