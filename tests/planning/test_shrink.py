"""Tables are cut only where a rank would not fit, and the message says what does not."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megarec.config.load import load_config
from megarec.config.sections import RunConfig
from megarec.data.schema import schema_of
from megarec.distributed.topology import Topology
from megarec.errors import UserError
from megarec.planning.held_memory import (
    CONNECTION,
    CONTEXT,
    WORKSPACE,
    available_bytes,
    forget_peak,
    peak_parts,
    peak_resident_bytes,
    resident_bytes,
)
from megarec.planning.memory import CPU, with_totals
from megarec.planning.shrink import CUT_TABLES, cut_shards, fit, longest
from megarec.sparse.placement import Shard
from megarec.sparse.tables.optimizers import table_bytes

CONFIG = load_config(Path(__file__).parents[2] / "ds_configs/ladder/wukong-5.6gflop.json")
SCHEMA = schema_of(CONFIG.data)
JOB = Topology(rank=0, world_size=128, ranks_per_host=8, tensor_size=CONFIG.parallel.tensor)
PLENTY = 2**50


def test_a_rank_that_fits_keeps_its_tables() -> None:
    found = fit(CONFIG, SCHEMA, JOB, PLENTY)
    assert found.table_rows is None and found.schema == SCHEMA
    assert found.predicted["tables"] == found.predicted_real["tables"] > CUT_TABLES
    assert found.real_micro_batch == CONFIG.data.batch_size // 128
    assert found.config.data.batch_size == found.micro_batch * 128
    assert 1 < found.micro_batch < found.real_micro_batch
    assert found.predicted["activations"] < found.predicted_real["activations"]


def test_tables_that_do_not_fit_are_cut_and_stay_where_they_are() -> None:
    whole = fit(CONFIG, SCHEMA, JOB, PLENTY)
    found = fit(CONFIG, SCHEMA, JOB, with_totals(whole.predicted)["total"] - 1)
    rows = found.table_rows
    assert rows is not None
    assert found.predicted["tables"] <= CUT_TABLES < whole.predicted["tables"]
    assert found.predicted_real == whole.predicted_real
    assert [(s.table, s.rank, s.column_start, s.column_stop) for s in found.shards] == [
        (s.table, s.rank, s.column_start, s.column_stop) for s in whole.shards
    ]
    assert all(f.rows == min(rows, g.rows) for f, g in zip(found.schema.categorical, SCHEMA.categorical, strict=True))


def test_a_rank_that_does_not_fit_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"rank 0 of 128 needs .* GiB are available here \(parameters .*smaller deepspeed buckets"
    ):
        fit(CONFIG, SCHEMA, JOB, 2**30)


def test_batch_sizes_and_writers_of_the_deepspeed_section_do_not_stay() -> None:
    section = {**CONFIG.deepspeed, "train_batch_size": CONFIG.data.batch_size, "tensorboard": {"enabled": True}}
    found = fit(CONFIG.model_copy(update={"deepspeed": section}), SCHEMA, JOB, PLENTY)
    assert not {"train_batch_size", "tensorboard"} & set(found.config.deepspeed)


@given(rows=st.lists(st.integers(1, 10**6), min_size=1, max_size=5), budget=st.integers(1, 10**9))
def test_longest_is_the_most_that_the_budget_allows(rows: list[int], budget: int) -> None:
    config = RunConfig.model_validate({"model": {"name": "wukong"}, "data": {"path": ""}})
    shards = tuple(Shard(f"t{i}", 0, 0, n, 0, 8) for i, n in enumerate(rows))
    found = longest(shards, 0, config, budget)

    def size(at: int) -> int:
        return table_bytes(cut_shards(shards, at), config.embedding)

    assert found == 1 or size(found) <= budget
    assert found == max(rows) or size(found + 1) > budget


def test_rows_that_ranks_share_are_shared_again() -> None:
    shards = (Shard("a", 0, 0, 50, 0, 4), Shard("a", 1, 50, 99, 0, 4), Shard("b", 0, 0, 70, 0, 4))
    cut = [(s.table, s.row_start, s.row_stop) for s in cut_shards(shards, 61)]
    assert cut == [("a", 0, 31), ("a", 31, 61), ("b", 0, 61)]
    assert cut_shards(shards, 99) == shards
    assert longest(shards, 0, CONFIG, budget=1) == 2, "a row for each"


def test_memory_of_the_host() -> None:
    total = 1024 * int(Path("/proc/meminfo").read_text().split()[1])
    assert 0 < available_bytes(CPU) <= total
    assert 2**20 < resident_bytes() <= peak_resident_bytes() + 2**20


def test_a_rank_on_an_accelerator_has_its_own_batch() -> None:
    found = fit(CONFIG, SCHEMA, JOB, PLENTY, torch.device("cuda", 0))
    assert found.micro_batch == found.real_micro_batch
    assert found.predicted["runtime"] == CONTEXT + WORKSPACE
    assert found.predicted_real["runtime"] == CONTEXT + WORKSPACE + 3 * CONNECTION  # world, hosts, peers
    totals = with_totals(found.predicted)
    assert totals["total"] - found.predicted["runtime"] == with_totals({**found.predicted, "runtime": 0})["total"]


def test_memory_of_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda with numbers of its own."""
    device = torch.device("cuda", 0)
    gib = 2**30
    numbers = {
        "mem_get_info": (90 * gib, 139 * gib),
        "memory_reserved": 40 * gib,
        "max_memory_reserved": 48 * gib,
        "max_memory_allocated": 45 * gib,
    }
    for name, value in numbers.items():
        monkeypatch.setattr(torch.cuda, name, lambda asked, value=value: value if asked == device else None)
    reset: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    forget_peak(device)
    forget_peak(CPU)
    assert reset == [device]
    assert available_bytes(device) == 90 * gib
    assert peak_parts(device, 0) == {"process": 0, "runtime": 9 * gib, "cached": 3 * gib, "total": 54 * gib}
    assert peak_parts(CPU, 5)["runtime"] == 0 and peak_parts(CPU, 5)["process"] == 5
