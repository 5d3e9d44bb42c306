"""Several hosts on one machine, for tests and benchmarks: `with Lab(directory, hosts=2, slots=2, mbit=1000) as lab`.

A host is a set of Linux namespaces: its own network (address, link), hostname, /etc/hosts, /dev/shm and process ids,
with an sshd of its own. A bridge joins the hosts; both directions of every link can be shaped to a rate, so that what
crosses hosts costs what it costs in a data centre, in proportion.

The namespaces have no names: they live as long as their first process, which dies with the process that made the lab,
however that ends, and with it every process on the host and every interface. So nothing is left behind, and any number
of labs can run at once.

Needs root and `apt-get install -y openssh-server pdsh iproute2`; `why_not()` says what is missing. It lives here and
not among the tests because benchmarks measure on it too.
"""

import ctypes
import json
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from megarec.errors import UserError

PACKAGES = {
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "pdsh": "pdsh",
    "ip": "iproute2",
    "tc": "iproute2",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "mount": "mount",
    "hostname": "hostname",
}
SEARCH_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"  # where Debian keeps sshd, ip and tc
READY_SECONDS = 20.0
_TRIAL = """\
set -e
hostname lab
mount -t tmpfs run /run
ip link add br0 type bridge
ip link add eth0 type veth peer name eth1
tc qdisc add dev eth0 root tbf rate 1mbit burst 32kb latency 200ms
"""


def why_not() -> str | None:
    """Why there can be no lab on this machine, or None."""
    missing = sorted({package for tool, package in PACKAGES.items() if shutil.which(tool, path=SEARCH_PATH) is None})
    if missing:
        return f"missing packages: apt-get install -y {' '.join(missing)}"
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    trial = subprocess.run(_unshare("sh", "-c", _TRIAL), env=_environment(), capture_output=True, text=True)
    if trial.returncode:
        return f"no namespaces here: {' '.join(trial.stderr.split()) or 'unshare failed'}"
    if any(line.startswith("root:!") for line in Path("/etc/shadow").read_text().splitlines()):
        return "root is locked ('!' in /etc/shadow), and sshd lets no locked account in"
    return None


