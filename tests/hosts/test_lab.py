"""The lab itself: hosts that look and cost like hosts, and leave nothing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.processes import lives
from tools.benchmarks.testbed import NetnsHosts

RECEIVE = """
import socket, time
server = socket.create_server(("", 5000))
print("listening", flush=True)
connection = server.accept()[0]
started, count = time.monotonic(), 0
while data := connection.recv(1 << 20):
    count += len(data)
print(count / (time.monotonic() - started))
"""


def send(lab: NetnsHosts, count: int) -> float:
    """Bytes/s from host1 to host2."""
    with lab.start("host2", [sys.executable, "-c", RECEIVE], stdout=subprocess.PIPE) as receiver:
        assert receiver.stdout is not None
        receiver.stdout.readline()
        code = f"import socket; socket.create_connection(('host2', 5000)).sendall(bytes({count}))"
        lab.run("host1", [sys.executable, "-c", code])
        return float(receiver.stdout.readline())


def test_hosts_have_names_addresses_and_shared_memory_of_their_own(lab: NetnsHosts) -> None:
    (Path("/dev/shm") / "seen-by-the-machine").touch()
    try:
        script = "hostname; hostname -I; ls /dev/shm; ssh host1 hostname"
        assert lab.run("host2", ["sh", "-c", script]).stdout.split() == ["host2", "10.77.0.2", "host1"]
    finally:
        (Path("/dev/shm") / "seen-by-the-machine").unlink()
    assert lab.hostfile.read_text() == "host1 slots=2\nhost2 slots=2\n"
    assert lab.run("host1", ["pwd"]).stdout.strip() == str(Path.cwd())


def test_links_are_shaped_counted_and_can_be_cut(lab: NetnsHosts) -> None:
    before = lab.bytes()
    lab.rate(80)
    try:
        assert send(lab, 8_000_000) == pytest.approx(10e6, rel=0.25)
    finally:
        lab.rate(0)
    after = lab.bytes()
    assert 8e6 < after["host1"][0] - before["host1"][0] < 8.8e6
    assert 8e6 < after["host2"][1] - before["host2"][1] < 8.8e6
    lab.link("host2", up=False)
    try:
        with pytest.raises(subprocess.CalledProcessError):
            lab.run("host1", ["ssh", "-o", "ConnectTimeout=1", "host2", "true"])
    finally:
        lab.link("host2", up=True)
    assert lab.run("host1", ["ssh", "-o", "ConnectTimeout=5", "host2", "hostname"]).stdout == "host2\n"


def test_a_lab_leaves_nothing_even_when_its_maker_is_killed(lab: NetnsHosts, tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from tools.benchmarks.testbed import NetnsHosts\n"
        "with NetnsHosts(Path(sys.argv[1]), hosts=1) as lab:\n"
        "    lab.start('host1', ['sleep', sys.argv[2]]); print('up', flush=True); time.sleep(1000)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    seconds = f"1000.{os.getpid()}"  # to be found by
    command = [sys.executable, "-c", code, str(tmp_path / "lab"), seconds]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as maker:
        assert maker.stdout is not None and maker.stdout.readline() == "up\n"
        started = psutil.Process(maker.pid).children(recursive=True)
        named = [(process.name(), process) for process in started]  # read while all of them live
        assert any("sshd" in name for name, _ in named)
        maker.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs([process for name, process in named if name != "nsenter"], timeout=60)
    assert not [process for process in alive if lives(process)]
    deadline = time.monotonic() + 60
    while any(process.info["cmdline"] == ["sleep", seconds] for process in psutil.process_iter(["cmdline"])):
        assert time.monotonic() < deadline
        time.sleep(0.1)
