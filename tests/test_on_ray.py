"""Preparation and sweeps on a Ray cluster: what they give elsewhere, also when a node dies in the middle, or all do."""

import multiprocessing
import queue
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pyarrow import parquet

from megarec import ray_driver
from megarec.commands import prepare_data
from megarec.data.preparation import encode, table_reader
from megarec.data.preparation.prepare import MaxBad, prepare_spec
from megarec.data.sources.criteo import criteo_spec, write_made_up
from megarec.errors import UserError
from megarec.ray_cluster import Order, RayCluster, Start, TasksLost
from tests import ray_nodes
from tests.ray_nodes import TwoNodes, held, refuses, wait_for
from tests.scaling.studies import write_study
from tests.scaling.test_sweep import MODELS, RATES, run_here, table


@pytest.fixture(scope="module")
def cluster() -> Iterator[TwoNodes]:
    pytest.importorskip("ray", reason="needs the extra megarec[ray]")
    with tempfile.TemporaryDirectory(prefix="ray-") as directory, ray_nodes.two_nodes(Path(directory)) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    directory = tmp_path_factory.mktemp("days")
    for seed, (name, rows) in enumerate({"train": 3000, "valid": 300, "test": 300}.items()):
        write_made_up(directory / name, rows, seed, most_values=120)
    return {name: [directory / name] for name in ("train", "valid", "test")}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many units and shards; what is cut is cut by the one process that all engines have."""
    monkeypatch.setattr(table_reader, "UNIT_BYTES", 30_000)
    monkeypatch.setattr(encode, "ROWS_PER_SHARD", 400)


def prepare(files: dict[str, list[Path]], output: Path, workers: int | RayCluster) -> dict[str, bytes]:
    prepare_spec(criteo_spec("c"), "criteo", files, output, None, workers, MaxBad())
    return content(output)


def content(output: Path) -> dict[str, bytes]:
    return {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}


def test_results_come_in_order_and_what_a_node_took_with_it_runs_again(cluster: TwoNodes, tmp_path: Path) -> None:
    lost: list[str] = []
    cluster.complete()
    with RayCluster(cluster.address).sharing(tmp_path, lost.append) as ray:
        assert ray.places() == 2 and ray.places(cores=2) == ray.places(gpus=1) == 0
        results = ray.run(held, [(tmp_path, number) for number in range(5)])
        found: list[Any] = []
        reader = threading.Thread(target=lambda: found.extend(results))
        reader.start()
        wait_for(tmp_path, "start-*", 2)
        cluster.kill_second()
        (tmp_path / "go").touch()
        reader.join()
        assert found == [((tmp_path, number), -number) for number in range(5)]
        assert len(list(tmp_path.glob("start-*"))) == 6 and lost == ["a task: its worker or node died; it runs again"]
        with pytest.raises(KeyError, match="7"):
            list(ray.run(refuses, [7]))


@pytest.mark.slow  # another cluster that loses nodes; the first test here has one
@pytest.mark.usefixtures("small")
def test_a_node_dies_in_the_middle(
    cluster: TwoNodes, files: dict[str, list[Path]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def kill() -> None:
        wait_for(tmp_path, ".ray.partial-work/pieces/*.json", 3)
        cluster.kill_second()

    cluster.complete()
    killer = threading.Thread(target=kill)
    killer.start()
    on_ray = prepare(files, tmp_path / "ray", RayCluster(cluster.address))
    killer.join()
    assert on_ray == prepare(files, tmp_path / "processes", 2) and len(on_ray) > 30
    assert sorted(path.name for path in tmp_path.iterdir()) == ["processes", "ray"]
    captured = capfd.readouterr()
    lines = [line for line in captured.err.splitlines() if " left" not in line]
    assert captured.out == "" and set(lines) <= {"a task: its worker or node died; it runs again"}


def test_a_bad_row_and_a_directory_that_is_not_shared_are_reported_as_without_ray(
    cluster: TwoNodes, files: dict[str, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad").write_bytes(files["train"][0].read_bytes() + b"x\n")
    bad = {**files, "train": [tmp_path / "bad"]}
    messages = []
    for workers in (1, RayCluster(cluster.address)):
        with pytest.raises(UserError) as error:
            prepare(bad, tmp_path / "out", workers)
        messages.append(str(error.value))
    assert messages[0] == messages[1] and "row 3000" in messages[0]
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]
    monkeypatch.setattr(
        RayCluster, "_token", property(lambda self: Path("/not/there"), lambda self, value: None), raising=False
    )
    monkeypatch.setattr(Path, "touch", lambda self: None)
    with pytest.raises(
        UserError, match=r"node .* does not see /not: the directory of the work must be on a file system"
    ):
        prepare(files, tmp_path / "out", RayCluster(cluster.address))


@pytest.mark.slow  # another cluster that loses nodes; the first test here has one
def test_a_sweep_gives_the_same_table_when_a_node_dies(
    cluster: TwoNodes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.complete()
    path = write_study(tmp_path, models={"wukong-1": MODELS["wukong-1"]}, learning_rates=RATES)
    run_here(path, tmp_path / "here", "--jobs", "2")

    def kill() -> None:
        wait_for(tmp_path, "ray/runs/*/lock", 2)  # a run on each node, which has not loaded its config yet
        cluster.kill_second()

    killer = threading.Thread(target=kill)
    killer.start()
    run_here(path, tmp_path / "ray", "--engine", "ray", "--address", cluster.address)
    killer.join()
    assert table(tmp_path / "ray") == table(tmp_path / "here") and len(table(tmp_path / "ray")) == 3
    (lost,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("LOST"))
    assert lost.startswith("LOST wukong-") and lost.endswith(": its worker or node died; it runs again")
    hosts = parquet.read_table(tmp_path / "ray/runs.parquet", columns=["host"])["host"].to_pylist()
    assert set(hosts) == {socket.gethostname()}
    assert not list((tmp_path / "ray").glob(".ray-*")) and not (tmp_path / "ray/ray.log").exists()


@pytest.mark.slow  # another cluster that loses nodes; the first test here has one
@pytest.mark.usefixtures("small")
def test_the_whole_cluster_goes(
    cluster: TwoNodes, files: dict[str, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line; what is finished stays, and the same preparation goes on with it. The last test with the cluster."""
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "2")
    pieces = tmp_path / ".out.partial-work/pieces"

    def kill() -> None:
        wait_for(tmp_path, ".out.partial-work/pieces/*.json", 3)
        cluster.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(TasksLost, match=r"the cluster cannot be reached any more; .* goes on once .*\.log has more$"):
        prepare(files, tmp_path / "out", RayCluster(cluster.address))
    killer.join()
    done = {path: path.stat().st_mtime_ns for path in pieces.glob("*.json")}
    with monkeypatch.context() as patch:
        patch.setattr("megarec.data.preparation.work.shutil.rmtree", lambda *_, **__: None)
        after = prepare(files, tmp_path / "out", 1)
    assert len(done) >= 3 and {path: path.stat().st_mtime_ns for path in done} == done
    assert after == prepare(files, tmp_path / "whole", 1)
    with pytest.raises(UserError, match=rf"--address {cluster.address}: no Ray cluster can be used: .*refused"):
        prepare(files, tmp_path / "other", RayCluster(cluster.address))


