import socket

import pytest

from megarec.distributed import rendezvous
from megarec.errors import UserError


def test_a_free_port_lies_below_those_of_outgoing_connections() -> None:
    with socket.create_server(("127.0.0.1", rendezvous.free_port())) as server:
        assert server.getsockname()[1] in rendezvous.PORTS


def test_without_a_free_port_there_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(rendezvous, "PORTS", [server.getsockname()[1]] * 100)
        with pytest.raises(UserError, match="no free port"):
            rendezvous.free_port()
