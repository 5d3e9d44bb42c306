"""TensorBoard as the documentation says to start it: it listens on loopback alone."""

import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "launch").glob("*.sh"))]


def documented_commands() -> list[tuple[str, str]]:
    found = []
    for document in DOCUMENTS:
        for command in re.findall(r"tensorboard (--[^`\"\n]*)", document.read_text()):
            found.append((document.name, command.split("#")[0].strip()))
    return found


def addresses_of(process: subprocess.Popen[bytes]) -> set[str]:
    """Where it and its children listen, as soon as they do."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        connections = [c for one in family for c in one.net_connections("inet")]
        if found := {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}:
            return found
        time.sleep(0.1)
    raise AssertionError(f"it does not listen; exit code {process.poll()}")


def test_every_documented_command_names_localhost() -> None:
    commands = documented_commands()
    assert {"training.md", "multihost.md", "quickstart.sh"} <= {name for name, _ in commands}
    for name, command in commands:
        assert command.endswith("--host localhost"), f"{name}: tensorboard {command}"


def test_it_listens_on_loopback_alone(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("tensorboard")
    if not program.exists():
        pytest.fail(f"{program} is missing, which requirements.txt installs")
    command = [str(program), "--logdir", str(tmp_path), "--host", "localhost", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            found = addresses_of(process)
        finally:
            process.kill()
    assert found <= {"127.0.0.1", "::1"}
