import socket

import pytest

from megarec.errors import UserError
from megarec.parallel import ports


def test_a_free_port_lies_below_those_of_outgoing_connections() -> None:
    with socket.create_server(("127.0.0.1", ports.free_port())) as server:
        assert server.getsockname()[1] in ports.PORTS


def test_without_a_free_port_there_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(ports, "PORTS", [server.getsockname()[1]] * 100)
        with pytest.raises(UserError, match="no free port"):
            ports.free_port()
