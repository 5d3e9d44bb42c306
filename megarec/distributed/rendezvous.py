"""Where the ranks of a job meet: a store that listens at the master's address alone.

torch.distributed's own store listens on every interface of the first host, without a password.
"""

import errno
import ipaddress
import os
import random
import socket
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from megarec.errors import UserError

BACKLOG = 4096  # every rank of a large job connects at once
MOST_RANKS = 1_000_000
PORTS = range(20_000, 32_000)  # below those of outgoing connections, which might take it before rank 0 does


def check_variables(environment: Mapping[str, str]) -> None:
    """Whether what a launcher says of a rank makes sense, before anything waits for other ranks.

    Raises:
        UserError: a variable is missing, or is not what it should be; names it, its value and the remedy.
    """
    if "RANK" not in environment:
        if environment.get("WORLD_SIZE", "1") != "1":
            raise _wrong(environment, "WORLD_SIZE", "RANK beside it")
        return
    ranks = _number(environment, "WORLD_SIZE", 1, MOST_RANKS)
    _number(environment, "RANK", 0, ranks - 1)
    _number(environment, "LOCAL_RANK", 0, ranks - 1)
    for optional in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        if environment.get(optional):
            _number(environment, optional, 1, ranks)
    _number(environment, "MASTER_PORT", 1, 65535)
    try:
        socket.getaddrinfo(environment.get("MASTER_ADDR") or None, 1, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError, ValueError):
        raise _wrong(environment, "MASTER_ADDR", "a name or address that this host can resolve") from None
    if not environment.get("MASTER_ADDR"):
        raise _wrong(environment, "MASTER_ADDR", "the address of rank 0's host")


def _number(environment: Mapping[str, str], name: str, least: int, most: int) -> int:
    text = environment.get(name, "")
    if not (text.isascii() and text.isdigit() and len(text) < 10 and least <= int(text) <= most):
        raise _wrong(environment, name, f"a whole number from {least} to {most}")
    return int(text)


def _wrong(environment: Mapping[str, str], name: str, expected: str) -> UserError:
    found = f"={environment[name][:100]!r}" if name in environment else " is not set"
    given = "RANK is set" if "RANK" in environment else "RANK is not set"
    return UserError(
        f"{name}{found}, while {given}: expected {expected}; let deepspeed or torchrun set these variables, or unset "
        "RANK and WORLD_SIZE for a run of one rank"
    )


def store_at(address: str, port: int, ranks: int, master: bool, timeout: timedelta) -> dist.TCPStore:
    """A store for a job's ranks; the master's part listens at the address, or, if this host does not have it (behind a
    translated network), as torch would.

    Raises:
        UserError: something else listens there.
    """
    return _store(address, port, ranks, master, timeout, _listen(address, port) if master else None)


def _store(
    address: str, port: int, ranks: int, master: bool, timeout: timedelta, listening: socket.socket | None
) -> dist.TCPStore:
    return dist.TCPStore(
        address,
        port,
        ranks,
        master,
        timeout,
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=None if listening is None else listening.detach(),
    )


def store_of_one(timeout: timedelta) -> tuple[dist.Store, int]:
    """The store of a job of one rank, at a port of the loopback that is free, and the port.

    Raises:
        UserError: no port is free.
    """
    server = _free_server()  # listens from here on: no other job can take the port in between
    port: int = server.getsockname()[1]
    return dist.PrefixStore("megarec", _store("127.0.0.1", port, 1, True, timeout, server)), port


def store_of_launcher(environment: Mapping[str, str], timeout: timedelta) -> dist.Store | None:
    """The store of a job that was started with the usual variables; None where torchrun's agents have one already."""
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    rank, ranks = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    return dist.PrefixStore("megarec", store_at(address, port, ranks, rank == 0, timeout))


def keep_to_loopback(environment: Mapping[str, str]) -> None:
    """Have gloo, which listens on the interface of the host's name, keep to the loopback one if the master is there."""
    with suppress(ValueError):
        master = environment.get("MASTER_ADDR", "")
        if ipaddress.ip_address("127.0.0.1" if master == "localhost" else master).is_loopback:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def _listen(address: str, port: int) -> socket.socket | None:
    family, kind, protocol, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    server = socket.socket(family, kind, protocol)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server.bind(place)
    except OSError as error:
        server.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} of {address} is taken, perhaps by another job: give another master port "
                            "(--master_port to deepspeed and torchrun)") from None  # fmt: skip
        if error.errno != errno.EADDRNOTAVAIL:
            raise
        return None
    server.listen(BACKLOG)
    return server


def free_port() -> int:
    """A port of this machine's loopback for a master to listen on soon."""
    with _free_server() as server:
        port: int = server.getsockname()[1]
        return port


def _free_server() -> socket.socket:
    for port in random.SystemRandom().sample(PORTS, 100):
        with suppress(OSError):
            return socket.create_server(("127.0.0.1", port), backlog=BACKLOG)
    raise UserError("no free port: 100 of 20000 to 31999 on 127.0.0.1 are taken; end what listens there")
