"""The messages that are predicted for a rank are those that its ledger counts, to the byte."""

from collections.abc import Callable
from typing import Any

import torch

from megarec.config.sections import RunConfig
from megarec.data.batch import Batch, Ids
from megarec.data.schema import CategoricalFeature, Schema
from megarec.distributed.rank_pool import RankPool
from megarec.distributed.topology import Topology, build_topology
from megarec.planning.traffic import sparse_messages, touched_rows
from megarec.run.build import build_model
from megarec.run.spec import resolve

LOCAL, RANKS, EXAMPLES, LENGTH = 2, 4, 6, 2
NAMES = [f"f{i}" for i in range(8)]
SCHEMA = Schema(
    name="traffic",
    label_rule="random",
    categorical=tuple(
        CategoricalFeature(
            name=name,
            rows=40,
            multi_valued=i >= 6,
            weighted=i == 6,
            newest="last" if i == 7 else None,
            mean_length=LENGTH if i >= 6 else 1,
        )
        for i, name in enumerate(NAMES)
    ),
    numeric=("n0",),
    rows={"train": 0, "valid": 0, "test": 0},
    source="synthetic",
)
TOWER = {"exchange": "tower", "towers": [NAMES[:3], NAMES[3:]]}
SEQUENCE = [{"features": ["f7"], "target": ["f0"], "block": "din"}]
DLRM, DCN = {"name": "dlrm", "compression": 4}, {"name": "dcn", "compression": 2}
CASES: dict[str, dict[str, Any]] = {
    "flat": {},
    "flat in 16 bits": {"parallel": {"messages": ["fp16", "bf16"]}},
    "flat, by columns": {"embedding": {"placement": "column", "optimizer": "adagrad"}},
    "flat, by columns, all rows": {"embedding": {"placement": "column", "update_rows": "all"}},
    "flat, copies": {"embedding": {"placement": "replicated"}},
    "flat with tower modules": {"parallel": {"towers": TOWER["towers"]}, "tower_module": DLRM},
    "tower": {"parallel": TOWER},
    "tower, four towers": {"parallel": {"exchange": "tower", "towers": 4}, "tower_module": DLRM},
    "tower in 16 bits": {"parallel": {**TOWER, "messages": ["fp16", "fp32"]}, "tower_module": DCN},
    "tower, copies": {"parallel": TOWER, "embedding": {"placement": "replicated"}, "tower_module": DLRM},
    "tower, by columns": {"parallel": TOWER, "embedding": {"placement": "column", "optimizer": "sgd"}},
    "flat, rows": {"embedding": {"placement": "row"}},
    "flat, a sequence": {"sequences": SEQUENCE},
    "flat, a sequence by rows in 16 bits": {
        "sequences": SEQUENCE, "parallel": {"messages": ["fp16", "bf16"]}, "embedding": {"placement": "row"},
    },
    "flat, a sequence that is cut": {"sequences": [{**SEQUENCE[0], "max_length": 1}]},
    "tower, a sequence": {"sequences": SEQUENCE, "parallel": TOWER},
    "tower modules, a sequence by columns": {
        "sequences": SEQUENCE, "parallel": TOWER, "tower_module": DCN,
        "embedding": {"placement": "column", "optimizer": "sgd"},
    },
    "tower, rows in 16 bits": {
        "parallel": {**TOWER, "messages": ["fp16", "bf16"]}, "embedding": {"placement": "row"}, "tower_module": DCN,
    },
}  # fmt: skip


def config_of(case: dict[str, Any]) -> RunConfig:
    base: dict[str, Any] = {
        "model": {"name": "dlrm", "dim": 16, "numeric_mlp": [8], "head": [8]},
        "data": {"path": "-", "batch_size": RANKS * EXAMPLES},
        "train": {"threads": 1},
        "deepspeed": {"zero_optimization": {"stage": 0}},
    }
    base["model"]["sequences"] = case.get("sequences", [])
    return RunConfig.model_validate({**base, **{key: value for key, value in case.items() if key != "sequences"}})


def a_batch() -> Batch:
    """Ids spread evenly over four ranges of rows, as a prediction takes them to be."""
    ids = {name: Ids(torch.arange(EXAMPLES) * 10 % 40) for name in NAMES[:6]}
    lengths = torch.full((EXAMPLES,), LENGTH)
    count = EXAMPLES * LENGTH
    ids["f6"] = Ids(torch.arange(count) * 10 % 40, lengths, torch.ones(count))
    ids["f7"] = Ids(torch.arange(count) * 10 % 40, lengths)
    return Batch(torch.zeros(EXAMPLES, 1), ids, torch.zeros(EXAMPLES), torch.arange(EXAMPLES), EXAMPLES)


def ledgers() -> dict[str, list[dict[str, Any]]]:
    """On a rank: by case, the ledger of a step of the sparse side."""
    topology, found = build_topology(LOCAL, tensor=1), {}
    for name, case in CASES.items():
        config = config_of(case)
        built = build_model(config, resolve(config, SCHEMA), topology, torch.device("cpu"))
        before = built.ledger.totals()
        lookup = built.sparse.look_up(a_batch())
        lookup.backward(torch.ones_like(lookup.values))
        lookup.apply()
        assert any(before.values()) is False
        found[name] = built.ledger.rows()
    return found


def test_messages_equal_the_ledger(rank_pool: Callable[[int], RankPool]) -> None:
    for rank, by_case in enumerate(rank_pool(RANKS).run(ledgers)):
        topology = Topology(rank, RANKS, LOCAL, 1)
        for name, rows in by_case.items():
            config = config_of(CASES[name])
            expected: dict[tuple[str, ...], list[int]] = {}
            for message in sparse_messages(config, resolve(config, SCHEMA), topology):
                entry = expected.setdefault(message[:4], [0, 0])
                entry[0] += message.bytes
                entry[1] += message.cross_host_bytes
            found = {
                (row["group"], row["op"], row["dtype"], row["direction"]): [row["bytes"], row["cross_host_bytes"]]
                for row in rows
                if row["bytes"]
            }
            if "rows" in name:  # which rank the ids of shared rows go to depends on the data
                assert {k for k in found if "ids" not in k[1]} == {k for k in expected if "ids" not in k[1]}, name
                for key in (key for key in found if "ids" not in key[1] and "weights" not in key[1]):
                    assert found[key] == expected[key], f"{name}: {key}"
                continue
            assert found == expected, f"{name}, rank {rank}"


def test_touched_rows() -> None:
    assert touched_rows(10, 1e9) == 10 and 0.99 < touched_rows(10**9, 1) <= 1
