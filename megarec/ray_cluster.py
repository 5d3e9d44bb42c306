"""Tasks on a Ray cluster: results in order; tasks of a node that died run again elsewhere.

Ray itself is only in a child process (ray_driver.py), for which this module needs none: what Ray prints goes to a log,
and when the whole cluster is lost, which ends the connected process, one line says so.
"""

import contextlib
import importlib.metadata
import importlib.util
import multiprocessing
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar
from uuid import uuid4

from megarec.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")
ROOT = Path(__file__).resolve().parents[1]
REQUIREMENT = "ray==2.60.0"
LOG = "ray.log"
SAME = ("pyarrow", "numpy")  # their versions decide bytes, so all nodes must have the same
_BOOT = "import sys; sys.path.insert(0, sys.argv.pop(1)); from megarec.ray_driver import main; main()"
_START_SECONDS = 240.0  # to connect, or to start a cluster on this machine, and to look at every node
_END_SECONDS = 10.0


class TasksLost(UserError):
    """The cluster is gone, or a task could not be carried out again: what is finished stays."""


@dataclass(frozen=True)
class Start:
    """The driver's settings, sent first.

    Attributes:
        address: as of RayCluster.
        directory: where tasks work, as this process does.
        token: a file that every node must see.
        versions: of packages that every node must have.
    """

    address: str | None
    directory: str
    token: str
    versions: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Order:
    """A task for the driver: `pickle` of (function, task)."""

    number: int
    name: str
    content: bytes = field(repr=False)
    cores: float
    gpus: float


class RayCluster:
    """Like a pool of processes, with the workers of a Ray cluster.

    `with cluster.sharing(directory):` connects; after it `run` and `submit` carry out tasks.

    Args:
        address: HOST:PORT as `ray start` prints it, or auto; None: RAY_ADDRESS, or else a cluster of its own on this
            machine, for the time of the block.

    Raises:
        UserError: Ray is not installed, or the address is not valid.

    Attributes:
        nodes: resources of each node when it was connected, by their names (CPU, GPU).
    """

    def __init__(self, address: str | None = None) -> None:
        if importlib.util.find_spec("ray") is None:
            raise UserError(f"--engine ray needs Ray, which is not installed: pip install {REQUIREMENT}")
        if address is not None and "://" in address:
            raise UserError(
                f"--address {address}: expected HOST:PORT or auto, on a machine of the cluster; Ray Client (ray://) "
                "does not work here"
            )
        self._address = address
        self.nodes: list[dict[str, float]] = []
        self._say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True)

    def sharing(self, directory: Path, say: Callable[[str], None] | None = None) -> "RayCluster":
        """Itself, to be entered.

        Args:
            directory: which all nodes must see; the log goes there.
            say: called with a line when a task runs again; None: standard error gets it.
        """
        self._shared = directory.absolute()
        self._say = say or self._say
        return self

    def __enter__(self) -> "RayCluster":
        ours, theirs = multiprocessing.Pipe()
        self._connection: Connection = ours
        self._ended: dict[int, tuple[bool, Any]] = {}
        self._numbers, self.nodes = 0, []
        self._token = self._shared / f".ray-{uuid4().hex}"
        self._token.touch()
        with theirs, (self._shared / LOG).open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _BOOT, str(ROOT), str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,  # Ray's workers look for modules where the driver is
                start_new_session=True,  # Ctrl-C is for this process, which ends the other
            )
        try:
            versions = tuple((name, importlib.metadata.version(name)) for name in SAME)
            self._send(Start(self._address, str(Path.cwd()), str(self._token), versions))
            while not self.nodes:
                if not self._connection.poll(_START_SECONDS):
                    raise TasksLost(f"{self._name}: no answer within {_START_SECONDS:.0f} s; {self._log} has more")
                self._receive()
        except BaseException:
            self._end(orderly=False)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._end(orderly=kind is None)
        if kind is None:
            (self._shared / LOG).unlink(missing_ok=True)

    def places(self, cores: float = 1.0, gpus: float = 0.0) -> int:
        """How many such tasks fit at a time on all nodes."""
        return sum(
            int(min([node.get("CPU", 0) // cores, *([node.get("GPU", 0) // gpus] if gpus else [])]))
            for node in self.nodes
        )

    def run(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[tuple[Task, Result]]:
        """(task, what the function makes of it), in the order of the tasks; each takes one core.

        Tasks must be such that one may run twice, and both runs at the same time.

        Raises:
            TasksLost: the cluster is gone, or a task was lost again and again.
        """
        waiting: deque[tuple[Task, int]] = deque()
        for task in tasks:
            waiting.append((task, self.submit(function, task)))
            while len(waiting) >= 2 * max(1, self.places()):
                yield self._first(waiting)
        while waiting:
            yield self._first(waiting)

    def submit(
        self, function: Callable[[Task], Any], task: Task, name: str = "a task", cores: float = 1.0, gpus: float = 0.0
    ) -> int:
        """Run a task on a node with that many free cores and GPUs; returns the number to ask for its result."""
        self._numbers += 1
        content = pickle.dumps((function, task))
        self._send(Order(self._numbers, name, content, cores, gpus))
        return self._numbers

    def result(self, number: int, *, wait: bool = True) -> tuple[Any] | None:
        """The result of a task, in a tuple of one; None: it has not ended.

        Raises:
            TasksLost: as `run`. Else the task's own error.
        """
        while number not in self._ended and (wait or self._connection.poll(0)):
            self._receive()
        if number not in self._ended:
            return None
        good, value = self._ended.pop(number)
        if not good:
            raise value
        return (value,)

    def _first(self, waiting: "deque[tuple[Task, int]]") -> tuple[Task, Any]:
        task, number = waiting.popleft()
        found = self.result(number)
        assert found is not None
        return task, found[0]

    @property
    def _name(self) -> str:
        return "Ray" if self._address is None else f"--address {self._address}"

    @property
    def _log(self) -> Path:
        return self._shared / LOG

    def _send(self, message: object) -> None:
        try:
            self._connection.send(message)
        except OSError as error:
            raise self._gone() from error

    def _receive(self) -> None:
        try:
            kind, *content = self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._gone() from error
        match kind:
            case "nodes":
                (self.nodes,) = content
            case "ended":
                number, good, value = content
                self._ended[number] = good, pickle.loads(value)
            case "again":
                self._say(content[0])
            case "refused":
                raise UserError(f"{self._name}: {content[0]}")
            case "lost":
                raise TasksLost(f"{self._name}: {content[0]}; finished work stays, the same command goes on")

    def _gone(self) -> TasksLost:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_SECONDS)
        return TasksLost(
            f"{self._name}: the cluster cannot be reached any more; finished work stays, the same command goes on "
            f"once it is back; {self._log} has more"
        )

    def _end(self, *, orderly: bool) -> None:
        with contextlib.suppress(OSError):
            if orderly:
                self._connection.send(None)
        if not orderly:
            self._connection.close()  # which ends the driver, and with it its tasks
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._connection.close()
        self._token.unlink(missing_ok=True)
