"""The process that is connected to a Ray cluster, for ray_cluster.py; the one module that imports Ray.

It takes orders from its parent over a pipe and ends with it. A task that was lost with its worker or node is sent
again, a few times; a task's error is passed to its parent.
"""

import contextlib
import functools
import importlib.metadata
import os
import pickle
import queue
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from megarec.errors import UserError, one_line
from megarec.ray_cluster import Order, Start

STARTS = 4
_POLL_SECONDS = 0.05
_PATIENCE = 60.0  # seconds for a node to come that can carry out a task
_LOOK_SECONDS = 120.0  # seconds for a node to answer
_KNOCK_SECONDS = 10.0
_STORE_BYTES = 100 << 20  # of a cluster of our own: results are small


def main() -> None:
    connection = Connection(int(sys.argv[1]))
    start: Start = connection.recv()
    orders: queue.Queue[Order | None] = queue.Queue()
    threading.Thread(target=_listen, args=(connection, orders), daemon=True).start()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    try:
        _connect(ray, start.address)
    except Exception as error:
        traceback.print_exc()
        connection.send(("refused", f"no Ray cluster can be used: {_short(error)}"))
        return
    try:
        _Driver(ray, connection, orders, start).work()
    finally:
        ray.shutdown()


def _listen(connection: Connection, orders: "queue.Queue[Order | None]") -> None:
    while True:
        try:
            orders.put(connection.recv())
        except (EOFError, OSError):  # the parent is gone; Ray ends the tasks of a driver that is
            for process in psutil.Process().children(recursive=True):  # a cluster of our own, which would stay for long
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            os._exit(1)


def _connect(ray: Any, address: str | None) -> None:
    named = {"log_to_driver": False, "logging_level": "WARNING"}
    address = address or os.environ.get("RAY_ADDRESS")
    if address is None:
        cores = len(os.sched_getaffinity(0))
        os.environ.setdefault("RAY_worker_niceness", "0")  # as the workers of every other engine
        ray.init("local", num_cpus=cores, object_store_memory=_STORE_BYTES, include_dashboard=False, **named)
        return
    host, _, port = address.rpartition(":")
    if port.isdecimal():
        socket.create_connection(
            (host, int(port)), _KNOCK_SECONDS
        ).close()  # without a cluster there, Ray would try for minutes
    ray.init(address, **named)


def _short(error: BaseException) -> str:
    """The first lines of Ray's output, which may be pages."""
    return one_line(" ".join(str(error).split()) or type(error).__name__, 300)


@dataclass
class _Sent:
    order: Order
    starts: int = 1


