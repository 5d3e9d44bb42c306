"""`megarec serve`: raw rows over HTTP, scored in batches of waiting requests.

    POST /score    {"rows": [{...}, ...]} -> {"predictions": [0.12, null, ...], "errors": {"1": "..."}}
                   of several labels: {"predictions": [{"click": 0.12, "buy": 0.03}, null, ...], ...}
    GET  /health   200 once the model is there
    GET  /metrics  counters and times for Prometheus

A request is read by the event loop; one thread scores, and takes at a time all rows that wait, so that under load
batches grow and a single row does not wait. A mistake in a request is its own 4xx, a mistake in a row its own
error beside the scores of the others.
"""

import asyncio
import contextlib
import json
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NoReturn

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from megarec.serving.scorer import Scorer, ScoringError
from megarec.serving.scorer.scorer import Scores

Prediction = float | dict[str, float] | None
"""A row's probability, of several labels one by name; None: the row has an error."""

SECONDS_TO_SEND = 10.0  # that a client has for its whole body
WAITING_REQUESTS = 1024  # more are refused with 503
WAITING_BYTES = 1 << 26  # likewise, of their bodies: a row in memory is many times its text
BATCH_BYTES = 1 << 22  # of bodies scored at a time, or one request
_TIMES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)


@dataclass(frozen=True)
class Limits:
    """Limits of a request.

    Attributes:
        body_bytes: of one request.
        rows: of one request.
        batch_rows: scored at a time.
    """

    body_bytes: int = 1 << 20
    rows: int = 1024
    batch_rows: int = 4096


class Refused(Exception):
    """A request that gets an error.

    Attributes:
        status: of HTTP.
    """

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


@dataclass
class _Waiting:
    rows: list[Any]
    size: int
    answer: asyncio.Future[tuple[list[Prediction], dict[int, str]]]