class FakeRay:
    """A cluster on which every task is lost, or for which there is no node."""

    class Lost(Exception):
        pass

    class Raised(Exception):
        pass

    exceptions = SimpleNamespace(RayError=Lost, RayTaskError=Raised)

    def __init__(self, nodes: list[dict[str, Any]]) -> None:
        self._nodes = nodes

    def nodes(self) -> list[dict[str, Any]]:
        return self._nodes

    def remote(self, *_: object, **__: object) -> Any:
        return FakeRay(self._nodes)  # a function, its options, or a reference

    options = remote

    def wait(self, references: list[Any], **_: object) -> tuple[list[Any], list[Any]]:
        return (references, []) if self._nodes else ([], references)

    def get(self, _: object) -> None:
        raise self.Lost("The worker died.")


@pytest.mark.parametrize(
    ("cores", "expected"),
    [
        (1, [*["again"] * 3, "a task was lost 4 times (too little memory?); the last time: The worker died."]),
        (0, ["no node of the cluster has 2 core(s) and 1 GPU(s), which a task needs"]),
    ],
)
def test_what_cannot_be_carried_out_ends_the_work(
    cores: int, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_driver, "_PATIENCE", 0.0 if not cores else 60.0)
    monkeypatch.setattr(ray_driver._Driver, "_look_at_nodes", lambda self: None)
    nodes = [{"Alive": True, "Resources": {"CPU": cores}}] if cores else []
    ours, theirs = multiprocessing.Pipe()
    orders: queue.Queue[Any] = queue.Queue()
    orders.put(Order(1, "a task", b"", 2.0, 1.0))
    ray_driver._Driver(FakeRay(nodes), theirs, orders, Start(None, "", "", ())).work()
    assert ours.recv() == ("nodes", [{"CPU": cores}] if cores else [])
    heard = []
    while ours.poll():
        heard.append(ours.recv())
    assert [text if kind == "lost" else kind for kind, text in heard] == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--address", "here:1"], "--address is of a Ray cluster; give --engine ray as well"),
        (["--engine", "ray", "--workers", "2"], "--workers is for this machine; keep one"),
        (["--engine", "ray", "--address", "ray://here:1"], "--address ray://here:1: expected HOST:PORT or auto"),
    ],
)
def test_options_that_do_not_go_together(
    options: list[str],
    message: str,
    files: dict[str, list[Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("megarec.ray_cluster.importlib.util.find_spec", lambda name: name)
    assert message in refused(options, files, tmp_path, monkeypatch, capsys)


def test_without_the_extra_it_says_what_to_install(
    files: dict[str, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("megarec.ray_cluster.importlib.util.find_spec", lambda name: None)
    message = refused(["--engine", "ray"], files, tmp_path, monkeypatch, capsys)
    assert message.startswith("error: --engine ray needs Ray, which is not installed: pip install ray==")
    assert message.count("\n") == 1 and not list(tmp_path.iterdir())


def refused(
    options: list[str],
    files: dict[str, list[Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> str:
    named = [word for split, paths in files.items() for word in (f"--{split}", str(paths[0]))]
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", "criteo", *named, "--output", str(tmp_path / "o"), *options])
    with pytest.raises(SystemExit) as end:
        prepare_data.main()
    assert end.value.code == 2
    return capsys.readouterr().err
