"""Prepare items in a background thread, a bounded number ahead."""

import queue
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class _End:
    """Marks the end of the items, and the error that ended them, if one did."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class _Producer(Generic[T]):
    """Fills a queue from a thread until the items end or `stop` is called."""

    def __init__(self, items: Iterator[T], ahead: int) -> None:
        self.queue: queue.Queue[T | _End] = queue.Queue(maxsize=ahead)
        self._items = items
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        error = None
        try:
            for item in self._items:
                self.queue.put(item)
                if self._stopped.is_set():
                    return
        except BaseException as caught:
            error = caught
        self.queue.put(_End(error))

    def stop(self) -> None:
        """End the thread; at most one `put` of it still waits for room in the queue."""
        self._stopped.set()
        while self._thread.is_alive():
            try:
                self.queue.get_nowait()
            except queue.Empty:
                self._thread.join(0.01)


def prefetched(items: Iterator[T], ahead: int) -> Iterator[T]:
    """The same items, prepared up to `ahead` before they are asked for.

    An error in the thread is raised here, where the item is awaited. Closing the iterator ends the thread.
    """
    producer = _Producer(items, ahead)
    try:
        while not isinstance(item := producer.queue.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        producer.stop()
