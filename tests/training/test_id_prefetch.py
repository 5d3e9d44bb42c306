"""What travels while a step computes, ids of the next batch and embeddings of micro-batches, changes no number."""

import json
import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from megarec.config.load import load_config
from megarec.data.batch import Batch
from megarec.distributed.process import start_process
from megarec.distributed.rank_pool import RankPool
from megarec.parity.cases import COLUMN, FULL_WIDTH, MIXED, TOWER_MODULES, UNEVEN_TWO
from megarec.parity.run import write_base
from megarec.run.build import build_run
from megarec.training.id_prefetch import IdPrefetcher
from megarec.training.profiling import StepTimer, tracing
from megarec.training.step import predict, train_step
from tests.streams import Stream

STEPS = 6


class Trained(NamedTuple):
    """What a rank has made of some steps.

    Attributes:
        tensors: logits of each step, and of a batch predicted in the middle while the next one is on its way; then the
            tables and tower modules.
        sent: calls and bytes by operation, its type and direction, without ids.
    """

    tensors: list[torch.Tensor]
    sent: dict[tuple[str, str, str], tuple[int, int]]


def train(path: Path, overrides: list[str], traces: Path | None = None) -> Trained:
    """On every rank."""
    config = load_config(path, overrides)
    device = start_process(config)
    run = build_run(config, device)
    run.dense.set_learning_rate(config.dense.learning_rate)
    ahead = IdPrefetcher(run.sparse, device, run.overlap)
    seen: list[torch.Tensor] = []
    with tracing((3, 4) if traces else None, traces or path, run.topology.rank) as step_done:
        for pending, start_next in ahead.steps(run.train.batches(epoch=0), StepTimer(device)):
            batch, ids = pending()
            result = train_step(run.dense, run.sparse, batch, timer=StepTimer(device), ids=ids,
                after_lookup=start_next if ahead.threaded else lambda: None, meanwhile=start_next,
            )  # fmt: skip
            seen.append(result.logits)
            step_done()
            if len(seen) == STEPS // 2:
                ahead.drain()
                seen.append(predict(run.dense, run.sparse, batch))
            if len(seen) > STEPS:
                break
    ahead.close()
    modules = {} if run.sparse.modules is None else run.sparse.modules.state_dict()
    tensors = [*seen, *(tensor for _, tensor in run.sparse.state().values()), *modules.values()]
    sent = {
        (row["op"], row["dtype"], row["direction"]): (row["calls"], row["bytes"])
        for row in run.ledger.rows()
        if row["op"] not in ("all_to_all ids", "all_to_all lengths")  # a batch more is on its way at the end
    }
    return Trained(tensors, sent)


MICRO_BATCHES = "deepspeed.gradient_accumulation_steps=2"
BITS_16, NO_L2 = 'parallel.messages=["fp16", "bf16"]', "embedding.l2=0.0"
OVERLAPPED: dict[str, list[str]] = {
    "flat": [],
    "tower": ["parallel.exchange=tower"],
    # Whole tables, rows of all ranks and copies; lists.
    "flat by micro-batch": [MIXED, "deepspeed.gradient_accumulation_steps=3", "data.batch_size=60"],
    "flat by micro-batch, 16 bits, no L2": [MICRO_BATCHES, BITS_16, NO_L2],
    "flat by micro-batch, ranks without tables": [
        MICRO_BATCHES,
        "parallel.towers=null",
        'data.features=["single_1", "single_3", "numeric_0"]',
        "embedding.features={}",
        'embedding.tables={"single_3": {"placement": "row"}}',
    ],
    "tower by micro-batch": [MICRO_BATCHES, "parallel.exchange=tower", COLUMN],
    # Means of lists are made behind the messages, and rounded once.
    "tower by micro-batch, 16 bits": [MICRO_BATCHES, "parallel.exchange=tower", BITS_16],
    "tower by micro-batch, 16 bits, mixed": [MICRO_BATCHES, "parallel.exchange=tower", BITS_16, MIXED, NO_L2],
    "tower by micro-batch, modules": [MICRO_BATCHES, "parallel.exchange=tower", FULL_WIDTH, TOWER_MODULES["dcn"]],
    "flat, modules": [MICRO_BATCHES, FULL_WIDTH, TOWER_MODULES["dlrm"]],
}
BY_PART = {
    "flat by micro-batch": {"all_to_all embeddings"},
    "flat by micro-batch, 16 bits, no L2": {"all_to_all embeddings"},
    "flat by micro-batch, ranks without tables": {"all_to_all embeddings"},
    "tower by micro-batch": {"all_to_all towers"},
    "tower by micro-batch, 16 bits": {"all_to_all towers"},
    "tower by micro-batch, 16 bits, mixed": {"all_to_all towers"},
    "tower by micro-batch, modules": {"all_to_all towers"},
}
"""What travels in more messages then."""