class NetnsHosts:
    """Hosts host1, host2, ... that reach one another by name and by ssh, as the hosts of a hostfile do.

    Attributes:
        hostfile: lists them with their slots.
        addresses: by host.
    """

    def __init__(self, directory: Path, hosts: int = 2, slots: int = 2, mbit: float = 0) -> None:
        """Args:
        directory: for keys, logs and the hostfile; made if need be.
        mbit: rate of every link, each way, in Mbit/s; 0: unshaped.
        """
        self.directory = directory.resolve()
        self.hostfile = self.directory / "hostfile"
        self.addresses = {f"host{i}": f"10.77.0.{i}" for i in range(1, hosts + 1)}
        self._slots = slots
        self._mbit = mbit
        self._holders: list[subprocess.Popen[bytes]] = []
        self._first: dict[str, int] = {}  # by host: the process that its namespaces belong to, as seen from here

    def __enter__(self) -> "NetnsHosts":
        reason = why_not()
        if reason:
            raise UserError(f"lab of hosts: {reason}")
        try:
            self._write_files()
            switch = self._hold(_unshare("sleep", "infinity"), "switch")
            _enter(switch, "ip link add br0 type bridge && ip link set br0 up")
            self._first["switch"] = switch
            for number, host in enumerate(self.addresses, start=1):
                self._add(host, number)
            self.rate(self._mbit)
            self._wait_for_ssh()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every process of every host; interfaces and mounts go with them."""
        for holder in self._holders:
            holder.kill()
            holder.wait()
        self._holders.clear()

    def start(self, host: str, command: Sequence[str | Path], **options: Any) -> "subprocess.Popen[str]":
        """Start a command on a host, in the working directory of this process; options as of subprocess.Popen."""
        inside = ["nsenter", "--target", str(self._first[host]), *_NAMESPACES, f"--wdns={Path.cwd()}"]
        options.setdefault("env", _environment())
        return subprocess.Popen([*inside, *map(str, command)], text=True, **options)

    def run(self, host: str, command: Sequence[str | Path], **options: Any) -> "subprocess.CompletedProcess[str]":
        """Run a command on a host to its end, with its output captured.

        Raises:
            subprocess.CalledProcessError: it failed.
        """
        with self.start(host, command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) as process:
            output, errors = process.communicate()
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, [*map(str, command)], output, errors)
        return subprocess.CompletedProcess([*map(str, command)], 0, output, errors)

    def rate(self, mbit: float) -> None:
        """Shape every link, each way, to so many Mbit/s; 0: as fast as it goes."""
        for number, host in enumerate(self.addresses, start=1):
            for process, device in ((self._first[host], "eth0"), (self._first["switch"], f"port{number}")):
                _enter(process, f"tc qdisc del dev {device} root 2>/dev/null || true")
                if mbit:
                    burst = max(32_000, round(mbit * 1e6 / 8 * 0.002))  # bytes; 2 ms: what timers need to keep the rate
                    shape = f"tbf rate {round(mbit * 1000)}kbit burst {burst} latency 200ms"
                    _enter(process, f"tc qdisc add dev {device} root {shape}")

    def link(self, host: str, up: bool) -> None:
        """Set a host's interface up or down."""
        _enter(self._first[host], f"ip link set eth0 {'up' if up else 'down'}")

    def bytes(self) -> dict[str, tuple[int, int]]:
        """Bytes sent and received over each host's link since it started, headers included."""
        counted = {}
        for host in self.addresses:
            (link,) = json.loads(_enter(self._first[host], "ip -json -statistics link show eth0"))
            counted[host] = (link["stats64"]["tx"]["bytes"], link["stats64"]["rx"]["bytes"])
        return counted

    def processes(self, host: str) -> dict[int, list[str]]:
        """Command lines of what runs on a host, by the process id there."""
        found = {}
        for path in Path(f"/proc/{self._first[host]}/root/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):  # it ended between the listing and the reading
                found[int(path.parent.name)] = path.read_text(errors="replace").rstrip("\0").split("\0")
        return found

    def _hold(self, command: list[str], name: str) -> int:
        """Start the first process of new namespaces; returns its id."""
        with (self.directory / f"{name}.log").open("wb") as log:
            holder = subprocess.Popen(
                command, env=_environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=_die_with_me
            )
        self._holders.append(holder)
        children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children")
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline and holder.poll() is None:
            first = children.read_text().split()
            if first and Path(f"/proc/{first[0]}/ns/net").readlink() != Path("/proc/self/ns/net").readlink():
                return int(first[0])
            time.sleep(0.01)
        raise self._failed(name)

    def _add(self, host: str, number: int) -> None:
        address, switch = self.addresses[host], self._first["switch"]
        files = shlex.quote(str(self.directory))
        first = self._hold(_unshare("sh", "-c", f". {files}/first.sh", host, address), host)
        self._first[host] = first
        _enter(switch, f"ip link add port{number} type veth peer name eth0 netns {first}")
        _enter(switch, f"ip link set port{number} master br0 up")
        _enter(first, f"ip addr add {address}/24 dev eth0 && ip link set eth0 up && ip link set lo up")

    def _wait_for_ssh(self) -> None:
        for host in self.addresses:
            deadline = time.monotonic() + READY_SECONDS
            while self.start(
                "host1", ["ssh", "-o", "ConnectTimeout=2", host, "true"], stderr=subprocess.DEVNULL
            ).wait():
                if time.monotonic() > deadline:
                    raise self._failed(host)
                time.sleep(0.05)

    def _failed(self, name: str) -> UserError:
        said = (self.directory / f"{name}.log").read_text(errors="replace").split()
        return UserError(f"lab of hosts: {name} did not start: {' '.join(said) or 'it said nothing'}")

    def _write_files(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        table = "".join(f"{address} {host}\n" for host, address in self.addresses.items())
        files = {
            "hostfile": "".join(f"{host} slots={self._slots}\n" for host in self.addresses),
            "hosts": "127.0.0.1 localhost\n" + table,
            "ssh_config": _SSH.format(directory=self.directory),
            "sshd_config": _SSHD.format(directory=self.directory),
            "first.sh": _FIRST.format(directory=shlex.quote(str(self.directory))),
        }
        for name, text in files.items():
            (self.directory / name).write_text(text)
        for key in ("identity", "hostkey"):
            path = self.directory / key
            if not path.exists():
                subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)


_NAMESPACES = ("--net", "--uts", "--mount", "--pid")

_SSH = """\
Host *
  IdentityFile "{directory}/identity"
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""

_SSHD = """\
HostKey "{directory}/hostkey"
AuthorizedKeysFile "{directory}/identity.pub"
PermitRootLogin yes
PasswordAuthentication no
StrictModes no
UsePAM no
UseDNS no
MaxStartups 200
PidFile none
"""

# First process of a host, as `sh -c '. first.sh' HOST ADDRESS`: mounts of its own, then sshd in its place.
_FIRST = """\
set -e
hostname "$0"
mount -t tmpfs shm /dev/shm
mount --bind {directory}/hosts /etc/hosts
mount --bind {directory}/ssh_config /etc/ssh/ssh_config
mount -t tmpfs run /run
mkdir /run/sshd
until ip -oneline address show | grep -q "$1"; do sleep 0.02; done
exec "$(command -v sshd)" -D -e -f {directory}/sshd_config -o "ListenAddress=$1"
"""


def _unshare(*command: str) -> list[str]:
    return ["unshare", *_NAMESPACES, "--fork", "--mount-proc", "--kill-child", *command]


def _environment() -> dict[str, str]:
    return {**os.environ, "PATH": SEARCH_PATH}


def _enter(process: int, command: str) -> str:
    """Run a shell command in the network namespace of a process; returns what it prints."""
    inside = ["nsenter", "--target", str(process), "--net", "sh", "-c", command]
    done = subprocess.run(inside, env=_environment(), capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"lab of hosts: {command!r}: {' '.join(done.stderr.split())}")
    return done.stdout


_PR_SET_PDEATHSIG = 1


def _die_with_me() -> None:
    """In a child before exec: the kernel kills it when its parent ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
