"""Gradient norm and clipping under tensor parallelism x ZeRO, and the planted mistakes that they must reveal."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from deepspeed.accelerator import get_accelerator

from megarec.config.load import load_config
from megarec.dense.groups import secondary_partitions
from megarec.dense.replicated import replicated_average
from megarec.dense.tensor_parallel import is_sharded
from megarec.distributed.collectives import Channel
from megarec.distributed.process import start_process
from megarec.distributed.rank_pool import RankPool
from megarec.distributed.topology import Topology
from megarec.parity.cases import OFFLOAD
from megarec.parity.reference import ReferenceStep, reference_steps
from megarec.parity.run import BASE, write_base
from megarec.run.build import build_run
from megarec.training.profiling import StepTimer
from megarec.training.step import train_step

STEPS = 3
TENSOR = "parallel.tensor=2"
SGD = ["dense.optimizer=sgd", "dense.learning_rate=0.5"]  # unlike Adam it feels the scale of a gradient


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("parallelize"))


@pytest.fixture(scope="module")
def reference(base: Path) -> list[ReferenceStep]:
    return reference_steps(load_config(base, SGD), STEPS)


def norms(path: Path, overrides: list[str]) -> list[float]:
    """Runs on every rank: the gradient norm of each step, through the real engine."""
    config = load_config(path, overrides)
    device = start_process(config)
    run = build_run(config, device)
    run.dense.set_learning_rate(config.dense.learning_rate)
    found = []
    for batch in list(run.train.batches(epoch=0))[:STEPS]:
        result = train_step(
            run.dense,
            run.sparse,
            batch,
            timer=StepTimer(device),
            want_norm=True,
        )
        assert result.gradient_norm is not None
        found.append(result.gradient_norm)
    return found


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("stage", ["0", "1", "2", "3", "1, overlapped", "2, overlapped"])
def test_the_gradient_norm_is_that_of_one_process(
    stage: str, ranks: int, base: Path, reference: list[ReferenceStep], rank_pool: Callable[[int], RankPool]
) -> None:
    overrides = [*SGD, TENSOR, f"deepspeed.zero_optimization.stage={stage[0]}"]
    if "overlapped" in stage:
        overrides.append("deepspeed.zero_optimization.overlap_comm=true")
    expected = [step.gradient_norm for step in reference]
    assert min(expected) > 2 * BASE["deepspeed"]["gradient_clipping"], (
        "clipping must act for the later steps to prove it"
    )  # type: ignore[index]
    for found in rank_pool(ranks).run(norms, base, overrides):
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("stage", [0, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2)), 3])
def test_the_gradient_norm_in_bf16(
    stage: int, base: Path, reference: list[ReferenceStep], rank_pool: Callable[[int], RankPool]
) -> None:
    """bf16 rounds; a norm that leaves out shards would be off by tens of per cent."""
    overrides = [*SGD, TENSOR, f"deepspeed.zero_optimization.stage={stage}", "deepspeed.bf16.enabled=true"]
    found = rank_pool(2).run(norms, base, overrides)[0]
    assert found[:2] == pytest.approx([step.gradient_norm for step in reference[:2]], rel=2e-2)


def messages_of_replicated_gradients(path: Path, overrides: list[str]) -> tuple[int, int, int]:
    """Runs on every rank: (messages of STEPS steps, their bytes, elements of the replicated parameters)."""
    config = load_config(path, overrides)
    run = build_run(config, start_process(config))
    for batch in list(run.train.batches(epoch=0))[:STEPS]:
        train_step(run.dense, run.sparse, batch, timer=StepTimer(run.device))
    rows = [row for row in run.ledger.rows() if row["op"] == "all_reduce replicated gradients"]
    parameters = [p for p in run.dense.module.parameters() if not is_sharded(p)]
    elements = sum(getattr(p, "ds_numel", p.numel()) for p in parameters)
    return sum(row["calls"] for row in rows), sum(row["bytes"] for row in rows), elements


@pytest.mark.parametrize("stage", [0, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2)), 3])
def test_replicated_gradients_are_one_message_a_step(
    stage: int, base: Path, rank_pool: Callable[[int], RankPool]
) -> None:
    """However many parameters and micro-batches; from ZeRO 1 on of this rank's partition alone."""
    overrides = [TENSOR, f"deepspeed.zero_optimization.stage={stage}", "deepspeed.gradient_accumulation_steps=2"]
    found = rank_pool(4).run(messages_of_replicated_gradients, base, overrides)
    assert all(calls <= STEPS for calls, _, _ in found)
    # A ring of two sends every element once. Two data ranks share the elements (stage 3 pads each parameter).
    sent = [sum(found[rank][1] for rank in data) / (STEPS * 4 * found[0][2]) for data in ((0, 2), (1, 3))]
    assert sent == pytest.approx([2, 2] if stage == 0 else [1, 1], rel=0.02)


