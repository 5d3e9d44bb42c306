"""An export over HTTP: scores, a row's own error, a 4xx for every request that is none, and a server that stays up."""

import http.client
import json
import random
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from megarec.checkpoint.offline import locate
from megarec.data.sources.synthetic import Shape, prepare_synthetic
from megarec.distributed.rank_pool import RankPool
from tests.checkpoint.runs import leg, write_run
from tests.processes import python

for package in ("onnxruntime", "onnxscript", "starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(package, reason="the extras 'export' and 'serve' are not installed")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def export(
    rank_pool: Callable[[int], RankPool], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    """A bundle, and raw rows for it."""
    from megarec.serving.export.bundle import export_bundle

    directory = tmp_path_factory.mktemp("served")
    prepare_synthetic(Shape(examples=200, seed=4), directory / "data")
    run = write_run(directory, directory / "data")
    rank_pool(1).run(partial(leg, load=False, save=True), run, [], 0, 2)
    export_bundle(locate(directory / "out"), directory / "export")
    return directory / "export", pq.read_table(directory / "data/test").drop_columns(["label"]).to_pylist()


@pytest.fixture(scope="module")
def port(export: tuple[Path, list[dict[str, Any]]]) -> Iterator[int]:
    """Of a server in a process of its own."""
    command = [sys.executable, str(ROOT / "tools/serve.py"), str(export[0]), "--port", "0", "--max-rows", "50"]
    with subprocess.Popen([*command, "--max-body", "20000"], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        found = re.search(r"serving on http://127\.0\.0\.1:(\d+)", server.stdout.readline())
        assert found is not None
        yield int(found[1])
        server.terminate()
        assert server.wait(timeout=60) == -signal.SIGTERM  # it ends what it has begun, then as it was asked


def ask(port: int, body: bytes | str, path: str = "/score", method: str = "POST") -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body)
        answer = connection.getresponse()
        content = answer.read()
        return answer.status, json.loads(content) if answer.headers.get(
            "content-type"
        ) == "application/json" else content
    finally:
        connection.close()


def test_scores_are_those_of_the_scorer(export: tuple[Path, list[dict[str, Any]]], port: int) -> None:
    from megarec.serving import Scorer

    directory, rows = export
    status, found = ask(port, json.dumps({"rows": rows}))
    assert status == 200 and found["errors"] == {}
    assert found["predictions"] == Scorer(directory).score(rows).probabilities.tolist()


def test_many_clients_each_get_their_own(export: tuple[Path, list[dict[str, Any]]], port: int) -> None:
    rows = export[1]
    expected = ask(port, json.dumps({"rows": rows}))[1]["predictions"]

    def one(place: int) -> bool:
        status, found = ask(port, json.dumps({"rows": [rows[place % len(rows)]]}))
        return status == 200 and abs(found["predictions"][0] - expected[place % len(rows)]) < 1e-6

    with ThreadPoolExecutor(8) as clients:
        assert all(clients.map(one, range(100)))


def test_a_bad_row_has_its_own_error(export: tuple[Path, list[dict[str, Any]]], port: int) -> None:
    rows = export[1]
    bad = rows[0] | {"single_0": "x"}
    status, found = ask(port, json.dumps({"rows": [rows[0], bad, 5]}))
    assert status == 200 and found["predictions"][1:] == [None, None] and found["predictions"][0] is not None
    assert found["errors"]["1"] == "single_0='x', expected an integer" and set(found["errors"]) == {"1", "2"}
    status, found = ask(port, json.dumps({"rows": [bad]}))
    assert status == 422 and found["predictions"] == [None]


def hostile(rows: list[dict[str, Any]], chance: random.Random) -> bytes:
    """A body that must not be scored."""
    whole = json.dumps({"rows": rows[:3]}).encode()
    return chance.choice(
        [
            lambda: whole[: chance.randrange(len(whole))],
            lambda: chance.randbytes(chance.randrange(1, 300)),
            lambda: b"[" * chance.randrange(1, 19_000),
            lambda: b'{"rows":' * chance.randrange(1, 2_000),
            lambda: json.dumps({"rows": [{}] * chance.randrange(51, 400)}).encode(),
            lambda: json.dumps({"rows": chance.choice([None, 5, "x", {}, [], True])}).encode(),
            lambda: json.dumps({"rows": [chance.choice([None, 5, "x", [], {}])]}).encode(),
            lambda: json.dumps({"rows": [rows[0] | {"single_0": -1}], "more": 1}).encode(),
            lambda: json.dumps(
                {"rows": [rows[0] | {"single_0": chance.choice([2**70, "1e5", [1], {"a": 1}])}]}
            ).encode(),
            lambda: whole.replace(b'"rows"', b'"\\ud800"'),
            lambda: json.dumps({"rows": [rows[0] | {"single_0": "\ud800"}]}).encode(),
            lambda: json.dumps({"rows": [rows[0] | {"numeric_0": "9" * 19_000 + "x"}]}).encode(),
            lambda: b'{"rows": [{"single_0": NaN}]}',
            lambda: b'{"rows": [{"single_0": ' + b"9" * 5_000 + b"}]}",
            lambda: whole + b" " * 20_001,
        ]
    )()


def test_hostile_requests_get_4xx_and_the_server_stays(export: tuple[Path, list[dict[str, Any]]], port: int) -> None:
    chance, rows = random.Random(1), export[1]
    for _ in range(150):
        body = hostile(rows, chance)
        status, _found = ask(port, body)
        assert 400 <= status < 500, body[:200]
    for method, path, expected in (("GET", "/score", 405), ("POST", "/health", 405), ("GET", "/..%2f", 404)):
        assert ask(port, b"", path, method)[0] == expected
    assert ask(port, json.dumps({"rows": rows[:2]}))[0] == 200


def test_a_client_that_says_one_size_and_goes(export: tuple[Path, list[dict[str, Any]]], port: int) -> None:
    for sent in (b"", b"GET", b"POST /score HTTP/1.1\r\nHost: a\r\nContent-Length: 500\r\n\r\n{", b"\x00" * 100):
        with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
            client.sendall(sent)
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        client.sendall(b"POST /score HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 413")
    assert ask(port, json.dumps({"rows": export[1][:1]}))[0] == 200


def test_health_and_metrics(port: int) -> None:
    assert ask(port, b"", "/health", "GET") == (200, {"status": "ok"})
    status, text = ask(port, b"", "/metrics", "GET")
    counted = dict(line.rsplit(" ", 1) for line in text.decode().splitlines() if not line.startswith("#"))
    assert status == 200 and float(counted['megarec_rows_total{outcome="scored"}']) > 100
    assert float(counted["megarec_request_seconds_count"]) > 100


def test_mistakes_are_one_line(export: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    done = python(ROOT / "tools/serve.py", tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "manifest.json" in done.stderr
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = python(ROOT / "tools/serve.py", export[0], "--port", taken.getsockname()[1])
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "choose another" in done.stderr
