"""One raw row from an export, and the same over HTTP, beside the trainer's model in eager torch.

    python tools/bench.py serving

The shipped config of MovieLens-1M on made-up rows with its users, items and histories, prepared from a CSV file so that
raw values go through vocabularies. One thread scores; the server and the clients that load it share the machine.

    row        Scorer.score of one raw row
    dense      the dense model of it alone, in onnxruntime
    eager      the trainer's model in torch, of a batch of one that lies encoded
    http       CLIENTS connections, each with one request of one row under way, over loopback
"""

import asyncio
import csv
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from megarec.checkpoint.offline import locate
from megarec.data.loader import EvalLoader
from megarec.data.schema import load_schema
from megarec.data.store import open_split
from megarec.distributed.rendezvous import free_port
from megarec.serving.export.bundle import export_bundle
from megarec.serving.predictor import load_checkpoint
from megarec.serving.scorer import Scorer
from megarec.serving.scorer.scorer import embeddings
from megarec.serving.scorer.tables import TableType

ROOT = Path(__file__).resolve().parents[2]
USERS, ITEMS, ROWS, HISTORY = 6040, 3706, 20_000, 20
CLIENTS, REQUESTS, MEMORY_REQUESTS = 16, 20_000, 100_000
REPEATED = 2_000
COLUMNS = {
    "user_id": {"type": "categorical", "dtype": "integer"},
    "item_id": {"type": "categorical", "dtype": "integer"},
    "hour": {"type": "categorical", "dtype": "integer"},
    "weekday": {"type": "categorical", "dtype": "integer"},
    "history": {"type": "multi_valued", "dtype": "integer", "pooling": "mean"},
    "label": {"type": "label"},
}