def test_offloaded_gradients_are_averaged_one_by_one(base: Path, rank_pool: Callable[[int], RankPool]) -> None:
    """DeepSpeed takes their norm and moves them to the host during the backward pass."""
    overrides = [TENSOR, "deepspeed.zero_optimization.stage=2", OFFLOAD]
    calls = [calls for calls, _, _ in rank_pool(2).run(messages_of_replicated_gradients, base, overrides)]
    assert calls[0] == calls[1] > STEPS


def waits_of_deepspeed(path: Path, overrides: list[str]) -> tuple[int, bool]:
    """(times that it waits for the whole device in four steps, whether it looks for overflow before a step)."""
    config = load_config(path, overrides)
    run = build_run(config, start_process(config))
    with patch.object(type(get_accelerator()), "synchronize") as synchronize:
        for batch in list(run.train.batches(epoch=0))[:4]:  # its throughput timer begins at the third
            train_step(run.dense, run.sparse, batch, timer=StepTimer(run.device))
    return synchronize.call_count, bool(getattr(run.dense.engine.optimizer, "check_grad_overflow", False))


BF16_ZERO_2 = ["deepspeed.zero_optimization.stage=2", "deepspeed.bf16.enabled=true"]


@pytest.mark.parametrize(
    ("overrides", "looks"),
    [
        (["deepspeed.zero_optimization.stage=1"], False),
        (BF16_ZERO_2, False),
        ([*BF16_ZERO_2, "deepspeed.bf16.check_grad_overflow=true"], True),
    ],
)
def test_deepspeed_waits_no_more_than_it_must(
    overrides: list[str], looks: bool, base: Path, rank_pool: Callable[[int], RankPool]
) -> None:
    assert rank_pool(1).run(waits_of_deepspeed, base, overrides) == [(0, looks)]


def test_secondary_partitions_hold_ranks_of_one_host_and_one_place() -> None:
    topology = Topology(rank=0, world_size=16, ranks_per_host=8, tensor_size=2)
    assert secondary_partitions(topology, 4) == [[0, 2, 4, 6], [8, 10, 12, 14], [1, 3, 5, 7], [9, 11, 13, 15]]
    assert secondary_partitions(topology, 2)[:3] == [[0, 2], [4, 6], [8, 10]]


def norms_without_marks(path: Path, overrides: list[str]) -> list[float]:
    """The planted mistake: the shards do not carry DeepSpeed's mark when it takes the norm."""

    def forget(engine: Any, channel: Channel) -> Callable[[], None]:
        average = replicated_average(engine, channel)
        shards = [parameter for parameter in engine.module.parameters() if is_sharded(parameter)]

        def average_and_forget() -> None:
            for marked in (True, False):
                for parameter in shards:
                    parameter.tensor_model_parallel = marked
                if marked:
                    average()

        return average_and_forget

    with patch("megarec.dense.parallelize.replicated_average", forget):
        return norms(path, overrides)


def norms_without_averaging(path: Path, overrides: list[str]) -> list[float]:
    """The planted mistake: replicated parameters keep the gradient of this rank's examples."""
    with patch("megarec.dense.parallelize.replicated_average", lambda engine, channel: lambda: None):
        return norms(path, overrides)


@pytest.mark.parametrize("mistake", [norms_without_marks, norms_without_averaging])
def test_a_planted_mistake_would_be_seen(
    mistake: Callable[..., list[float]],
    base: Path,
    reference: list[ReferenceStep],
    rank_pool: Callable[[int], RankPool],
) -> None:
    found = rank_pool(2).run(mistake, base, [*SGD, TENSOR, "deepspeed.zero_optimization.stage=1"])
    assert any(abs(norms[0] / reference[0].gradient_norm - 1) > 1e-2 for norms in found)
