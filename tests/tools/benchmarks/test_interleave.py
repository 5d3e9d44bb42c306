import pytest
import torch

from tools.benchmarks.interleave import interleave, median_ms


def test_contestants_take_turns_in_a_turning_order() -> None:
    calls: list[str] = []
    seconds = interleave(
        {name: lambda name=name: calls.append(name) for name in "abc"},
        3,
        warmup=1,
        before=lambda: calls.append("|"),
    )
    assert "".join(calls) == "|c|a|b" + "|a|b|c" + "|b|c|a" + "|c|a|b"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_median_in_milliseconds() -> None:
    assert median_ms([0.001, 0.5, 0.002]) == 2.0


def test_an_accelerator_is_timed_by_its_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Event:
        def __init__(self, device: torch.device, enable_timing: bool) -> None:
            assert device == torch.device("cuda", 0) and enable_timing

        def record(self) -> None:
            calls.append("record")

        def synchronize(self) -> None:
            calls.append("wait")

        def elapsed_time(self, last: "Event") -> float:
            assert last is not self
            return 2.5

    monkeypatch.setattr(torch, "Event", Event)
    work = {"a": lambda: calls.append("work")}
    assert interleave(work, 1, warmup=0, device=torch.device("cuda", 0)) == {"a": [0.0025]}
    assert calls == ["record", "work", "record", "wait"]
