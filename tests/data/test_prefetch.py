import threading
import time
from collections.abc import Iterator

import pytest

from megarec.data.loader import prefetched


def prefetch_threads() -> int:
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


def test_all_items_in_order() -> None:
    assert list(prefetched(iter(range(100)), 3)) == list(range(100))
    assert list(prefetched(iter(()), 3)) == []
    assert prefetch_threads() == 0


def test_an_error_is_raised_where_its_item_is_awaited() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise KeyError("broken")

    iterator = prefetched(items(), 4)
    assert next(iterator) == 1
    with pytest.raises(KeyError, match="broken"):
        next(iterator)
    assert prefetch_threads() == 0


@pytest.mark.parametrize("taken", [1, 2, 7])
def test_closing_early_ends_the_thread(taken: int) -> None:
    iterator = prefetched(iter(range(10**9)), 2)
    for _ in range(taken):
        next(iterator)
    assert prefetch_threads() == 1
    iterator.close()  # type: ignore[attr-defined]
    assert prefetch_threads() == 0


def test_leaving_a_loop_ends_the_thread() -> None:
    for item in prefetched(iter(range(10**9)), 2):
        if item == 3:
            break
    assert prefetch_threads() == 0


def test_it_works_ahead_but_not_far() -> None:
    made = []

    def items() -> Iterator[int]:
        for i in range(1000):
            made.append(i)
            yield i

    iterator = prefetched(items(), 3)
    next(iterator)
    deadline = time.monotonic() + 5
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(made) == 4  # 1 taken, 3 ahead of it
    iterator.close()  # type: ignore[attr-defined]
