"""A probe on every host, asked in parallel."""

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from megarec.errors import one_line
from megarec.launching import probe
from megarec.launching.hosts import CONNECT_SECONDS, on_ssh_host

ANSWER_SECONDS = 30.0
_BOOT = "import sys; exec(compile(sys.stdin.read(int(sys.stdin.readline())), 'probe', 'exec')); serve()"
Result = TypeVar("Result")


class Unanswered(Exception):
    """A host that cannot be probed, with the message of ssh or its shell."""


class Session:
    """The probe on one host."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._process = subprocess.Popen(
            on_ssh_host(host, [sys.executable, "-P", "-c", _BOOT]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        source = Path(probe.__file__).read_text(encoding="utf-8")
        self._send(f"{len(source)}\n{source}")

    def ask(self, request: str, **arguments: Any) -> dict[str, Any]:
        """Raises:
        Unanswered: the host cannot be reached, has no such Python, or takes longer than ANSWER_SECONDS.
        """
        self._send(json.dumps({"ask": request, **arguments}) + "\n")
        try:
            answer = self._answers.get(timeout=ANSWER_SECONDS + CONNECT_SECONDS)
        except queue.Empty:
            raise Unanswered(f"no answer within {ANSWER_SECONDS:.0f} s") from None
        if not answer:
            raise Unanswered(self._last_words())
        try:
            return dict(json.loads(answer))
        except (ValueError, TypeError, RecursionError) as error:  # its shell prints something at every login
            raise Unanswered(f"its shell says {one_line(answer.strip(), 60)!r} before any command") from error

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _send(self, text: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(text)
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # ssh has ended: the missing answer shows it

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def _last_words(self) -> str:
        assert self._process.stderr is not None
        lines = self._process.stderr.read().strip().splitlines()
        return lines[-1] if lines else f"ssh ended with exit code {self._process.wait()}"


class Sessions:
    """Probes on several hosts; a host that fails to answer is left out from then on."""

    def __init__(self, hosts: list[str]) -> None:
        self.unanswered: dict[str, str] = {}
        self._pool = ThreadPoolExecutor(max_workers=max(1, len(hosts)))
        self._sessions = {host: Session(host) for host in hosts}

    def __enter__(self) -> "Sessions":
        return self

    def __exit__(self, *_: object) -> None:
        for session in self._sessions.values():
            session.close()
        self._pool.shutdown()

    def ask(self, request: str, arguments: Callable[[str], dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """One request to every host at once.

        Args:
            arguments: by host.

        Returns:
            The answers by host, of those that gave one.
        """
        return self.map(lambda host, session: session.ask(request, **arguments(host)))

    def map(self, ask: Callable[[str, Session], Result]) -> dict[str, Result]:
        """As `ask`, with several requests to a host in a row."""
        asked = {
            host: self._pool.submit(ask, host, session)
            for host, session in self._sessions.items()
            if host not in self.unanswered
        }
        answers = {}
        for host, future in asked.items():
            try:
                answers[host] = future.result()
            except Unanswered as error:
                self.unanswered[host] = str(error)
        return answers
