"""The local commands that start a job's ranks on its hosts: DeepSpeed's launcher over pdsh, or torchruns over ssh.

What users may write travels in the assignment, one base64 word. What is left is quoted for the remote shell, or refused
where a launcher offers no way to quote it.
"""

import os
import re
import shlex
import sys
from pathlib import Path

from megarec.errors import UserError
from megarec.launching.hostfile import Host
from megarec.launching.preflight import ROOT
from megarec.launching.ssh import OPTIONS, keep_alive, on_host
from megarec.launching.supervise import Command

RANK_SCRIPT = ROOT / "launch/rank.py"
_SAFE = re.compile(r"[\w@+=:,./-]*")
_EXPORTED = ("MLFLOW", "MV2", "UCX", "NCCL", "LD_LIBRARY", "PATH")  # what DeepSpeed's launcher exports by itself
# torchrun, without the traceback in which it would bury what the ranks have said; with a rank's exit code, not 1.
_TORCHRUN = """
import sys
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main
try:
    main()
except ChildFailedError as error:
    sys.exit(error.get_first_failure()[1].exitcode)
"""


def deepspeed_command(
    hostfile: Path, word: str, master: str, port: int, timeout: float, script: Path = RANK_SCRIPT
) -> Command:
    """`deepspeed --hostfile ...` over pdsh.

    Args:
        word: the encoded assignment.

    Raises:
        UserError: the interpreter's path or an exported variable would reach a remote shell unquoted.
    """
    if _SAFE.fullmatch(sys.executable) is None:
        raise UserError(
            f"{sys.executable}: DeepSpeed's launcher hands the path of Python to a shell unquoted, and it holds "
            "characters that mean something there; put the environment elsewhere "
            "(MEGAREC_VENV), or use --launcher torchrun"
        )
    argv = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile.resolve())]
    argv += ["--log_level", "error", "--force_multi", "--no_ssh_check", "--no_local_rank"]
    argv += ["--master_addr", master, "--master_port", str(port)]
    argv += [shlex.quote(str(script)).replace("%", "%%"), word]  # pdsh reads %h, %n and %u in commands
    return Command(argv, _launcher_environment(timeout))


def _launcher_environment(timeout: float) -> dict[str, str]:
    # PYTHONPATH and the like would be exported; launch/rank.py finds its package by itself.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    for key, value in environment.items():
        if key.startswith(_EXPORTED) and _SAFE.fullmatch(value) is None:
            raise UserError(
                f"{key}={value!r}: DeepSpeed's launcher hands it to a shell unquoted, and it holds characters that "
                "mean something there; unset it, put it into .deepspeed_env, or use --launcher torchrun"
            )
    environment["PDSH_SSH_ARGS_APPEND"] = " ".join((*OPTIONS, *keep_alive(timeout)))
    environment["DS_ENV_FILE"] = ".megarec-has-read-it"  # .deepspeed_env is part of the assignment
    environment.setdefault("DS_ACCELERATOR", accelerator())
    return environment


def torchrun_commands(hosts: list[Host], word: str, master: str, port: int, timeout: float) -> list[Command]:
    """An ssh a host that runs torchrun there."""
    commands = []
    for node, host in enumerate(hosts):
        remote = [sys.executable, "-c", _TORCHRUN, "--nnodes", str(len(hosts)), "--node_rank", str(node)]
        remote += ["--nproc_per_node", str(host.slots), "--master_addr", master, "--master_port", str(port)]
        local = on_host(host.name, [*remote, str(RANK_SCRIPT), word], (*OPTIONS, *keep_alive(timeout)))
        commands.append(Command(local, dict(os.environ), host.name))
    return commands


def accelerator() -> str:
    """What DeepSpeed would find out by itself, with a warning."""
    return "cuda" if Path("/dev/nvidiactl").exists() else "cpu"
