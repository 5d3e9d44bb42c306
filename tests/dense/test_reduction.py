"""Dense gradients averaged while the backward pass runs: the numbers, the messages, and what happens when one fails."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any
from unittest.mock import patch

import pytest
import torch
from deepspeed import DeepSpeedEngine
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from megarec.config.load import load_config
from megarec.dense import reduction
from megarec.dense.reduction import LEAST_BYTES, MOST_BYTES, GradientReduction, Scaling, bucket_bytes, buckets_of
from megarec.distributed.collectives import Channel, Ledger, build_channel
from megarec.distributed.levels import Levels, all_reduce_sum_, data_levels
from megarec.distributed.process import start_process
from megarec.distributed.rank_pool import RankPool
from megarec.distributed.topology import build_topology
from megarec.parity.run import write_base
from megarec.run.build import build_run
from megarec.training.profiling import StepTimer
from megarec.training.step import train_step
from tests.streams import Stream

STEPS = 3
HOSTS = "parallel.ranks_per_host=2"
SGD = ["dense.optimizer=sgd", "dense.learning_rate=0.5"]  # unlike Adam it feels the scale of a gradient
CASES = {
    "divided before and after": [*SGD, "deepspeed.gradient_predivide_factor=3.0"],
    "adamw, accumulation": ["deepspeed.gradient_accumulation_steps=2"],
    "tensor parallelism, prescaled": [*SGD, "parallel.tensor=2", "deepspeed.prescale_gradients=true"],
    "bf16, tensor parallelism, messages in fp32": [
        *SGD, "parallel.tensor=2", "deepspeed.bf16.enabled=true", "deepspeed.communication_data_type=fp32"
    ],
    "one host, messages in bf16": [*SGD, "parallel.ranks_per_host=4", "deepspeed.communication_data_type=bf16"],
    "one rank a host, bf16": [*SGD, "parallel.ranks_per_host=1", "deepspeed.bf16.enabled=true"],
}  # fmt: skip


class Trained(dict[str, Any]):
    """norms: of each step; weights: after all; messages: of the ledger; early: buckets sent before the pass ended."""


def train(path: Path, overrides: list[str], by_deepspeed: bool = False) -> Trained:
    """Runs on every rank."""
    config = load_config(path, overrides)
    with patch.multiple(reduction, LEAST_BYTES=1, BUCKETS=8):  # of a model this small
        run = build_run(config, start_process(config))
    run.dense.set_learning_rate(config.dense.learning_rate)
    engine, reducing = run.dense.engine, run.dense._reduction
    if by_deepspeed:  # and GradientReduction finds nothing to do
        engine.allreduce_gradients = MethodType(DeepSpeedEngine.allreduce_gradients, engine)
        reducing._buckets = []
        for parameter in run.dense.module.parameters():
            parameter._post_accumulate_grad_hooks.clear()  # type: ignore[union-attr]
        from megarec.dense.engine import mark_gradients_of_shards

        mark_gradients_of_shards(engine)
    unsent: list[int] = []
    finish = reducing.finish

    def watched() -> None:
        unsent.append(len(reducing._unsent))
        finish()

    norms = []
    with patch.object(reducing, "finish", watched):
        for batch in list(run.train.batches(epoch=0))[:STEPS]:
            result = train_step(run.dense, run.sparse, batch, timer=StepTimer(run.device), want_norm=True)
            norms.append(result.gradient_norm)
    return Trained(
        norms=norms,
        weights={name: p.detach().clone() for name, p in run.dense.module.named_parameters()},
        messages=[row for row in run.ledger.rows() if row["op"].endswith("dense gradients")],
        early=[len(reducing._buckets) - left for left in unsent],
        buckets=len(reducing._buckets),
        elements=sum(-(-p.numel() // 16) * 16 for p in run.dense.module.parameters()),
    )


def train_three_times(path: Path, overrides: list[str]) -> tuple[Trained, Trained, Trained]:
    """Runs on every rank: without and with overlap, and as DeepSpeed reduces."""
    off, on = ([*overrides, f"parallel.overlap={json.dumps(on)}"] for on in (False, True))
    return train(path, off), train(path, on), train(path, off, by_deepspeed=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("reduction"))


SIMILAR = {"tensor parallelism, prescaled", "one rank a host, bf16"}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow) if case in SIMILAR else case for case in CASES]
)
def test_overlap_changes_no_bit_and_deepspeed_agrees(
    case: str, base: Path, rank_pool: Callable[[int], RankPool]
) -> None:
    """Also the same to the last bit on all ranks, of whatever hosts."""
    overrides = [HOSTS, *CASES[case]]
    plain, overlapped, theirs = zip(*rank_pool(4).run(train_three_times, base, overrides), strict=True)
    replicated = 2 if "tensor" in case else 1
    for rank in range(4):
        assert plain[rank]["norms"] == overlapped[rank]["norms"]
        for name, weight in overlapped[rank]["weights"].items():
            assert torch.equal(weight, plain[rank]["weights"][name]), name
            assert torch.equal(weight, overlapped[rank % replicated]["weights"][name]), name
        assert plain[rank]["messages"] == overlapped[rank]["messages"] != []
        assert set(plain[rank]["early"]) == {0}
        assert min(overlapped[rank]["early"]) > 1 and overlapped[rank]["buckets"] > 2
    close = 2e-2 if "bf16" in case else 1e-5
    assert theirs[0]["messages"] == []
    assert overlapped[0]["norms"] == pytest.approx(theirs[0]["norms"], rel=close)
    for name, weight in overlapped[0]["weights"].items():
        torch.testing.assert_close(weight, theirs[0]["weights"][name], rtol=close, atol=close)


def test_the_ledger_counts_every_level(base: Path, rank_pool: Callable[[int], RankPool]) -> None:
    for found in rank_pool(4).run(train, base, [HOSTS, *SGD]):
        rows = {row["op"].split()[0]: row for row in found["messages"]}
        padded = rows["reduce_scatter"]["bytes"] * 2  # a rank of two sends half
        assert padded == STEPS * 4 * found["elements"]
        assert rows["all_gather"]["bytes"] == rows["reduce_scatter"]["bytes"] == padded // 2
        assert rows["all_reduce"]["bytes"] == rows["all_reduce"]["cross_host_bytes"] == padded // 2
        assert {row["calls"] for row in rows.values()} == {STEPS * found["buckets"]}
        assert {(row["group"], row["direction"], row["dtype"]) for row in rows.values()} == {
            ("data", "backward", "float32")
        }


def sums(ranks_per_host: int, tensor: int) -> tuple[Tensor, Tensor, list[int]]:
    """Runs on every rank: a sum by hierarchy, and all ranks' vectors added up in float64."""
    topology = build_topology(ranks_per_host, tensor)
    vectors = [torch.randn(12, generator=torch.Generator().manual_seed(rank)) for rank in range(topology.world_size)]
    flat = vectors[topology.rank].clone()
    levels = data_levels(topology, Ledger())
    all_reduce_sum_(flat, levels, "test")
    mine = [v for rank, v in enumerate(vectors) if rank % tensor == topology.rank % tensor]
    return flat, torch.stack(mine).double().sum(0), [levels.host.size, levels.peers.size]


