"""A pool of gloo ranks that stay alive: tests, the parity tool and benchmarks send them functions to run.

    with RankPool(world_size=4) as pool:
        results = pool.run(function, argument)   # function(argument) on every rank, results by rank

The function must be importable by name (defined at the top level of a module), its arguments and result picklable.
On a rank torch.distributed is initialised (gloo) and torch runs one thread. Ranks are forked from a process that has
imported everything, which takes many seconds, and computed nothing: a pool starts in a tenth of a second. So take a new
one for every engine: DeepSpeed leaves process groups behind, and idle ones wake their threads a hundred times a second.
"""

import datetime
import multiprocessing
import multiprocessing.connection
import os
import pickle
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

DEFAULT_TIMEOUT = 240.0
START_TIMEOUT = 120.0
SECONDS_TO_DIE = 1.0  # from the end of a process's connections to its own
PRELOADED = [  # what ranks may need, and what DeepSpeed imports late
    "megarec.training.trainer",
    "megarec.sparse.tables.fbgemm_backend",
    "torch._dynamo",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "setuptools",
]


class RankError(RuntimeError):
    """A rank raised, died or did not answer in time; the message holds its traceback or exit code."""


class RankPool:
    """`world_size` gloo processes on this machine, started at once, stopped by `close` or the end of `with`.

    Args:
        world_size: number of ranks.
        timeout: seconds that one `run` may take on any rank.

    Raises:
        RankError: a rank did not start.
    """

    def __init__(self, world_size: int, timeout: float = DEFAULT_TIMEOUT) -> None:
        self.world_size = world_size
        self.timeout = timeout
        self._directory = tempfile.mkdtemp(prefix="megarec-ranks-")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        pipes = [context.Pipe() for _ in range(world_size)]
        self._connections: list[Connection] = [parent for parent, _ in pipes]
        self._processes = [
            context.Process(target=_serve, args=(rank, world_size, self._directory, child, timeout), daemon=True)
            for rank, (_, child) in enumerate(pipes)
        ]
        with _cpus_only():
            for process in self._processes:
                process.start()
        for _, child in pipes:
            child.close()
        self._collect(START_TIMEOUT + timeout, "start")

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Run `function(*args)` on every rank at the same time.

        Returns:
            The results, by rank.

        Raises:
            RankError: a rank raised (with its traceback), died, or exceeded the timeout. The pool is closed.
        """
        if not self._processes:
            raise RankError(
                "this pool is closed: an earlier failure ends it, so that no rank is left inside a collective"
            )
        message = pickle.dumps((function, args))
        for connection in self._connections:
            try:
                connection.send_bytes(pickle.dumps(sys.path))
                connection.send_bytes(message)
            except OSError:
                break  # that rank is dead: _collect says so, with its exit code
        return self._collect(self.timeout, getattr(function, "__name__", repr(function)))

    @property
    def closed(self) -> bool:
        return not self._processes

    def close(self) -> None:
        """End every rank, whatever it is doing; harmless when repeated."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []
        shutil.rmtree(self._directory, ignore_errors=True)

    def _collect(self, timeout: float, what: str) -> list[Any]:
        """One answer of every rank; a failure closes the pool and raises at once: waiting ranks cannot hang us."""
        deadline = time.monotonic() + timeout
        results: dict[int, Any] = {}
        try:
            while len(results) < self.world_size:
                waiting = {self._connections[r]: r for r in range(self.world_size) if r not in results}
                ready = multiprocessing.connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
                if not ready:
                    late = ", ".join(str(rank) for rank in waiting.values())
                    raise RankError(f"{what}: no answer from rank {late} of {self.world_size} within {timeout:.0f} s")
                for connection in ready:
                    rank = waiting[connection]  # type: ignore[index]
                    results[rank] = self._answer(rank, what)
        except BaseException:
            self.close()
            raise
        return [results[rank] for rank in range(self.world_size)]

    def _answer(self, rank: int, what: str) -> Any:
        try:
            succeeded, payload = pickle.loads(self._connections[rank].recv_bytes())
        except (EOFError, OSError):
            raise self._death(rank, what) from None
        if succeeded:
            return payload
        # A rank may report a connection that closed before the one that died is known to be dead: name the cause.
        by_sentinel = {process.sentinel: rank for rank, process in enumerate(self._processes)}
        if dead := multiprocessing.connection.wait(list(by_sentinel), SECONDS_TO_DIE):
            raise self._death(by_sentinel[dead[0]], what)  # type: ignore[index]
        raise RankError(f"{what} failed on rank {rank} of {self.world_size}:\n{payload}")

    def _death(self, rank: int, what: str) -> RankError:
        self._processes[rank].join(10)
        code = self._processes[rank].exitcode
        return RankError(f"{what}: rank {rank} of {self.world_size} died (exit code {code})")

    def __enter__(self) -> "RankPool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextmanager
def _cpus_only() -> Iterator[None]:
    """For the process that ranks are forked from, which starts with the first of them: torch cannot use a GPU in a
    fork of a process that has looked for one."""
    before = os.environ.get("DS_ACCELERATOR")
    os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        yield
    finally:
        if before is None:
            del os.environ["DS_ACCELERATOR"]
        else:
            os.environ["DS_ACCELERATOR"] = before


def _serve(rank: int, world_size: int, directory: str, connection: Connection, timeout: float) -> None:
    """The life of a rank: join the group, then answer messages until the parent is gone."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size)
    )

    def join() -> None:
        store = dist.FileStore(os.path.join(directory, "store"), world_size)  # noqa: PTH118 (it wants a str)
        patience = datetime.timedelta(seconds=timeout)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=patience)

    _reply(connection, join)
    while True:
        try:
            path = pickle.loads(connection.recv_bytes())
            message = connection.recv_bytes()
        except EOFError:
            return  # the parent closed the pool or died
        sys.path.extend(entry for entry in path if entry not in sys.path)

        def work(message: bytes = message) -> Any:
            function, args = pickle.loads(message)
            return function(*args)

        _reply(connection, work)


def _reply(connection: Connection, work: Callable[[], Any]) -> None:
    try:
        answer = pickle.dumps((True, work()))
    except BaseException:
        answer = pickle.dumps((False, traceback.format_exc()))
    connection.send_bytes(answer)
