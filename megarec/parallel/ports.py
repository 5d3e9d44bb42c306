"""A port for a job on one machine."""

import random
import socket
from contextlib import suppress

from megarec.errors import UserError

PORTS = range(20_000, 32_000)  # below those of outgoing connections, which might take it before rank 0 does


def free_port() -> int:
    """A port of this machine's loopback for a master to listen on soon."""
    for port in random.SystemRandom().sample(PORTS, 100):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise UserError("no free port: 100 of 20000 to 31999 on 127.0.0.1 are taken; end what listens there")
