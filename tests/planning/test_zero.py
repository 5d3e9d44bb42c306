"""Predicted bytes of the dense side against those of the real engine on gloo ranks, part by part."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megarec.config.models import WukongConfig
from megarec.config.sections import RunConfig
from megarec.dense.memory import Parts, dense_bytes
from megarec.dense.parallelize import parallelize
from megarec.dense.tensor_parallel import shard_mlps
from megarec.distributed.collectives import Channel, Ledger
from megarec.distributed.process import start_process
from megarec.distributed.rank_pool import RankPool
from megarec.distributed.topology import Topology, build_topology
from megarec.errors import UserError
from megarec.models.cpu_gemm import fast_cpu_gemm
from megarec.models.wukong import Wukong
from megarec.planning.probes import arrivals
from megarec.planning.recorder import CollectiveRecorder
from megarec.planning.zero import dense_parts, zero_of

EMBEDDINGS, DIM, MICRO = 40, 32, 4
WUKONG = WukongConfig(dim=DIM, layers=3, num_fm=16, num_lcb=16, rank=16, mlp=[512, 512], head=[256])  # 2.7 M parameters
BUCKET = (
    500_000  # elements: smaller than the model and than its largest parameter, so that several kinds of copies are made
)


def run_config(
    ranks: int, *, tensor: int = 1, accumulation: int = 1, ranks_per_host: int | None = None, **section: Any
) -> RunConfig:
    zero = {"reduce_bucket_size": BUCKET, **section.pop("zero")}
    return RunConfig.model_validate(
        {
            "model": {"name": "wukong"},
            "data": {"path": "", "batch_size": MICRO * ranks * accumulation},
            "dense": {"optimizer": section.pop("optimizer", "adamw")},
            "parallel": {"tensor": tensor, "ranks_per_host": ranks_per_host or ranks},
            "deepspeed": {
                "zero_optimization": zero,
                "gradient_accumulation_steps": accumulation,
                "bf16": {"enabled": section.pop("bf16", False)},
                **section,
            },
        }
    )


def measured(config: RunConfig) -> Parts:
    """Runs on every rank: parts when a backward pass has ended; the peaks of `step` and `communication`."""
    device = start_process(config)
    topology = build_topology(config.parallel.ranks_per_host, config.parallel.tensor)
    with torch.device("meta"):
        model = Wukong(EMBEDDINGS, WUKONG)
    dense = parallelize(model, config, topology, device, Ledger())
    engine = dense.engine
    peak = {"step": 0, "communication": 0}

    def observe(messages: Any = ()) -> None:
        now = dense_bytes(engine, [*messages, *dense._reduction.messages()])
        peak.update({part: max(peak[part], now[part]) for part in peak})

    stepped = getattr(engine.optimizer, "optimizer", engine.optimizer)
    stepped.register_step_pre_hook(lambda *_: observe())
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda _: observe())
    dtype = torch.bfloat16 if engine.bfloat16_enabled() else torch.float32
    x = torch.randn(MICRO, EMBEDDINGS, DIM, dtype=dtype)
    with CollectiveRecorder(topology, observe), fast_cpu_gemm(device, dtype):
        for _ in range(2 * engine.gradient_accumulation_steps()):
            out = engine(x).float().square().mean()
            dense._reduction.begin()
            engine.backward(out)
            dense._reduction.finish()
            parts = dense_bytes(engine)
            engine.step()
    engine.destroy()
    return {**parts, **peak}


def predicted(config: RunConfig, ranks: int, rank: int) -> Parts:
    topology = Topology(rank, ranks, config.parallel.ranks_per_host or ranks, config.parallel.tensor)
    with torch.device("meta"):
        model = Wukong(EMBEDDINGS, WUKONG)
        with arrivals(model) as order:
            model(torch.empty(MICRO, EMBEDDINGS, DIM)).sum().backward()
    size = topology.tensor_size
    shard_mlps(model, Channel("tensor", None, rank % size, size, Ledger()))
    return dense_parts([parameter.numel() for parameter in model.parameters()], zero_of(config, topology), order)


def compare(config: RunConfig, ranks: int, pool: RankPool) -> None:
    for rank, found in enumerate(pool.run(measured, config)):
        expected = predicted(config, ranks, rank)
        for part in ("parameters", "gradients", "optimizer", "step"):
            assert found[part] == pytest.approx(expected[part], rel=1e-3, abs=1), (rank, part)
        states = sum(expected[part] for part in ("parameters", "gradients", "optimizer"))
        assert sum(found[part] for part in ("parameters", "gradients", "optimizer")) == pytest.approx(states, rel=1e-3)
        assert found["communication"] == pytest.approx(expected["communication"], rel=1e-3, abs=32)


@pytest.mark.parametrize(
    ("ranks", "bf16"),
    [pytest.param(2, False, marks=pytest.mark.slow), pytest.param(2, True, marks=pytest.mark.slow), (4, True)],
)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage(stage: int, bf16: bool, ranks: int, rank_pool: Callable[[int], RankPool]) -> None:
    compare(run_config(ranks, zero={"stage": stage}, bf16=bf16), ranks, rank_pool(ranks))


@pytest.mark.parametrize("stage", [1, 3])
def test_shards_of_tensor_parallelism(stage: int, rank_pool: Callable[[int], RankPool]) -> None:
    compare(run_config(4, tensor=2, zero={"stage": stage}, bf16=True), 4, rank_pool(4))


@pytest.mark.parametrize(
    "settings",
    [
        {"zero": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
        {"zero": {"stage": 3, "offload_optimizer": {"device": "cpu"}}},
        {"zero": {"stage": 2, "overlap_comm": True}},
        {"zero": {"stage": 3, "stage3_max_live_parameters": 700_000, "stage3_max_reuse_distance": 100_000}},
        {"zero": {"stage": 3, "stage3_param_persistence_threshold": 0}},
        {"zero": {"stage": 3, "zero_hpz_partition_size": 2}, "tensor": 1},
        {"zero": {"stage": 2}, "optimizer": "sgd"},
        {"zero": {"stage": 1}, "accumulation": 3},
        {"zero": {"stage": 0}, "ranks_per_host": 2},
        {"zero": {"stage": 0}, "ranks_per_host": 2, "bf16": False, "communication_data_type": "bf16"},
    ],
    ids=[
        "offload-2",
        "offload-3",
        "overlap",
        "few-live",
        "none-persistent",
        "hpz",
        "sgd",
        "accumulation",
        "hosts",
        "types",
    ],
)
def test_settings_that_move_memory(settings: dict[str, Any], rank_pool: Callable[[int], RankPool]) -> None:
    compare(run_config(4, **{"bf16": True, **settings}), 4, rank_pool(4))


def test_deepspeeds_own_optimizer_and_one_that_is_unknown() -> None:
    topology = Topology(0, 4, 4, 1)
    momentum = run_config(4, zero={"stage": 2}, optimizer="adamw").model_copy(
        update={
            "deepspeed": {"zero_optimization": {"stage": 2}, "optimizer": {"type": "SGD", "params": {"momentum": 0.9}}}
        }
    )
    assert zero_of(momentum, topology).moments == 1
    unknown = momentum.model_copy(update={"deepspeed": {"optimizer": {"type": "OneBitAdam"}}})
    with pytest.raises(UserError, match=r"deepspeed\.optimizer\.type='OneBitAdam'.*expected one of sgd, adam"):
        zero_of(unknown, topology)


def test_an_unknown_zero_key_is_deepspeeds_refusal() -> None:
    config = run_config(4, zero={"stage": 2, "reduce_bucket": 5})
    with pytest.raises(UserError, match=r"refused the deepspeed section.*reduce_bucket"):
        zero_of(config, Topology(0, 4, 4, 1))