@pytest.mark.parametrize(
    ("ranks_per_host", "tensor", "sizes"),
    [(2, 1, [2, 2]), (4, 2, [2, 1]), (4, 1, [4, 1]), (1, 1, [1, 4]), (2, 2, [1, 2])],
)
def test_a_sum_by_hierarchy(
    ranks_per_host: int, tensor: int, sizes: list[int], rank_pool: Callable[[int], RankPool]
) -> None:
    found = rank_pool(4).run(sums, ranks_per_host, tensor)
    for rank, (total, expected, levels) in enumerate(found):
        assert levels == sizes
        torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(total, found[rank % tensor][0])


@given(sizes=st.lists(st.integers(1, 400_000), min_size=1, max_size=40))
def test_buckets_hold_every_parameter_from_the_last_to_the_first(sizes: list[int]) -> None:
    buckets = buckets_of(sizes, width=4)
    assert [index for bucket in buckets for index in bucket] == list(reversed(range(len(sizes))))
    least = bucket_bytes(4 * sum(sizes))
    assert LEAST_BYTES <= least <= MOST_BYTES
    for bucket in buckets[:-1]:
        assert least <= 4 * sum(sizes[i] for i in bucket) and 4 * sum(sizes[i] for i in bucket[:-1]) < least
    assert len(buckets) <= max(reduction.BUCKETS, 4 * sum(sizes) // MOST_BYTES) + 1


class Branches(nn.Module):
    """Two layers; a step may use only one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.frozen = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
        self.frozen.requires_grad_(False)


def reduced(model: nn.Module) -> GradientReduction:
    """A reduction over two pretended ranks."""
    channel = Channel("data", None, 0, 2, Ledger())
    levels = Levels(build_channel_of_one(), channel)
    with patch.object(reduction, "LEAST_BYTES", 1):
        return GradientReduction(list(model.parameters()), levels, Scaling(1.0, 0.5, torch.float32), overlap=True)


def build_channel_of_one() -> Channel:
    return build_channel(build_topology(None, 1), "world", Ledger())


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reduction.dist, "get_backend", lambda group: "gloo")


def doubled(flat: Tensor, *arguments: Any) -> None:
    flat.mul_(2)  # two ranks alike


@pytest.mark.usefixtures("threads")
def test_a_layer_without_gradient_gets_zeros_and_a_frozen_one_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reduction, "all_reduce_sum_", doubled)
    model = Branches()
    reducing = reduced(model)
    for branch in (model.first, model.second, model.second):
        model.zero_grad(set_to_none=True)
        reducing.begin()
        branch(torch.ones(1, 2)).sum().backward()
        reducing.finish()
        for layer in (model.first, model.second):
            assert layer.weight.grad is not None
            assert torch.equal(layer.weight.grad, torch.full((2, 2), float(layer is branch)))
        assert model.frozen.weight.grad is None


@pytest.mark.usefixtures("threads")
def test_what_fails_in_the_thread_is_raised_where_the_step_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that is gone: gloo raises after parallel.timeout_seconds, or when the connection closes."""

    def fails(flat: Tensor, *arguments: Any) -> None:
        raise RuntimeError(f"Connection closed by peer in {threading.current_thread().name}")

    monkeypatch.setattr(reduction, "all_reduce_sum_", fails)
    model = Branches()
    reducing = reduced(model)
    reducing.begin()
    model.first(model.second(torch.ones(1, 2))).sum().backward()
    with pytest.raises(RuntimeError, match="Connection closed by peer in dense gradients"):
        reducing.finish()


def test_on_an_accelerator_messages_are_queued_in_a_stream_and_the_host_does_not_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[str] = []
    monkeypatch.setattr(torch, "Stream", lambda device: Stream(events, "gradients"))
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda: Stream(events, "main"))
    sender = reduction._Stream(torch.device("cuda"))
    sender.start(lambda: events.append(f"send in {threading.current_thread().name}"))
    sender.wait()
    assert events == [
        "main records", "gradients waits for main", "enter gradients", "send in MainThread", "leave gradients",
        "gradients records", "main waits for gradients",
    ]  # fmt: skip
