import os
import socket
from datetime import timedelta

import psutil
import pytest

from megarec.distributed.rendezvous import PORTS, free_port, keep_to_loopback, store_at, store_of_launcher, store_of_one
from megarec.errors import UserError

SHORT = timedelta(seconds=20)


def listening(port: int) -> list[str]:
    found = psutil.Process().net_connections("inet")
    return [c.laddr.ip for c in found if c.laddr.port == port and c.status == psutil.CONN_LISTEN]


def test_the_store_listens_at_the_masters_address_alone() -> None:
    port = free_port()
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    master = store_of_launcher({**variables, "RANK": "0"}, SHORT)
    other = store_of_launcher({**variables, "RANK": "1"}, SHORT)
    assert master is not None and other is not None
    other.set("greeting", "hello")
    assert master.get("greeting") == b"hello"
    assert listening(port) == ["127.0.0.1"]


def test_an_address_that_no_interface_has_is_served_as_torch_would() -> None:
    port = free_port()
    with pytest.raises(Exception, match=r"(?i)timed? ?out|connect"):
        store_at("192.0.2.1", port, 1, True, timedelta(seconds=1))  # a documentation address: nobody answers there


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(UserError, match="is taken"):
        store_at("127.0.0.1", server.getsockname()[1], 1, True, SHORT)


def test_torchruns_agents_have_a_store_already() -> None:
    assert store_of_launcher({"TORCHELASTIC_USE_AGENT_STORE": "True"}, SHORT) is None


@pytest.mark.parametrize(
    ("master", "interface"),
    [("127.0.0.1", "lo"), ("localhost", "lo"), ("::1", "lo"), ("10.0.0.7", None), ("node-1", None)],
)
def test_gloo_keeps_to_loopback_where_the_master_does(
    monkeypatch: pytest.MonkeyPatch, master: str, interface: str | None
) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    keep_to_loopback({"MASTER_ADDR": master})
    assert os.environ.get("GLOO_SOCKET_IFNAME") == interface
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)


def test_the_users_interface_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    keep_to_loopback({"MASTER_ADDR": "127.0.0.1"})
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"


def test_a_job_of_one_rank_listens_before_its_port_is_named() -> None:
    store, port = store_of_one(SHORT)
    store.set("key", "value")
    assert port in PORTS and store.get("key") == b"value"
    with pytest.raises(UserError, match=f"port {port} of 127.0.0.1 is taken"):
        store_at("127.0.0.1", port, 2, True, SHORT)
    assert store_at("127.0.0.1", port, 1, False, SHORT).get("megarec/key") == b"value"
