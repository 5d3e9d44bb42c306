"""The hosts of a job: their names, how they are reached, the variables of their ranks.

hostfile         of the deepspeed launcher: a line a host, `NAME slots=N`; # starts a comment
.deepspeed_env   variables for every rank of a job, a line each, KEY=VALUE and nothing else (variables.py)
ssh              commands on other hosts, quoted for the shell that sshd starts
"""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megarec.errors import UserError

CONNECT_SECONDS = 5
MOST_BYTES = 1 << 20  # of a hostfile: 30,000 hosts
OPTIONS = ("-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}")
FILE_NAME = ".deepspeed_env"
_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# pdsh expands brackets, commas and more in names, ssh takes a leading dash for an option, and a shell sees them all.
_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?")
_LINE = re.compile(r"(?P<name>\S+)\s+slots=(?P<slots>[0-9]{1,6})")


def on_ssh_host(host: str, command: Sequence[str], options: Sequence[str] = OPTIONS) -> list[str]:
    """The local command that runs `command` on a host, word for word.

    Args:
        host: a name that `read_hostfile` let pass, so that ssh cannot take it for an option.
    """
    return ["ssh", *options, host, "exec " + shlex.join(command)]


def keep_alive(seconds: float) -> tuple[str, ...]:
    """Options that end an ssh whose connection has been dead for longer than that, instead of never.

    The last answer may be 15 s older than the fault: one more probe lets ranks that wait that long report first.
    """
    return ("-o", "ServerAliveInterval=15", "-o", f"ServerAliveCountMax={max(2, round(seconds / 15)) + 1}")


def read_environment(directories: list[Path]) -> dict[str, str]:
    """The variables of the files in these directories, the last one's first in rank.

    Raises:
        UserError: a line that is not KEY=VALUE, with file and line number: DeepSpeed's launcher would fail on it.
    """
    variables: dict[str, str] = {}
    for directory in directories:
        path = directory / FILE_NAME
        if not path.exists():
            continue
        for number, line in enumerate(_lines_of(path, "it holds lines of KEY=VALUE"), start=1):
            key, separator, value = line.partition("=")
            if not separator or _KEY.fullmatch(key) is None or "\0" in value:
                raise UserError(
                    f"{path}:{number}: {line!r}: expected KEY=VALUE; no comments, no blank lines, no 'export'"
                )
            variables[key] = value
    return variables


def accelerator() -> str:
    """What DeepSpeed would find out by itself, with a warning."""
    return "cuda" if Path("/dev/nvidiactl").exists() else "cpu"


@dataclass(frozen=True)
class Host:
    """A host and the ranks that run on it: slots of them, from first_rank on."""

    name: str
    slots: int
    first_rank: int

    @property
    def ranks(self) -> str:
        """For messages: "rank 4", "ranks 4-7"."""
        last = self.first_rank + self.slots - 1
        return f"rank {last}" if self.slots == 1 else f"ranks {self.first_rank}-{last}"


def read_hostfile(path: Path) -> list[Host]:
    """The hosts in order of their ranks.

    Raises:
        UserError: a malformed line, a host listed twice, no slots or unequal ones; with file and line number.
    """
    lines = _lines_of(path, "--hostfile wants lines of 'NAME slots=N'")
    hosts: list[Host] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        host = _parse(text, f"{path}:{number}", sum(host.slots for host in hosts))
        if host.name in seen:
            raise UserError(
                f"{path}:{number}: host {host.name!r} is listed twice, first in line {seen[host.name]}; "
                "list it once, with all its slots"
            )
        if hosts and host.slots != hosts[0].slots:
            raise UserError(
                f"{path}:{number}: {host.name} has slots={host.slots}, but {hosts[0].name} has slots={hosts[0].slots}; "
                "every host needs equal slots: give both the smaller number"
            )
        seen[host.name] = number
        hosts.append(host)
    if not hosts:
        raise UserError(f"{path}: lists no host; expected lines of 'NAME slots=N'")
    return hosts


def _lines_of(path: Path, wanted: str) -> list[str]:
    """The lines of a small text file; a pipe that the shell made (`<(...)`) is one too.

    Raises:
        UserError: it does not exist, or is not such a file and could be endless.
    """
    try:
        if not path.is_file() and not (path.is_fifo() and path.parent == Path("/dev/fd")):
            what = "it is not a file" if path.exists() else "No such file"
            raise UserError(f"{str(path)!r}: cannot be read ({what}); {wanted}")
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise UserError(f"{str(path)!r}: longer than {MOST_BYTES:,} bytes; {wanted}")
        return content.decode().splitlines()
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        if isinstance(error, UnicodeDecodeError):
            raise UserError(f"{path}: not UTF-8 text at byte {error.start}; {wanted}") from None
        raise UserError(
            f"{str(path)!r}: cannot be read ({getattr(error, 'strerror', None) or error}); {wanted}"
        ) from None


def _parse(text: str, where: str, first_rank: int) -> Host:
    match = _LINE.fullmatch(text)
    if match is None:
        raise UserError(f"{where}: {text!r} is not a host; expected 'NAME slots=N', such as 'node-1 slots=8'")
    name, slots = match["name"], int(match["slots"])
    if _NAME.fullmatch(name) is None:
        raise UserError(f"{where}: {name!r} is not a host's name; expected letters, digits, '.', '-' and '_'")
    if slots == 0:
        raise UserError(f"{where}: {name} has slots=0; expected the number of its ranks, at least 1")
    return Host(name, slots, first_rank)


def write_hostfile(path: Path, hosts: list[Host]) -> None:
    path.write_text("".join(f"{host.name} slots={host.slots}\n" for host in hosts), encoding="utf-8")