class Batcher:
    """Scores waiting requests, a batch at a time, in a thread of its own."""

    def __init__(self, scorer: Scorer, batch_rows: int, sizes: Histogram) -> None:
        self._scorer, self._most, self._sizes = scorer, batch_rows, sizes
        self._queue: deque[_Waiting] = deque()
        self._waiting_bytes = 0
        self._thread = ThreadPoolExecutor(1, "scorer")
        self._running: asyncio.Task[None] | None = None

    async def score(self, rows: list[Any], size: int) -> tuple[list[Prediction], dict[int, str]]:
        """Probabilities, None for a row with an error, and the errors by place.

        Args:
            size: bytes of their text.

        Raises:
            Refused: too many requests wait.
        """
        if len(self._queue) >= WAITING_REQUESTS or self._waiting_bytes >= WAITING_BYTES:
            what = f"{len(self._queue)} requests of {self._waiting_bytes:,} bytes"
            raise Refused(503, f"{what} wait already; ask again later")
        waiting = _Waiting(rows, size, asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        self._waiting_bytes += size
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        return await waiting.answer

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._queue:
                batch = self._next_batch()
                try:
                    answers = await loop.run_in_executor(self._thread, self._answers, batch)
                except Exception as error:  # the server's fault: these requests get the error, later ones are served
                    for waiting in batch:
                        if not waiting.answer.done():
                            waiting.answer.set_exception(error)
                    continue
                for waiting, answer in zip(batch, answers, strict=True):
                    if not waiting.answer.done():  # its client may be gone
                        waiting.answer.set_result(answer)
        finally:
            self._running = None

    def _next_batch(self) -> list[_Waiting]:
        """The requests that wait longest: at least one, and no more than fit."""
        batch: list[_Waiting] = []
        rows = size = 0
        while self._queue:
            first = self._queue[0]
            rows, size = rows + len(first.rows), size + first.size
            if batch and (rows > self._most or size > BATCH_BYTES):
                break
            batch.append(self._queue.popleft())
            self._waiting_bytes -= first.size
        return batch

    def _answers(self, batch: Sequence[_Waiting]) -> list[tuple[list[Prediction], dict[int, str]]]:
        scores = self._scorer.score([row for waiting in batch for row in waiting.rows])
        self._sizes.observe(len(scores.probabilities))
        found = self._shown(scores)
        answers, start = [], 0
        for waiting in batch:
            end = start + len(waiting.rows)
            errors = {p - start: scores.errors[p] for p in range(start, end) if p in scores.errors}
            answers.append((found[start:end], errors))
            start = end
        return answers

    def _shown(self, scores: Scores) -> list[Prediction]:
        if self._scorer.labels:
            rows = [dict(zip(self._scorer.labels, row, strict=True)) for row in scores.probabilities.tolist()]
            return [None if place in scores.errors else row for place, row in enumerate(rows)]
        return [None if p != p else p for p in scores.probabilities.tolist()]

    def close(self) -> None:
        self._thread.shutdown()


def application(scorer: Scorer, limits: Limits = Limits()) -> Starlette:
    """The ASGI application that serves a scorer."""
    registry = CollectorRegistry()
    requests = Counter("megarec_requests_total", "Requests by status", ["status"], registry=registry)
    rows = Counter("megarec_rows_total", "Rows by outcome", ["outcome"], registry=registry)
    seconds = Histogram(
        "megarec_request_seconds", "From the whole request to its answer", registry=registry, buckets=_TIMES
    )
    sizes = Histogram(
        "megarec_batch_rows", "Rows scored at a time", registry=registry, buckets=[4.0**i for i in range(7)]
    )
    batcher = Batcher(scorer, limits.batch_rows, sizes)

    async def score(request: Request) -> Response:
        try:
            body = await _body(request, limits.body_bytes)
            given = _rows(body, limits.rows)
            start = time.perf_counter()
            found, errors = await batcher.score(given, len(body))
            seconds.observe(time.perf_counter() - start)
        except Refused as refused:
            requests.labels(str(refused.status)).inc()
            return JSONResponse({"error": str(refused)}, refused.status)
        rows.labels("error").inc(len(errors))
        rows.labels("scored").inc(len(found) - len(errors))
        status = 422 if errors and len(errors) == len(found) else 200
        requests.labels(str(status)).inc()
        return JSONResponse(
            {"predictions": found, "errors": {str(place): why for place, why in errors.items()}}, status
        )

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def metrics(request: Request) -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        batcher.close()

    routes = [
        Route("/score", score, methods=["POST"]),
        Route("/health", health),
        Route("/metrics", metrics),
    ]
    return Starlette(routes=routes, lifespan=lifespan)


async def _body(request: Request, most: int) -> bytes:
    """The whole body, never more than `most` bytes of it."""
    declared = request.headers.get("content-length", "0")
    if not declared.isdecimal() or int(declared) > most:
        raise Refused(413, f"the body has {declared[:20]} bytes, at most {most} are accepted")
    parts, size = [], 0
    try:
        async with asyncio.timeout(SECONDS_TO_SEND):
            async for part in request.stream():
                size += len(part)
                if size > most:
                    raise Refused(413, f"the body has more than {most} bytes")
                parts.append(part)
    except TimeoutError:
        raise Refused(408, f"the body did not come within {SECONDS_TO_SEND:g} s") from None
    except ClientDisconnect:
        raise Refused(400, "the body ended early") from None
    return b"".join(parts)


def _rows(body: bytes, most: int) -> list[Any]:
    expected = 'expected {"rows": [{column: value, ...}, ...]}'
    try:
        found = json.loads(body, parse_constant=_no_constant)
    except RecursionError:
        raise Refused(400, f"the body is nested too deeply; {expected}") from None
    except ValueError as error:  # of JSON, UTF-8 and integers of thousands of digits
        raise Refused(400, f"the body is not JSON ({str(error)[:200]}); {expected}") from None
    if not isinstance(found, dict) or not isinstance(rows := found.get("rows"), list) or len(found) != 1:
        raise Refused(400, expected)
    if not 0 < len(rows) <= most:
        raise Refused(413 if rows else 400, f"{len(rows)} rows, expected 1 to {most}")
    return rows


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON; null stands for a missing number")


def serve(scorer: Scorer, host: str, port: int, limits: Limits) -> None:
    """Serve until a signal ends it.

    Raises:
        ScoringError: the address cannot be used.
    """
    import socket

    import uvicorn

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ScoringError(f"--host {host} --port {port}: {error.strerror or error}; choose another") from error
    print(f"serving on http://{host}:{listener.getsockname()[1]}", flush=True)
    config = uvicorn.Config(
        application(scorer, limits),
        log_level="warning",
        access_log=False,
        limit_concurrency=WAITING_REQUESTS,
        timeout_graceful_shutdown=10,
        h11_max_incomplete_event_size=1 << 16,
    )
    uvicorn.Server(config).run([listener])
