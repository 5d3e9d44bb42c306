"""The part `exchange` by hand, and its meter on tensors of known lives; test_real_runs.py holds both together."""

from typing import Any

import torch

from megarec.config.sections import RunConfig
from megarec.data.schema import CategoricalFeature, Schema
from megarec.distributed.topology import Topology
from megarec.planning.exchange_memory import exchange_bytes
from megarec.planning.exchange_meter import ExchangeMeter
from megarec.run.spec import resolve
from megarec.sparse.run_placement import place_run

SCHEMA = Schema(
    name="made up",
    categorical=tuple(CategoricalFeature(name=f"f{i}", rows=400) for i in range(4)),
    numeric=("n0", "n1"),
    rows={},
)
DIM, EXAMPLES, RANKS = 16, 32, 2
WIDTH = EXAMPLES * 4 * DIM  # numbers of this rank's examples; as many as it looks up for both ranks
IDS = 4 * 2 * (2 * RANKS * EXAMPLES)  # of its two tables, with as many offsets
NEXT = IDS // 2  # which are those of the next batch as well
NUMERIC = EXAMPLES * DIM  # of X_0's gradient, for the numeric features


def predicted(device: str, **sections: Any) -> int:
    given = {"data": {"path": "", "batch_size": RANKS * EXAMPLES}, "model": {"name": "dlrm", "dim": DIM, "head": [8]}}
    config = RunConfig.model_validate({**given, **sections})
    spec, topology = resolve(config, SCHEMA), Topology(0, RANKS, RANKS, 1)
    shards = place_run(config, spec.layout, spec.towers, topology)
    return exchange_bytes(config, spec, topology, shards, EXAMPLES, 1, torch.device(device))


def test_on_a_cpu() -> None:
    """When the gradients arrive: rows, embeddings, their gradient, the message and what came."""
    assert predicted("cpu") == IDS + 4 * (WIDTH + WIDTH + (WIDTH + NUMERIC) + WIDTH + WIDTH)


def test_in_16_bits() -> None:
    """At the update: the message is gone, and what came in bf16 is there in float32 as well."""
    found = predicted("cpu", parallel={"messages": ["fp16", "bf16"]})
    assert found == IDS + 4 * (WIDTH + WIDTH + (WIDTH + NUMERIC)) + (2 + 4) * WIDTH


def test_on_an_accelerator() -> None:
    """Embeddings and gradients of a bf16 model, Triton's rows in fp16, and the next batch's ids."""
    sections: dict[str, Any] = {"parallel": {"messages": ["fp16", "bf16"]}, "deepspeed": {"bf16": {"enabled": True}}}
    found = predicted("cuda", **sections, embedding={"backend": "triton"})
    assert found == IDS + NEXT + 2 * (WIDTH + WIDTH + (WIDTH + NUMERIC) + WIDTH + WIDTH)


def test_updates_of_all_rows_are_in_it_on_an_accelerator() -> None:
    rules = {"l2": {"weight": 0.1, "rows": "all"}}
    largest = 2 * 4 * 2 * 400 * DIM  # two tables: a gradient, and as much again
    rest = IDS + NEXT + 4 * (WIDTH + WIDTH + (WIDTH + NUMERIC) + WIDTH)
    assert largest > 4 * WIDTH, "more than the message that is gone by then"
    assert predicted("cuda", embedding=rules) == rest + largest


def test_the_meter_follows_memory_not_tensors() -> None:
    meter, table = ExchangeMeter(), torch.zeros(1000)
    with meter, meter.watch():
        first = table + 1  # 4,000 bytes
        kept = [first.view(10, 100), table[:10], first.add_(1)]  # nothing new
        assert meter.peak == 4_000
        second = first * 2
        del first, kept
        third = second.half()
        assert meter.peak == 8_000, "the first is gone"
        with meter.pause():
            other = second + 1
        meter.take([other[:1], third])
    assert meter.peak == 4_000 + 2_000 + 4_000


def test_the_meter_leaves_out_what_another_part_has() -> None:
    meter = ExchangeMeter()
    with meter, meter.watch():
        handed = torch.ones(1000)
        meter.leave_out("activations", [handed.untyped_storage()._cdata])
        kept = torch.ones(500)
        meter.take(handed)
        assert meter.peak == 4_000, "not both"
        meter.leave_out("activations", [])  # of the next micro-batch
        more = torch.ones(250)
    assert meter.peak == 4 * (handed.numel() + kept.numel() + more.numel())
