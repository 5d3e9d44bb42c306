"""Bytes that DeepSpeed sends for gradients and weights, as planned, against the collectives of real gloo ranks."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from megarec.config.models import WukongConfig
from megarec.config.sections import RunConfig
from megarec.dense.parallelize import parallelize
from megarec.dense.tensor_parallel import shard_mlps
from megarec.distributed.collectives import Channel, Ledger
from megarec.distributed.process import start_process
from megarec.distributed.rank_pool import RankPool
from megarec.distributed.topology import Topology, build_topology
from megarec.models.cpu_gemm import fast_cpu_gemm
from megarec.models.wukong import Wukong
from megarec.planning.dense_traffic import gradient_messages
from megarec.planning.recorder import CollectiveRecorder, tensors_of
from megarec.planning.zero import zero_of
from megarec.planning.zero_traffic import dense_sent

EMBEDDINGS, DIM, MICRO, STEPS = 8, 8, 2, 3
WUKONG = WukongConfig(dim=DIM, layers=2, num_fm=4, num_lcb=4, rank=4, mlp=[48, 48], head=[32])  # 10,017 parameters
SMALL = {"reduce_bucket_size": 3_000, "stage3_param_persistence_threshold": 100}
LIVE = {"stage3_max_live_parameters": 5_000, "stage3_max_reuse_distance": 1_000}
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # of ZeRO, and others
    "stage 0": ({"stage": 0}, {}),
    "stage 0, bf16": ({"stage": 0}, {"bf16": True, "accumulation": 2}),
    "stage 1": ({"stage": 1}, {}),
    "stage 1, accumulation": ({"stage": 1}, {"accumulation": 2}),
    "stage 2": ({"stage": 2}, {}),
    "stage 2, accumulation": ({"stage": 2}, {"accumulation": 3}),
    "stage 2, overlap": ({"stage": 2, "overlap_comm": True}, {}),
    "stage 2, bf16, sums in fp32": ({"stage": 2}, {"bf16": True, "communication_data_type": "fp32"}),
    "stage 3": ({"stage": 3}, {}),
    "stage 3, bf16": ({"stage": 3}, {"bf16": True}),
    "stage 3, accumulation": ({"stage": 3}, {"accumulation": 2}),
    "stage 3, none persistent": ({"stage": 3, "stage3_param_persistence_threshold": 0}, {"accumulation": 2}),
    "stage 3, few live": ({"stage": 3, **LIVE}, {}),
    "stage 3, fewer live": ({"stage": 3, **LIVE, "stage3_max_live_parameters": 2_500}, {"accumulation": 2}),
    "stage 3, copies in hosts": ({"stage": 3, "zero_hpz_partition_size": 2}, {}),
    "stage 3, copies in hosts, few live": ({"stage": 3, **LIVE, "zero_hpz_partition_size": 2}, {"accumulation": 2}),
    "stage 3, no reduce-scatter": ({"stage": 3, "reduce_scatter": False}, {}),
}


def config_of(name: str, ranks: int, tensor: int = 1) -> RunConfig:
    zero, more = SETTINGS[name]
    accumulation = more.get("accumulation", 1)
    section = {key: value for key, value in more.items() if key == "communication_data_type"}
    return RunConfig.model_validate(
        {
            "model": {"name": "wukong"},
            "data": {"path": "", "batch_size": MICRO * ranks * accumulation},
            "train": {"threads": 1},
            "parallel": {"tensor": tensor, "ranks_per_host": ranks},
            "deepspeed": {
                "zero_optimization": {**SMALL, **zero},
                "gradient_accumulation_steps": accumulation,
                "bf16": {"enabled": more.get("bf16", False)},
                **section,
            },
        }
    )


def a_model() -> Wukong:
    with torch.device("meta"):
        return Wukong(EMBEDDINGS, WUKONG)


class WithoutFlags(CollectiveRecorder):
    """Sums of norms and overflow flags, of at most 8 bytes, are not counted."""

    def _record(self, op: str, args: Sequence[Any]) -> None:
        if op != "all_reduce" or any(tensor.nbytes > 8 for argument in args[:2] for tensor in tensors_of(argument)):
            super()._record(op, args)


def collectives(names: list[str], tensor: int) -> dict[str, list[dict[str, Any]]]:
    """Runs on every rank: those of the dense model in the last of some steps, by settings."""
    found = {}
    for name in names:
        config = config_of(name, torch.distributed.get_world_size(), tensor)
        device = start_process(config)
        topology = build_topology(config.parallel.ranks_per_host, tensor)
        dense = parallelize(a_model(), config, topology, device, Ledger())
        engine, recorder = dense.engine, WithoutFlags(topology)
        dtype = torch.bfloat16 if engine.bfloat16_enabled() else torch.float32
        x = torch.randn(MICRO, EMBEDDINGS, DIM, dtype=dtype)
        with recorder, fast_cpu_gemm(device, dtype):
            for _ in range(STEPS):
                for micro in range(engine.gradient_accumulation_steps()):
                    out = engine(x).float().square().mean()
                    if micro + 1 == engine.gradient_accumulation_steps():
                        dense._reduction.begin()
                    engine.backward(out)
                    if micro + 1 == engine.gradient_accumulation_steps():
                        dense._reduction.finish()
                    engine.step()
                found[name] = recorder.take()
        engine.destroy()
    return found


def sent(rows: list[dict[str, Any]], ranks: int) -> dict[str, int]:
    """Bytes that a rank sends, as a ring; `host`: among the two ranks of ZeRO++."""
    passes, found = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}, {"ring": 0, "host": 0}
    for row in rows:
        inside = row["group"] == "2 ranks" and ranks > 2
        size = 2 if inside else ranks
        if row["group"] != "tensor":
            found["host" if inside else "ring"] += passes[row["op"]] * row["bytes"] * (size - 1) // size
    return found


def planned(config: RunConfig, ranks: int, rank: int) -> dict[str, int]:
    topology = Topology(rank, ranks, ranks, config.parallel.tensor)
    model, size = a_model(), topology.tensor_size
    shard_mlps(model, Channel("tensor", None, rank % size, size, Ledger()))
    sizes, zero = [parameter.numel() for parameter in model.parameters()], zero_of(config, topology)
    if not zero.stage:
        return {"ring": sum(message.bytes for message in gradient_messages(sizes, zero, "float32")), "host": 0}
    found = dense_sent(sizes, zero)
    return {"ring": found.over_the_ring, "host": found.inside_hosts}


def check(names: list[str], ranks: int, tensor: int, pool: RankPool) -> None:
    for rank, by_name in enumerate(pool.run(collectives, names, tensor)):
        for name, rows in by_name.items():
            expected = planned(config_of(name, ranks, tensor), ranks, rank)
            assert sent(rows, ranks // tensor) == pytest.approx(expected, rel=0, abs=3), (name, rank)  # halves of bytes


def test_bytes_are_those_that_deepspeed_sends(rank_pool: Callable[[int], RankPool]) -> None:
    check([name for name in SETTINGS if "hosts" not in name], 2, 1, rank_pool(2))


def test_over_more_ranks_and_under_tensor_parallelism(rank_pool: Callable[[int], RankPool]) -> None:
    names = ["stage 2, accumulation", "stage 3, few live"]
    check([*names, "stage 3, copies in hosts", "stage 3, copies in hosts, few live"], 4, 1, rank_pool(4))
    check(names, 4, 2, rank_pool(4))
