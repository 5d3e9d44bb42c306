"""The preflight's program on every host, sent over ssh as source: standard library only, nothing is installed.

Reads requests, a JSON object a line, from standard input; answers each with a JSON object a line.
"""

import hashlib
import importlib.metadata
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONNECT_SECONDS = 3.0
GPU_SECONDS = 30.0  # a driver that is not kept loaded is slow
GPU_FACTS = ("name", "driver_version", "memory.total", "memory.used", "ecc.errors.uncorrected.volatile.total")
LISTENING: list[socket.socket] = []


def facts(
    directory: str, root: str, files: list[str], packages: list[str], output: str, peers: list[str]
) -> dict[str, Any]:
    """Facts that must be equal everywhere, and a run's needs of a host; files and output relative to `directory`."""
    there = Path(directory).is_dir()
    if there:
        os.chdir(directory)
    return {
        "hostname": socket.gethostname(),
        "python": ".".join(map(str, sys.version_info[:3])),
        "directory": there,
        "code": hash_of_code(root),
        "files": {path: hash_of_file(path) for path in files},
        "packages": {name: version_of(name) for name in packages},
        "output": state_of(output),
        "addresses": {peer: address_of(peer) for peer in peers},
        "interfaces": interfaces(),
        "gpus": gpus(),
        "shared_memory": shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else None,
        "infiniband": sorted(path.name for path in Path("/sys/class/infiniband").glob("*")),
    }


def clock() -> dict[str, Any]:
    return {"time": time.time()}


def route(address: str) -> dict[str, Any]:
    """The interface and own address over which this host reaches an address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))
        except OSError as error:
            return {"error": error.strerror}
        own = probe.getsockname()[0]
    return {"address": own, "interface": next((name for name, at in interfaces().items() if at == own), None)}


def listen(address: str, port: int) -> dict[str, Any]:
    """Listen until this process ends; port 0: a free one."""
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server.bind((address, port))
        server.listen(4096)
    except OSError as error:
        return {"error": error.strerror}
    LISTENING.append(server)
    return {"port": server.getsockname()[1]}


def connect(targets: list[tuple[str, int]]) -> dict[str, Any]:
    """Try each (address, port): None, or why it cannot be reached."""
    tried: list[str | None] = []
    for address, port in targets:
        try:
            socket.create_connection((address, port), timeout=CONNECT_SECONDS).close()
            tried.append(None)
        except OSError as error:
            tried.append(error.strerror or str(error))
    return {"tried": tried}


def gpus() -> dict[str, Any]:
    """NVIDIA's GPUs of this host as its driver shows them; `error` where the driver is there and does not answer."""
    if not Path("/dev/nvidiactl").exists() and shutil.which("nvidia-smi") is None:
        return {"found": []}
    query = ["nvidia-smi", f"--query-gpu={','.join(GPU_FACTS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=GPU_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"found": [], "error": str(error)}
    if done.returncode:
        return {"found": [], "error": " ".join((done.stdout + done.stderr).split())[:200]}
    rows = [[word.strip() for word in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    return {"found": [dict(zip(GPU_FACTS, row, strict=False)) for row in rows]}


def hash_of_code(root: str) -> str | None:
    """Of every Python file of megarec/, names included; None where there is none."""
    digest, found = hashlib.sha256(), False
    for path in sorted(Path(root, "megarec").rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0{hash_of_file(str(path))}\n".encode())
        found = True
    return digest.hexdigest() if found else None


def hash_of_file(path: str) -> str | None:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:
        return None


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def state_of(output: str) -> dict[str, Any]:
    """Free bytes and writability of the nearest directory above that exists."""
    path = Path(output).resolve()
    while not path.is_dir():
        path = path.parent
    return {"path": str(path), "free": shutil.disk_usage(path).free, "writable": os.access(path, os.W_OK)}


def address_of(host: str) -> str | None:
    try:
        return str(socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return None


def interfaces() -> dict[str, str]:
    """IPv4 addresses by network interface (one of each)."""
    import fcntl
    import struct

    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(any_socket.fileno(), 0x8915, struct.pack("256s", name.encode()))  # SIOCGIFADDR
            except OSError:
                continue  # an interface without an IPv4 address
            found[name] = socket.inet_ntoa(answer[20:24])
    return found


REQUESTS: dict[str, Callable[..., dict[str, Any]]] = {
    "facts": facts,
    "clock": clock,
    "route": route,
    "listen": listen,
    "connect": connect,
}


def serve() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(REQUESTS[request.pop("ask")](**request)), flush=True)