class _Driver:
    """Sends tasks to the cluster, and reports to the parent how they ended."""

    def __init__(self, ray: Any, connection: Connection, orders: "queue.Queue[Order | None]", start: Start) -> None:
        self._ray, self._connection, self._orders, self._start = ray, connection, orders, start
        self._sent: dict[Any, _Sent] = {}
        self._remote = ray.remote(carry_out)
        self._able = self._looked = time.monotonic()

    def work(self) -> None:
        """Serve until the parent closes the pipe."""
        if (why := self._look_at_nodes()) is not None:
            self._connection.send(("refused", why))
            return
        self._connection.send(("nodes", [node["Resources"] for node in self._nodes()]))
        while True:
            while not self._sent or not self._orders.empty():
                if (order := self._orders.get()) is None:
                    return
                self._send(_Sent(order))
            waiting = list(self._sent)
            ended, _ = self._ray.wait(waiting, timeout=_POLL_SECONDS)
            if ended:
                ended, _ = self._ray.wait(waiting, num_returns=len(waiting), timeout=0)
            for reference in ended:
                if not self._end(reference, self._sent.pop(reference)):
                    return
            if not self._can_go_on():
                return

    def _send(self, sent: _Sent) -> None:
        order = sent.order
        if not self._sent:
            self._able = time.monotonic()
        task = self._remote.options(num_cpus=order.cores, num_gpus=order.gpus, max_retries=0, name=order.name)
        self._sent[task.remote(self._start, order.content)] = sent

    def _end(self, reference: Any, sent: _Sent) -> bool:
        """Report how a task ended, or send it again; returns whether work goes on."""
        try:
            good, value = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:  # not from the task: what carries it out failed
            self._connection.send(("lost", f"{sent.order.name} could not be started: {_short(error.cause)}"))
            return False
        except self._ray.exceptions.RayError as error:
            traceback.print_exc()
            if sent.starts == STARTS:
                why = f"{sent.order.name} was lost {STARTS} times (too little memory?); the last time"
                self._connection.send(("lost", f"{why}: {_short(error)}"))
                return False
            self._connection.send(("again", f"{sent.order.name}: its worker or node died; it runs again"))
            self._send(_Sent(sent.order, sent.starts + 1))
            return True
        self._connection.send(("ended", sent.order.number, good, value))
        return True

    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in self._ray.nodes() if node["Alive"]]

    def _can_go_on(self) -> bool:
        """Whether a node is there for every task, or there was one a moment ago."""
        now = time.monotonic()
        if now - self._looked < _PATIENCE / 10:
            return True
        self._looked = now
        there = [node["Resources"] for node in self._nodes()]
        for sent in self._sent.values():
            order = sent.order
            if not any(has.get("CPU", 0) >= order.cores and has.get("GPU", 0) >= order.gpus for has in there):
                break
        else:
            self._able = now
        if now - self._able < _PATIENCE:
            return True
        needs = f"{order.cores:g} core(s)" + (f" and {order.gpus:g} GPU(s)" if order.gpus else "")
        self._connection.send(("lost", f"no node of the cluster has {needs}, which {order.name} needs"))
        return False

    def _look_at_nodes(self) -> str | None:
        """Why a node cannot be used; None: all can."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        look = self._ray.remote(what_is_wrong)
        asked = {}
        for node in self._nodes():
            there = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
            task = look.options(num_cpus=0, max_retries=0, scheduling_strategy=there)
            asked[task.remote(self._start)] = node["NodeManagerHostname"]
        answered, silent = self._ray.wait(list(asked), num_returns=len(asked), timeout=_LOOK_SECONDS)
        for reference in answered:
            try:
                if (why := self._ray.get(reference)) is not None:
                    return str(why)
            except self._ray.exceptions.RayTaskError as error:
                return f"node {asked[reference]}: {_short(error.cause)}"
            except self._ray.exceptions.RayError as error:
                if "unpickle" in str(error) or "import" in str(error):
                    return f"node {asked[reference]} cannot import megarec: {_short(error)}"
                traceback.print_exc()  # it died: the others do
        if silent:
            return f"node {asked[silent[0]]} did not answer within {_LOOK_SECONDS:.0f} s"
        return None


def what_is_wrong(start: Start) -> str | None:
    """Why tasks cannot run on this node, as one line; None: they can."""
    return _what_is_wrong(start)


@functools.cache
def _what_is_wrong(start: Start) -> str | None:
    host = socket.gethostname()
    for path, what in ((Path(start.token), "the directory of the work"), (Path(start.directory), "the one it is in")):
        if not path.exists():
            shown = path.parent if path == Path(start.token) else path
            return f"node {host} does not see {shown}: {what} must be on a file system that all nodes share"
    for name, version in start.versions:
        if (here := importlib.metadata.version(name)) != version:
            return f"node {host} has {name} {here}, expected {version}, as here: the bytes may depend on it"
    return None


def carry_out(start: Start, content: bytes) -> tuple[bool, bytes]:
    """In a worker: (whether the task ended well, pickle of what it gave or raised)."""
    try:
        if (why := what_is_wrong(start)) is not None:
            raise UserError(why)
        os.chdir(start.directory)
        function, task = pickle.loads(content)
        return True, pickle.dumps(function(task))
    except Exception as error:
        traceback.print_exc()
        error.add_note("".join(traceback.format_exception(error)))
        try:
            return False, pickle.dumps(error)
        except Exception:
            return False, pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))


if __name__ == "__main__":
    main()
