"""Ids that travel while a step computes change no number."""

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megarec.config.load import load_config
from megarec.data.batch import Batch
from megarec.distributed.process import start_process
from megarec.distributed.rank_pool import RankPool
from megarec.parity.run import write_base
from megarec.run.build import build_run
from megarec.training.id_prefetch import IdPrefetcher
from megarec.training.profiling import StepTimer, tracing
from megarec.training.step import predict, train_step
from tests.streams import Stream

STEPS = 6
TOWERS = 'parallel.towers=[["single_0", "single_1", "multi_0", "multi_1"], ["single_2", "single_3"]]'


def train(path: Path, overrides: list[str], traces: Path | None = None) -> list[torch.Tensor]:
    """On every rank: logits of each step, and of a batch predicted in the middle while the next one is on its way."""
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
    return seen


@pytest.mark.parametrize("exchange", ["flat", "tower"])
def test_overlap_changes_no_bit(rank_pool: Callable[[int], RankPool], tmp_path: Path, exchange: str) -> None:
    path = write_base(tmp_path)
    overrides = [TOWERS, f"parallel.exchange={exchange}", "parallel.ranks_per_host=2"]
    plain, overlapped = (
        rank_pool(4).run(train, path, [*overrides, f"parallel.overlap={json.dumps(on)}"]) for on in (False, True)
    )
    for mine, its in zip(overlapped, plain, strict=True):
        assert len(mine) == STEPS + 1
        assert all(torch.equal(a, b) for a, b in zip(mine, its, strict=True))


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
    def __init__(self, said: list[str]) -> None:
        self.said = said

    def distribute(self, batch: Batch) -> None:
        self.said.append(f"send in {threading.current_thread().name}")


def test_on_an_accelerator_the_main_thread_sends_in_a_stream_and_the_host_does_not_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    monkeypatch.setattr(torch, "Stream", lambda device: Stream(said, "ids"))
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda: Stream(said, "main"))
    monkeypatch.setattr(Batch, "to", lambda batch, device: Batch(batch.numeric, {}, batch.labels, batch.keys, 1))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: said.append(f"kept for {stream.name}"))
    ahead = IdPrefetcher(Sending(said), torch.device("cuda"), overlap=True)  # type: ignore[arg-type]
    assert not ahead.threaded
    pending = ahead.start(Batch(torch.empty(1, 0), {}, torch.zeros(1), torch.arange(1), 1))
    assert said == ["enter ids", "send in MainThread", "leave ids", "ids records"]
    pending()
    assert said[4:] == ["main waits for ids", *["kept for main"] * 3]
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