def run() -> dict[str, Any]:
    """Milliseconds of one row, requests a second, and the server's memory."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        rows = _trained(directory)
        found: list[dict[str, Any]] = []
        kinds: tuple[TableType, ...] = ("fp32", "int8")
        for kind in kinds:
            export_bundle(locate(directory / "run"), directory / kind, tables=kind)
            found.append({"tables": kind} | _one_row(directory / kind, rows))
        eager = _eager(directory)
        found.append({"tables": "fp32, eager torch"} | eager)
        found.append({"tables": "fp32, http"} | _over_http(directory / "fp32", rows))
    ratios = {
        "row_p50_ms": found[0]["row p50 ms"],
        "dense_p50_ms": found[0]["dense p50 ms"],
        "eager_over_row": eager["p50 ms"] / found[0]["row p50 ms"],
        "requests_a_second": found[-1]["requests/s"],
        "http_p99_ms": found[-1]["p99 ms"],
    }
    aims = {"row_p50_ms": "at most 0.25", "dense_p50_ms": "at most 0.1"}
    aims |= {"requests_a_second": "at least 2,000", "http_p99_ms": "at most 20"}
    return {"rows": found, "ratios": ratios, "aims": aims}


def _trained(directory: Path) -> list[dict[str, Any]]:
    """Prepare made-up rows, train a few steps, and return raw rows."""
    random = np.random.default_rng(1)
    ids = np.stack([random.integers(most, size=ROWS) for most in (USERS, ITEMS, 24, 7)], axis=1)
    lengths = random.integers(HISTORY + 1, size=ROWS)
    lists = ["|".join(map(str, random.integers(ITEMS, size=length))) for length in lengths]
    with (directory / "rows.csv").open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(COLUMNS)
        parts = enumerate(zip(ids.tolist(), lists, strict=True))
        lines.writerows([*row, words, place % 2] for place, (row, words) in parts)
    (directory / "spec.json").write_text(json.dumps({"name": "made-up ratings", "columns": COLUMNS}))
    words = ["--schema", directory / "spec.json", "--data", directory / "rows.csv", "--output", directory / "data"]
    _python("tools/prepare_data.py", "table", *words)
    settings = [f"data.path={directory / 'data'}", f"train.output_dir={directory / 'run'}", "train.max_steps=4"]
    overrides = [word for setting in settings for word in ("--set", setting)]
    _python("launch/train.py", "--config", "ds_configs/movielens-1m.json", *overrides)
    single = ("user_id", "item_id", "hour", "weekday")
    return [
        dict(zip(single, row, strict=True)) | {"history": [int(item) for item in words.split("|") if item]}
        for row, words in zip(ids.tolist(), lists, strict=True)
    ]


def _python(*words: object) -> None:
    environment = {**os.environ, "MASTER_PORT": str(free_port())}
    subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, env=environment, check=True, capture_output=True)


def _one_row(export: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    scorer = Scorer(export)
    encoded = scorer._encoder.encode(rows[:1])
    inputs = {"embedded": embeddings(scorer.bundle.manifest, scorer._tables, encoded)}
    row = _milliseconds(lambda place: scorer.score([rows[place]]))
    dense = _milliseconds(lambda place: scorer._dense.run(None, inputs))
    size = sum(path.stat().st_size for path in (export / "tables").iterdir())
    batch = rows[:4096]
    start = time.perf_counter()
    scorer.score(batch)
    per_row = (time.perf_counter() - start) / len(batch)
    return {
        "row p50 ms": row[0],
        "row p99 ms": row[1],
        "dense p50 ms": dense[0],
        "rows/s at 4,096": 1 / per_row,
        "bytes of tables": size,
    }


def _eager(directory: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    model, schema = load_checkpoint(locate(directory / "run")), load_schema(directory / "data")
    store = open_split(directory / "data", "test", schema, "error")
    loader = EvalLoader(store, schema, batch_size=1, rank=0, world_size=1, seed=1, prefetch=1, pin_memory=False)
    batch = next(iter(loader.batches()))
    p50, p99 = _milliseconds(lambda place: model.predict(batch))
    return {"p50 ms": p50, "p99 ms": p99}


def _milliseconds(what: Callable[[int], object]) -> tuple[float, float]:
    """The median and the 99th percentile of many calls."""
    taken = []
    for place in range(REPEATED):
        start = time.perf_counter()
        what(place)
        taken.append(time.perf_counter() - start)
    return 1e3 * float(np.percentile(taken, 50)), 1e3 * float(np.percentile(taken, 99))


def _over_http(export: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "tools/serve.py"), str(export), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        told = re.search(r":(\d+)$", server.stdout.readline().strip())
        assert told is not None
        bodies = [json.dumps({"rows": [row]}).encode() for row in rows]
        try:
            asyncio.run(_load(int(told[1]), bodies, 2_000))  # to warm up
            seconds, taken = asyncio.run(_load(int(told[1]), bodies, REQUESTS))
            memory = [psutil.Process(server.pid).memory_info().rss]
            asyncio.run(_load(int(told[1]), bodies, MEMORY_REQUESTS))
            memory.append(psutil.Process(server.pid).memory_info().rss)
        finally:
            server.terminate()
    p50, p99 = 1e3 * np.percentile(taken, (50, 99))
    grown = (memory[1] - memory[0]) / 2**20
    return {"requests/s": REQUESTS / seconds, "p50 ms": p50, "p99 ms": p99, "MiB grown in 100,000 requests": grown}


async def _load(port: int, bodies: list[bytes], count: int) -> tuple[float, list[float]]:
    """Seconds for all requests, and of each one."""
    taken: list[float] = []

    async def client(number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for place in range(number, count, CLIENTS):
            body = bodies[place % len(bodies)]
            head = f"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            start = time.perf_counter()
            writer.write(head + body)
            header = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", header.lower())
            assert header.startswith(b"HTTP/1.1 200") and length is not None, header
            await reader.readexactly(int(length[1]))
            taken.append(time.perf_counter() - start)
        writer.close()

    start = time.perf_counter()
    await asyncio.gather(*(client(number) for number in range(CLIENTS)))
    return time.perf_counter() - start, taken
