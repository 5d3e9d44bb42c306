"""Commands on other hosts over ssh, quoted for the shell that sshd starts."""

import shlex
from collections.abc import Sequence

CONNECT_SECONDS = 5
OPTIONS = ("-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}")


def on_host(host: str, command: Sequence[str], options: Sequence[str] = OPTIONS) -> list[str]:
    """The local command that runs `command` on a host, word for word.

    Args:
        host: a name that `read_hostfile` let pass, so that ssh cannot take it for an option.
    """
    return ["ssh", *options, host, "exec " + shlex.join(command)]


def keep_alive(seconds: float) -> tuple[str, ...]:
    """Options that end an ssh whose connection has been dead for about so long, instead of never."""
    return ("-o", "ServerAliveInterval=15", "-o", f"ServerAliveCountMax={max(2, round(seconds / 15))}")
