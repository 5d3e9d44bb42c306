"""Gradient norm and clipping under tensor parallelism x ZeRO, and the planted mistakes that they must reveal."""

from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest

from megarec.config.load import load_config
from megarec.dense import tensor_parallel
from megarec.dense.groups import secondary_partitions
from megarec.distributed.process import start_process
from megarec.distributed.rank_pool import RankPool
from megarec.distributed.topology import Topology
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


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_gradient_norm_is_that_of_one_process(
    stage: int, ranks: int, base: Path, reference: list[ReferenceStep], rank_pool: Callable[[int], RankPool]
) -> None:
    overrides = [*SGD, TENSOR, f"deepspeed.zero_optimization.stage={stage}"]
    expected = [step.gradient_norm for step in reference]
    assert min(expected) > 2 * BASE["deepspeed"]["gradient_clipping"], (
        "clipping must act for the later steps to prove it"
    )  # type: ignore[index]
    for found in rank_pool(ranks).run(norms, base, overrides):
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_gradient_norm_in_bf16(
    stage: int, base: Path, reference: list[ReferenceStep], rank_pool: Callable[[int], RankPool]
) -> None:
    """bf16 rounds; a norm that leaves out shards would be off by tens of per cent."""
    overrides = [*SGD, TENSOR, f"deepspeed.zero_optimization.stage={stage}", "deepspeed.bf16.enabled=true"]
    found = rank_pool(2).run(norms, base, overrides)[0]
    assert found[:2] == pytest.approx([step.gradient_norm for step in reference[:2]], rel=2e-2)


def test_secondary_partitions_hold_ranks_of_one_host_and_one_place() -> None:
    topology = Topology(rank=0, world_size=16, ranks_per_host=8, tensor_size=2)
    assert secondary_partitions(topology, 4) == [[0, 2, 4, 6], [8, 10, 12, 14], [1, 3, 5, 7], [9, 11, 13, 15]]
    assert secondary_partitions(topology, 2)[:3] == [[0, 2], [4, 6], [8, 10]]


def norms_without_marks(path: Path, overrides: list[str]) -> list[float]:
    """The planted mistake: the shards do not carry DeepSpeed's mark when the engine is built."""

    def forget(model: object, channel: object) -> None:
        average(model, channel)  # type: ignore[arg-type]
        for parameter in model.parameters():  # type: ignore[attr-defined]
            if tensor_parallel.is_sharded(parameter):
                parameter.tensor_model_parallel = False

    average = tensor_parallel.average_replicated_gradients
    with patch("megarec.dense.parallelize.average_replicated_gradients", forget):
        return norms(path, overrides)


def norms_without_averaging(path: Path, overrides: list[str]) -> list[float]:
    """The planted mistake: replicated parameters keep the gradient of this rank's examples."""
    with patch("megarec.dense.parallelize.average_replicated_gradients"):
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
