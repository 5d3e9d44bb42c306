"""How the variables of .deepspeed_env reach the ranks: a file of mode 600 in the home directory of each host.

They hold keys and tokens, and every user of a host can read command lines (DeepSpeed's launcher makes three a
rank). The text goes over ssh's standard input. The file is named after the start of the job and removed at
its end; ranks read it as they start.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from megarec.errors import UserError
from megarec.files import read_object
from megarec.launching.hosts import CONNECT_SECONDS, on_ssh_host

_SECONDS = 30.0 + CONNECT_SECONDS
# Several hosts may share one home directory: the second one finds the file there.
_WRITE = """
import os, pathlib, sys
path = pathlib.Path.home() / sys.argv[1]
part = path.with_name(f"{path.name}.{os.uname().nodename}-{os.getpid()}")
with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
    file.write(sys.stdin.buffer.read())
part.replace(path)
"""
_REMOVE = "import pathlib, sys; (pathlib.Path.home() / sys.argv[1]).unlink(missing_ok=True)"


def file_of(job: str) -> Path:
    """Where the variables of a start of a job are, on this host."""
    return Path.home() / f".megarec-{job}"


def read_variables(job: str) -> dict[str, str]:
    """On a host of the job: the variables, none where there is no file."""
    path = file_of(job)
    return read_object(path, "the variables of .deepspeed_env") if path.exists() else {}


@contextmanager
def variables_on(hosts: Sequence[str] | None, job: str, variables: dict[str, str]) -> Iterator[None]:
    """Inside, the variables are on the hosts (None: on this machine); without any, nothing is written.

    Raises:
        UserError: a host refuses them; names it.
    """
    if not variables:
        yield
        return
    try:
        for host, process in _started(hosts, _WRITE, job):
            _, errors = process.communicate(json.dumps(variables).encode(), timeout=_SECONDS)
            if process.returncode:
                lines = errors.decode(errors="replace").strip().splitlines()
                reason = lines[-1] if lines else f"exit code {process.returncode}"
                raise UserError(
                    f"{host or 'this machine'}: the variables of .deepspeed_env cannot be written to "
                    f"~/{file_of(job).name} there ({reason}); the ranks need a home directory that can be written"
                )
        yield
    finally:
        for _, process in _started(hosts, _REMOVE, job):
            with suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=CONNECT_SECONDS)
            process.kill()  # a host that is gone keeps the file, which is its user's alone
            process.wait()


def _started(hosts: Sequence[str] | None, code: str, job: str) -> list[tuple[str | None, "subprocess.Popen[bytes]"]]:
    command = [sys.executable, "-P", "-c", code, file_of(job).name]
    pipe = subprocess.PIPE
    everywhere = [(None, command)] if hosts is None else [(host, on_ssh_host(host, command)) for host in hosts]
    return [
        (host, subprocess.Popen(argv, stdin=pipe, stdout=subprocess.DEVNULL, stderr=pipe, cwd="/"))
        for host, argv in everywhere
    ]
