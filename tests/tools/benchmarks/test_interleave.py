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
