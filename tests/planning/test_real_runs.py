"""A plan against real steps on 1, 2 and 4 ranks: bytes of memory by part, and bytes sent, to the byte."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch

from megarec.config.deepspeed import micro_batch_size
from megarec.config.sections import RunConfig
from megarec.data.batch import Batch, Ids
from megarec.data.schema import CategoricalFeature, Schema
from megarec.dense.memory import Parts
from megarec.distributed.process import start_process
from megarec.distributed.rank_pool import RankPool
from megarec.distributed.topology import Topology, build_topology
from megarec.planning import rehearse
from megarec.planning.dense_traffic import run_messages
from megarec.planning.memory import CPU, predict
from megarec.planning.shrink import Fit
from megarec.run.averages import Averages
from megarec.run.build import build_model, overlaps
from megarec.run.spec import resolve
from megarec.sparse.run_placement import place_run

EXAMPLES, LENGTH, STEPS = 64, 2, rehearse.STEPS
NAMES = [f"f{i}" for i in range(6)]
SCHEMA = Schema(
    name="real",
    categorical=tuple(
        CategoricalFeature(
            name=name,
            rows=400,
            multi_valued=i == 5,
            mean_length=LENGTH if i == 5 else 1,
            newest="last" if i == 5 else None,
        )
        for i, name in enumerate(NAMES)
    ),
    numeric=("n0", "n1"),
    rows={},
)
WUKONG = {
    "name": "wukong", "dim": 16, "layers": 2, "num_fm": 4, "num_lcb": 4, "rank": 6, "mlp": [64, 64], "head": [32],
    "numeric_mlp": [16],
}  # fmt: skip
DLRM = {"name": "dlrm", "dim": 16, "numeric_mlp": [64], "head": [128, 64]}
MMOE = {"name": "mmoe", "experts": 2, "expert": [32]}
LABELS = ["label", "other"]
DIN = {"features": ["f5"], "target": ["f4"], "block": "din", "mlp": [16], "max_length": 4}
HSTU = {"features": ["f5"], "target": ["f4"], "block": "hstu", "max_length": 3, "tables": "own"}
DCN = {"name": "dcn", "dim": 16, "layers": 2, "rank": 16, "numeric_mlp": [16], "head": [128]}
TOWERS = {"exchange": "tower", "towers": [NAMES[:3], NAMES[3:]]}
MODULE = {"name": "dlrm", "compression": 2}


def _deepspeed(stage: int, **more: Any) -> dict[str, Any]:
    return {"deepspeed": {"zero_optimization": {"stage": stage, "reduce_bucket_size": 20_000}, **more}}


BF16 = {"bf16": {"enabled": True}}
CASES: dict[str, dict[str, Any]] = {
    "wukong": {"model": WUKONG},
    "wukong, ZeRO 1": {"model": WUKONG, **_deepspeed(1)},
    "wukong, ZeRO 2 in bf16": {"model": WUKONG, **_deepspeed(2, **BF16), "embedding": {"weights": "fp16"}},
    "wukong, recomputed": {"model": WUKONG, "dense": {"recompute": "full"}},
    "wukong, two micro-batches": {"model": WUKONG, **_deepspeed(0, gradient_accumulation_steps=2)},
    "wukong, SGD": {"model": WUKONG, "dense": {"optimizer": "sgd"}, "embedding": {"optimizer": "sgd"}},
    "dlrm": {"model": DLRM},
    "dlrm, ZeRO 2": {"model": DLRM, **_deepspeed(2)},
    "dlrm in 16 bits": {"model": DLRM, "parallel": {"messages": ["fp16", "bf16"]}},
    "dlrm, by columns": {"model": DLRM, "embedding": {"placement": "column", "optimizer": "adagrad"}},
    "dcn": {"model": DCN},
    "dcn, ZeRO 1 in bf16": {"model": DCN, **_deepspeed(1, **BF16)},
    "dlrm, averaged, ZeRO 1 in bf16": {"model": DLRM, **_deepspeed(1, **BF16), "train": {"threads": 1, "ema": {}}},
    "wukong, two labels": {"model": {**WUKONG, "tasks": MMOE}, "data": {"label": LABELS}},
    "dcn, copies": {"model": DCN, "embedding": {"placement": "replicated"}},
    "dcn, by rows and a copy": {
        "model": DCN,
        "embedding": {"placement": "row", "tables": {"f0": {"placement": "replicated"}, "f1": {"placement": "table"}}},
    },
    "dlrm, two backends, L2": {
        "model": DLRM,
        "embedding": {"l2": 0.1, "features": {"f0": {"width": 6}}},
        "parallel": {"messages": ["fp16", "fp32"]},
    },
    "dcn, parts in bf16": {
        "model": DCN,
        **_deepspeed(0, gradient_accumulation_steps=4, **BF16),
        "parallel": {"overlap": True, "messages": ["fp16", "bf16"]},
    },
    "dlrm, DIN": {"model": {**DLRM, "sequences": [DIN]}},
}
ON_HOSTS: dict[str, dict[str, Any]] = {  # two hosts of two ranks
    "wukong, towers": {"model": WUKONG, "parallel": TOWERS},
    "wukong, tower modules": {
        "model": WUKONG,
        "parallel": TOWERS,
        "tower_module": {"name": "wukong", "compression": 2},
    },
    "dlrm, tower modules": {"model": DLRM, "parallel": TOWERS, "tower_module": MODULE},
    "dlrm, tower modules, ZeRO 2": {"model": DLRM, "parallel": TOWERS, "tower_module": MODULE, **_deepspeed(2)},
    "dcn, towers in 16 bits": {"model": DCN, "parallel": {**TOWERS, "messages": ["fp16", "fp16"]}},
    "dcn, flat over hosts": {"model": DCN},
    "dlrm, two labels, tensor 2": {
        "model": {**DLRM, "tasks": MMOE},
        "data": {"label": LABELS},
        "parallel": {"tensor": 2},
    },
    "dlrm, tower modules, averaged": {
        "model": DLRM,
        "parallel": TOWERS,
        "tower_module": MODULE,
        "train": {"threads": 1, "ema": {"table_rows": 100}},
    },
    "wukong, tensor 2": {"model": WUKONG, "parallel": {"tensor": 2}},
    "wukong, towers, two micro-batches": {
        "model": WUKONG,
        "parallel": TOWERS,
        **_deepspeed(0, gradient_accumulation_steps=2),
    },
    "dlrm, tower modules in 16 bits, two micro-batches": {
        "model": DLRM,
        "parallel": {**TOWERS, "messages": ["fp16", "bf16"]},
        "tower_module": MODULE,
        **_deepspeed(0, gradient_accumulation_steps=2),
    },
    "dcn, HSTU in towers": {"model": {**DCN, "sequences": [HSTU]}, "parallel": TOWERS},
}
PARTS = ("parameters", "gradients", "optimizer", "step", "activations", "tables", "towers", "averages", "exchange")
"""And `communication`, of several ranks, where the main thread sends: not with dense gradients of ZeRO 0 over hosts."""


def config_of(case: dict[str, Any], ranks: int) -> RunConfig:
    base: dict[str, Any] = {
        "data": {"path": "-", "batch_size": EXAMPLES * ranks},
        "train": {"threads": 1},
        "deepspeed": {"zero_optimization": {"stage": 0}},
    }
    return RunConfig.model_validate({**base, **case, "data": {**base["data"], **case.get("data", {})}})


def schema_for(config: RunConfig) -> Schema:
    if config.data.label is None:
        return SCHEMA
    return Schema.model_validate({**SCHEMA.model_dump(), "labels": LABELS, "tasks": LABELS})


def a_batch(size: int, labels: int = 1) -> Batch:
    """Lists of mean length; ids spread evenly."""
    ids = {name: Ids(torch.arange(size) * 400 // size) for name in NAMES[:5]}
    ids["f5"] = Ids(torch.arange(size * LENGTH) * 400 // (size * LENGTH), torch.full((size,), LENGTH))
    numeric, label = torch.randn(size, 2), (torch.arange(size) % 2).float()
    targets = label if labels == 1 else torch.stack([label, 1 - label], dim=1)
    return Batch(numeric, ids, targets, torch.arange(size), size)


def real_steps(names: list[str], hosts: int) -> dict[str, tuple[Parts, list[dict[str, Any]]]]:
    """On a rank: by case, the parts at their peaks and the ledger of some steps."""
    cases, found = {**CASES, **ON_HOSTS}, {}
    for name in names:
        world = int(torch.distributed.get_world_size()) if torch.distributed.is_initialized() else 1
        config = config_of(cases[name], world)
        device = start_process(config)
        topology = build_topology(world // hosts, config.parallel.tensor)
        spec = resolve(config, schema_for(config))
        model = build_model(config, spec, topology, device)
        micro = micro_batch_size(config, topology.world_size)
        fitted = Fit(spec.cost, config, schema_for(config), spec, (), micro, micro, None, {}, {})
        with patch.object(rehearse, "make_batch", lambda schema, size, seed: a_batch(size, len(schema.predicted))):
            peak, flop, _ = rehearse.run_steps(fitted, model, topology, device)
        assert topology.hosts > 1 or "recomputed" in name or flop == spec.cost.flop * EXAMPLES, name
        peak["averages"] = Averages(config.train.ema, model.dense, model.sparse, spec.layout).memory_bytes()
        found[name] = peak, model.ledger.rows()
    return found


@pytest.mark.parametrize(
    ("ranks", "hosts"), [(1, 1), *(pytest.param(ranks, 1, marks=pytest.mark.slow) for ranks in (2, 4)), (4, 2)]
)
def test_memory_and_traffic(ranks: int, hosts: int, rank_pool: Callable[[int], RankPool]) -> None:
    names = list(ON_HOSTS if hosts == 2 else CASES)
    cases = {**CASES, **ON_HOSTS}
    wrong = []
    for rank, by_case in enumerate(rank_pool(ranks).run(real_steps, names, hosts)):
        for name, (peak, rows) in by_case.items():
            config = config_of(cases[name], ranks)
            spec, topology = (
                resolve(config, schema_for(config)),
                Topology(rank, ranks, ranks // hosts, config.parallel.tensor),
            )
            shards, ahead = place_run(config, spec.layout, spec.towers, topology), overlaps(config, topology, CPU)
            predicted = predict(config, spec, topology, micro_batch_size(config, ranks), shards)
            at_collectives = ranks > 1 and (topology.tensor_size > 1 or not ahead)
            for part in (*PARTS, *(["communication"] if at_collectives else [])):
                if abs(predicted[part] - peak[part]) > 0.05 * max(peak[part], 4096):
                    wrong.append(f"{name}, rank {rank} of {ranks}: {part} {predicted[part]:,}, held {peak[part]:,}")
            expected: dict[tuple[str, str, str, str], list[int]] = {}
            for message in run_messages(config, spec, topology, shards):
                entry = expected.setdefault(message[:4], [0, 0])
                entry[0] += message.bytes
                entry[1] += message.cross_host_bytes
            sent = {
                (row["group"], row["op"], row["dtype"], row["direction"]): [
                    row["bytes"] / steps, row["cross_host_bytes"] / steps,
                ]
                for row in rows
                if row["bytes"]
                for steps in [STEPS + (ahead and row["op"].split()[-1] in ("ids", "lengths"))]  # of the next batch
            }  # fmt: skip
            if sent != expected:
                wrong.append(f"{name}, rank {rank} of {ranks}: sent {sent}, predicted {expected}")
    assert not wrong, "\n".join(wrong)
