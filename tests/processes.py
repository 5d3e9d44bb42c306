"""Scripts in processes of their own, without the seconds that a fresh interpreter takes to import torch and DeepSpeed.

    done = python("tools/flops.py", "--ladder")     # as subprocess.run([sys.executable, ...], capture_output=True)
    with warm_environment(directory) as venv:       # programs of venv/bin, as a shell finds them on PATH
        ...

They are forked from the process that has imported all of it, the one from which rank pools fork (tests/preloaded.py).
What a tool imports by itself does not show here, nor does the search path of a fresh interpreter: so one test of every
tool starts it for real, `python(..., real=True)`.
"""

import atexit
import json
import multiprocessing
import multiprocessing.connection
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing import process as multiprocessing_process
from pathlib import Path
from typing import Any

import psutil
import torch

from megarec.distributed.rank_pool import PRELOADED

TIMEOUT = 300.0
FORWARDED = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
# What stands in for python, deepspeed and torchrun: asks for a fork that has its streams, and ends as the fork does.
# An interpreter without site packages is up in 20 ms. Options of python other than -u go to a fresh one.
_PROGRAM = """#!{python} -SE
import json, os, signal, socket, sys
program, *words = sys.argv
if (script := {scripts!r}.get(os.path.basename(program))) is not None:
    words = [script, *words]
unbuffered = words[:1] == ["-u"]
rest = words[unbuffered:]
if not rest or (rest[0].startswith("-") and rest[0] not in ("-c", "-m")):
    os.execv({python!r}, [{python!r}, *words])
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
for name in {forwarded!r}:
    signal.signal(getattr(signal, name), lambda number, frame: server.send(bytes([number])))
order = json.dumps([rest, unbuffered, os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [len(order).to_bytes(8, "big")], [0, 1, 2])
server.sendall(order)
answer = server.recv(8)
code = int.from_bytes(answer, "big", signed=True) if answer else 1
if code < 0:
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


def python(
    *words: object,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = TIMEOUT,
    real: bool = False,
) -> "subprocess.CompletedProcess[str]":
    """Run `python *words`, which begin with a script, `-m module` or `-c code`; its exit code and both streams.

    Raises:
        subprocess.TimeoutExpired: it took longer; it has been killed.
    """
    texts, env = [str(word) for word in words], _without_our_job(os.environ if env is None else env)
    if real:
        command = [sys.executable, *texts]
        return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)
    with tempfile.TemporaryDirectory(prefix="megarec-script-") as directory:
        streams = [Path(directory) / name for name in ("stdout", "stderr")]
        process = _forked(_to_files, texts, str(cwd or Path.cwd()), env, streams)
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(texts, timeout, *(path.read_bytes() for path in streams if path.exists()))
        output, errors = (path.read_text(encoding="utf-8") for path in streams)
        return subprocess.CompletedProcess([sys.executable, *texts], process.exitcode, output, errors)


def _without_our_job(environment: Mapping[str, str]) -> dict[str, str]:
    """Without the variables of a run of one rank that an earlier test began in this process, whose port is taken."""
    ours = os.environ.get("MASTER_PORT") is not None and environment.get("MASTER_PORT") == os.environ["MASTER_PORT"]
    job = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if ours else ()
    return {name: value for name, value in environment.items() if name not in job}


def lives(process: psutil.Process) -> bool:
    """Neither gone, whenever that happens, nor a zombie that nobody has reaped."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def warm_environment(directory: Path) -> Iterator[Path]:
    """A virtual environment as the one of the tests, but whose python, deepspeed and torchrun are forks.

    They are no children of whoever starts them, and outside of its namespaces: signals and exit codes pass through,
    but to look at processes or to shut them in takes real ones.
    """
    venv, here = directory / "venv", Path(sys.executable).parent
    (venv / "bin").mkdir(parents=True)
    for source, target in ((Path(sys.prefix), venv), (here, venv / "bin")):
        for path in source.iterdir():
            if path.name != "bin":
                (target / path.name).symlink_to(path)
    address = f"{directory}/python"  # shorter than what a socket's name may have, wherever pytest's directory lies
    if len(address) > 100:
        address = tempfile.mkdtemp(prefix="megarec-python-") + "/python"
    scripts = {name: str(here / name) for name in ("deepspeed", "torchrun")}
    program = _PROGRAM.format(python=sys.executable, scripts=scripts, address=address, forwarded=FORWARDED)
    for name in ("python", "python3", *scripts):
        (venv / "bin" / name).unlink()
        (venv / "bin" / name).write_text(program)
        (venv / "bin" / name).chmod(0o755)
    if (activate := here / "activate").exists():
        (venv / "bin/activate").unlink()
        (venv / "bin/activate").write_text(activate.read_text().replace(sys.prefix, str(venv)))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        server = _forked(_serve, listener, str(venv / "bin/python"))
    try:
        yield venv
        assert server.exitcode is None, f"the process that forks for {venv} ended, with exit code {server.exitcode}"
    finally:
        server.terminate()
        server.join()