# What each of these does is part of another case, on the same exchange.
REPEATED = {
    "flat by micro-batch, 16 bits, no L2",
    "tower by micro-batch",
    "tower by micro-batch, 16 bits",
    "flat, modules",
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow) if case in REPEATED else case for case in OVERLAPPED]
)
def test_overlap_changes_no_bit(rank_pool: Callable[[int], RankPool], tmp_path: Path, case: str) -> None:
    path = write_base(tmp_path)
    overrides = [UNEVEN_TWO, "parallel.ranks_per_host=2", *OVERLAPPED[case]]
    plain, overlapped = (
        rank_pool(4).run(train, path, [*overrides, f"parallel.overlap={json.dumps(on)}"]) for on in (False, True)
    )
    for mine, its in zip(overlapped, plain, strict=True):
        assert len(mine.tensors) > STEPS + 1
        assert all(torch.equal(a, b) for a, b in zip(mine.tensors, its.tensors, strict=True))
        assert {op: size for op, (_, size) in mine.sent.items()} == {op: size for op, (_, size) in its.sent.items()}
        more = {op for op, (calls, _) in mine.sent.items() if calls > its.sent[op][0]}
        assert {op for op, _, _ in more} == BY_PART.get(case, set())


def lose_a_rank(path: Path) -> str:
    """On every rank: what the other says when rank 1 is gone from the network between two micro-batches."""
    config = load_config(path, [MICRO_BATCHES, "parallel.overlap=true"])
    run = build_run(config, start_process(config))
    lookup = run.sparse.forward(run.sparse.distribute(next(run.train.batches(epoch=0))), 2)
    if run.topology.rank == 1:
        lookup.micro_batch(0)
        for descriptor in Path("/proc/self/fd").iterdir():
            with suppress(OSError), socket.socket(fileno=os.dup(int(descriptor.name))) as mine:
                listens = mine.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                if mine.family in (socket.AF_INET, socket.AF_INET6) and not listens:
                    mine.shutdown(socket.SHUT_RDWR)
        return ""
    try:  # the other may be gone before this one has read its first part
        lookup.send_back(0, lookup.micro_batch(0))
        lookup.send_back(1, lookup.micro_batch(1))
        lookup.apply()
    except RuntimeError as error:
        return str(error)
    return "nothing"


def test_a_rank_lost_while_micro_batches_travel_is_an_error_of_the_others(tmp_path: Path) -> None:
    with RankPool(2) as pool:
        assert "closed" in pool.run(lose_a_rank, write_base(tmp_path))[0].lower()


def test_the_trace_shows_ids_in_a_thread_of_their_own(rank_pool: Callable[[int], RankPool], tmp_path: Path) -> None:
    path, traces = write_base(tmp_path), tmp_path / "traces"
    rank_pool(2).run(train, path, ["parallel.overlap=true"], traces)
    files = sorted(traces.glob("rank*.pt.trace.json"))
    assert len(files) == 2
    events = json.loads(files[0].read_text())["traceEvents"]
    threads = {
        name: {event["tid"] for event in events if event.get("name") == name}
        for name in ("distribute ids", "wait for ids")
    }
    assert threads["distribute ids"]
    assert threads["wait for ids"]
    assert not threads["distribute ids"] & threads["wait for ids"]


class Refusing:
    def distribute(self, batch: Batch) -> None:
        raise RuntimeError("no such table")


def test_an_error_in_the_thread_is_raised_where_the_batch_is_asked_for() -> None:
    ahead = IdPrefetcher(Refusing(), torch.device("cpu"), overlap=True)  # type: ignore[arg-type]
    batch = Batch(torch.empty(1, 0), {}, torch.zeros(1), torch.arange(1), 1)
    pending = ahead.start(batch)
    with pytest.raises(RuntimeError, match="no such table"):
        pending()


class Sending:
    def __init__(self, events: list[str]) -> None:
        self.events = events

    def distribute(self, batch: Batch) -> None:
        self.events.append(f"send in {threading.current_thread().name}")


def test_on_an_accelerator_the_main_thread_sends_in_a_stream_and_the_host_does_not_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[str] = []
    monkeypatch.setattr(torch, "Stream", lambda device: Stream(events, "ids"))
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda: Stream(events, "main"))
    monkeypatch.setattr(Batch, "to", lambda batch, device: Batch(batch.numeric, {}, batch.labels, batch.keys, 1))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: events.append(f"kept for {stream.name}"))
    ahead = IdPrefetcher(Sending(events), torch.device("cuda"), overlap=True)  # type: ignore[arg-type]
    assert not ahead.threaded
    pending = ahead.start(Batch(torch.empty(1, 0), {}, torch.zeros(1), torch.arange(1), 1))
    assert events == ["enter ids", "send in MainThread", "leave ids", "ids records"]
    pending()
    assert events[4:] == ["main waits for ids", *["kept for main"] * 3]
    ahead.drain()
    ahead.close()


def test_the_next_ids_start_behind_the_backward_pass_where_no_thread_sends_them() -> None:
    ahead = IdPrefetcher(Sending([]), torch.device("cpu"), overlap=False)  # type: ignore[arg-type]
    batches = iter([Batch(torch.empty(1, 0), {}, torch.zeros(1), torch.arange(n, n + 1), 1) for n in range(3)])
    seen = []
    for pending, start_next in ahead.steps(batches, StepTimer(torch.device("cpu"))):
        seen.append(int(pending().batch.keys))
        start_next()
        start_next()  # a second call starts no second batch
    assert seen == [0, 1, 2]
