"""A rehearsal's collectives are those of the real job, its FLOPs those that are counted, and mistakes are told."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from megarec.config.deepspeed import micro_batch_size
from megarec.config.load import load_config
from megarec.data.schema import schema_of
from megarec.distributed import pieces
from megarec.distributed.process import start_process
from megarec.distributed.rank_pool import RankPool
from megarec.distributed.topology import build_topology
from megarec.errors import UserError
from megarec.parity.run import write_base
from megarec.planning.rehearse import check_ranks, run_steps
from megarec.planning.shrink import Fit
from megarec.run.build import build_model
from megarec.run.spec import resolve
from tests.processes import python

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("rehearse"))


def rehearse(base: Path, *arguments: str, real: bool = False) -> "subprocess.CompletedProcess[str]":
    return python(ROOT / "tools/rehearse.py", "--config", base, *arguments, real=real)


def sets(overrides: list[str]) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]


def real_steps(path: Path, overrides: list[str]) -> tuple[int, list[dict[str, Any]]]:
    """Runs on every rank of the real job: its `exchange`, and the collectives of its last step.

    Every rank makes the same examples, as a rehearsal takes the other ranks to be copies of its own.
    """
    config = load_config(path, overrides)
    device = start_process(config)
    topology = build_topology(config.parallel.ranks_per_host, config.parallel.tensor)
    schema = schema_of(config.data)
    spec = resolve(config, schema)
    model = build_model(config, spec, topology, device)
    micro = micro_batch_size(config, topology.world_size)
    fitted = Fit(spec.cost, config, schema, spec, (), micro, micro, None, {}, {})
    # Posted message by message, as on gloo, an all-to-all would not be seen as one.
    with patch.object(pieces, "_piece_by_piece", lambda group: False):
        peak, _, collectives = run_steps(fitted, model, topology, device)
    return peak["exchange"], collectives


EVEN = '[["single_0", "single_1", "multi_0"], ["single_2", "single_3", "multi_1"]]'  # FLOPs are counted over all hosts
CASES = {
    "ZeRO-3, tensor parallelism, whole tables": (1, ["deepspeed.zero_optimization.stage=3", "parallel.tensor=2"]),
    "ZeRO-2 in bf16, accumulation, tables split by columns": (
        3,
        [
            "deepspeed.zero_optimization.stage=2",
            "deepspeed.bf16.enabled=true",
            "deepspeed.gradient_accumulation_steps=2",
            "embedding.placement=column",
        ],
    ),
    "tables split by rows, a copy on every rank": (
        2,
        ["embedding.placement=row", "embedding.tables.single_0.placement=replicated"],
    ),
    "tower exchange with modules": (
        1,
        [
            "parallel.exchange=tower",
            "parallel.towers=" + EVEN,
            "tower_module.name=dlrm",
            "tower_module.c=1",
            "tower_module.p=1",
            "tower_module.dim=4",
            "embedding.features={}",
        ],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_rehearsal_tells_what_the_real_job_does(case: str, base: Path, rank_pool: Callable[[int], RankPool]) -> None:
    rank, overrides = CASES[case]
    # Without overlap: the recorder of the real job does not see other threads.
    overrides = [*overrides, "parallel.ranks_per_host=2", "parallel.overlap=false"]
    run = rehearse(base, *sets(overrides), "--hosts", "2", "--ranks-per-host", "2", "--rank", str(rank), "--json")
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)

    exchange, real = rank_pool(4).run(real_steps, base, overrides)[rank]
    assert {row["group"] for row in real} & {"world", "peer"}
    assert result["collectives"] == real

    assert result["flop"]["executed"] == result["flop"]["counted"]
    peak, predicted = result["peak_bytes"], result["predicted_bytes"]
    for part in ("model_states", "parameters", "optimizer", "activations", "tables", "towers", "exchange"):
        assert peak[part] == pytest.approx(predicted[part], rel=0.05), part
    assert peak["exchange"] == pytest.approx(exchange, rel=0.05)
    if "tensor" not in case:  # whose messages are not predicted
        assert peak["communication"] == pytest.approx(predicted["communication"], rel=0.05, abs=100)
    assert set(peak) == set(predicted)
    assert peak["runtime"] == predicted["runtime"] == 0  # those of a CPU lie in the process
    if "a copy on every rank" not in case:  # of which every rank saves its share
        assert peak["snapshot"] == pytest.approx(predicted["snapshot"], rel=0.05)
    assert "loss" not in run.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--hosts", "3"], "data.batch_size=64 does not divide: 6 ranks"),
        (["--hosts", "2", "--rank", "4"], "--rank 4: 2 hosts x 2 ranks have the ranks 0 to 3"),
    ],
)
def test_mistakes_exit_2_with_one_line(base: Path, arguments: list[str], words: str) -> None:
    run = rehearse(base, "--ranks-per-host", "2", *arguments)
    assert run.returncode == 2 and run.stdout == ""
    assert words in run.stderr and len(run.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("overrides", "job", "words"),
    [
        ([], (0, 2, 0), "--hosts 0: expected at least 1"),
        ([], (2, -1, 0), "--ranks-per-host -1: expected at least 1"),
        ([], (2, 2, -1), "--rank -1"),
        ([], (10**9, 1, 0), "--ranks-per-host 1 = 1,000,000,000 ranks: expected at most 1,048,576"),
        ([], (1, 10**9, 0), "--hosts 1 x --ranks-per-host 1000000000 = 1,000,000,000 ranks"),
        (["parallel.ranks_per_host=2"], (2, 1, 0), "parallel.ranks_per_host=2; make them equal"),
        (["parallel.tensor=3"], (2, 2, 0), "parallel.tensor=3 does not divide the 2 ranks of a host"),
    ],
)
def test_ranks_that_make_no_job(base: Path, overrides: list[str], job: tuple[int, int, int], words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        check_ranks(load_config(base, overrides), *job)


def test_one_rank_alone(base: Path) -> None:
    run = rehearse(base, "--hosts", "1", "--ranks-per-host", "1", real=True)
    assert run.returncode == 0, run.stderr
    assert "rank 0 of 1 ranks" in run.stdout and "executed in one step" in run.stdout