def _forked(target: Any, *args: Any) -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=target, args=args)
    process.start()
    return process


def _serve(listener: socket.socket, executable: str) -> None:
    """Until the test process ends: a child for every order, which runs it in a child of its own and reports its end."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    parent = multiprocessing.parent_process()
    assert parent is not None
    while True:
        if parent.sentinel in multiprocessing.connection.wait([listener, parent.sentinel]):
            return
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            with suppress(BrokenPipeError, ConnectionResetError):
                _fulfil(connection, executable)
            os._exit(0)
        connection.close()


def _fulfil(connection: socket.socket, executable: str) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    header, streams, _, _ = socket.recv_fds(connection, 8, 3)
    order = b""
    while len(order) < int.from_bytes(header, "big"):
        order += connection.recv(1 << 20)
    words, unbuffered, cwd, environment = json.loads(order)
    child = os.fork()
    if child == 0:
        connection.close()
        for descriptor, stream in enumerate(streams):
            os.dup2(stream, descriptor)
            os.close(stream)
        sys.stdin = os.fdopen(0, closefd=False)
        if unbuffered:
            for stream in (sys.stdout, sys.stderr):
                stream.reconfigure(write_through=True)  # type: ignore[union-attr]
        sys.executable = executable  # what it starts is forked too
        multiprocessing_process._parent_process = None  # type: ignore[attr-defined]
        _live(words, cwd, environment)
    for stream in streams:
        os.close(stream)
    ended = os.pidfd_open(child)
    while ended not in select.select([connection, ended], [], [])[0]:
        for number in connection.recv(64) or [signal.SIGKILL]:  # nothing: who asked for it is gone
            os.kill(child, number)
            if number == signal.SIGKILL:
                os.waitpid(child, 0)
                return
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    connection.sendall(code.to_bytes(8, "big", signed=True))


def _to_files(words: list[str], cwd: str, environment: dict[str, str], streams: list[Path]) -> None:
    for descriptor, path in zip((1, 2), streams, strict=True):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, descriptor)
        os.close(file)
    _live(words, cwd, environment)


def _live(words: list[str], cwd: str, environment: dict[str, str]) -> None:
    """The life of the process, which ends as an interpreter does: threads, exit functions, streams, exit code."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", "1")))
    code = 0
    try:
        _run(words, environment)
    except SystemExit as end:
        code = _code(end.code)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code & 0xFF)


def _run(words: list[str], environment: dict[str, str]) -> None:
    installed = [path for path in sys.path if path.startswith((sys.prefix, sys.base_prefix))]
    kind = words[0] if words[0] in ("-c", "-m") else ""
    here = {"-c": "", "-m": str(Path.cwd())}.get(kind) if kind else str(Path(words[0]).resolve().parent)
    listed = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [str(here), *listed, *installed]
    if kind == "-c":
        sys.argv = ["-c", *words[2:]]
        main: dict[str, Any] = {"__name__": "__main__", "__builtins__": __builtins__}
        exec(compile(words[1], "<string>", "exec"), main)
    elif kind == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def _code(code: object) -> int:
    if code is None or isinstance(code, int):
        return code or 0
    print(code, file=sys.stderr)
    return 1
