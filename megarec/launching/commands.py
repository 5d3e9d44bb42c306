"""The local commands that start a job's ranks on its hosts: DeepSpeed's launcher over pdsh, or torchruns over ssh.

User input travels in the assignment, one base64 word. The rest is quoted for the remote shell, or refused
where a launcher offers no way to quote it.
"""

import argparse
import os
import re
import shlex
import sys
from pathlib import Path

from megarec.errors import UserError
from megarec.launching import torchrun
from megarec.launching.hosts import OPTIONS, Host, accelerator, keep_alive, on_ssh_host
from megarec.launching.rank_process import Assignment
from megarec.launching.supervise import Command

PACKAGE = Path(__file__).resolve().parents[1]
TRAIN_SCRIPT = PACKAGE / "train.py"
RANK_SCRIPT = PACKAGE / "launching/rank.py"
VISIBLE = ("CUDA_VISIBLE_DEVICES",)
_SAFE = re.compile(r"[\w@+=:,./-]*")
# Quiet and single-threaded by default, as launch/quickstart.sh does for one host.
_QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONUNBUFFERED": "1"}
_EXPORTED = ("MLFLOW", "MV2", "UCX", "NCCL", "LD_LIBRARY", "PATH")  # what DeepSpeed's launcher exports by itself


def assignment_of(job: str, arguments: argparse.Namespace, interfaces: list[str], resume: bool) -> Assignment:
    """What every rank of a start runs, from the command line; every user of its host can read it.

    Args:
        interfaces: by host.
    """
    command = [str(TRAIN_SCRIPT), "--config", str(arguments.config)]
    for override in arguments.set:
        command += ["--set", override]
    about_the_run = {key: os.environ[key] for key in ("OMP_NUM_THREADS", "DS_ACCELERATOR") if key in os.environ}
    variables = _QUIET | {"DS_ACCELERATOR": accelerator()} | about_the_run
    command += ["--resume"] if resume else []
    return Assignment(job, str(Path.cwd()), command, variables, interfaces, arguments.grace)


def local_command(ranks: int, word: str, port: int) -> Command:
    """`deepspeed --num_gpus ...` on this machine, whatever hostfile lies where DeepSpeed looks for one."""
    argv = [
        sys.executable,
        "-P",
        "-m",
        "deepspeed.launcher.runner",
        "--hostfile",
        "/dev/null/none",
        "--log_level",
        "error",
    ]
    argv += ["--num_gpus", str(ranks), "--master_port", str(port), "--no_local_rank", str(RANK_SCRIPT), word]
    hidden = ("PYTHON", *VISIBLE)  # DeepSpeed numbers all devices; the assignment has those of the ranks
    environment = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
    environment.setdefault("DS_ACCELERATOR", accelerator())
    return Command(argv, environment)


def visible_devices(ranks: int) -> dict[str, str]:
    """The devices of this machine that its user chose for the ranks, as a variable for them; none: the first ones.

    Raises:
        UserError: there are fewer than ranks.
    """
    chosen = {name: os.environ[name] for name in VISIBLE if name in os.environ}
    on_devices = os.environ.get("DS_ACCELERATOR", accelerator()) != "cpu"
    for name, value in chosen.items() if on_devices else ():
        devices = [device for device in value.split(",") if device.strip()]
        if len(devices) < ranks:
            raise UserError(f"--num_gpus {ranks}: {name}={value!r} shows {len(devices)}; give as many as ranks")
    return chosen


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
    argv = [sys.executable, "-P", "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile.resolve())]
    argv += ["--log_level", "error", "--force_multi", "--no_ssh_check", "--no_local_rank"]
    argv += ["--master_addr", master, "--master_port", str(port)]
    argv += [shlex.quote(str(script)).replace("%", "%%"), word]  # pdsh reads %h, %n and %u in commands
    return Command(argv, _launcher_environment(timeout))


def _launcher_environment(timeout: float) -> dict[str, str]:
    # PYTHONPATH and the like would be exported; rank.py finds its package by itself.
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
        remote = [sys.executable, torchrun.__file__, "--nnodes", str(len(hosts)), "--node_rank", str(node)]
        remote += ["--nproc_per_node", str(host.slots), "--master_addr", master, "--master_port", str(port)]
        local = on_ssh_host(host.name, [*remote, str(RANK_SCRIPT), word], (*OPTIONS, *keep_alive(timeout)))
        commands.append(Command(local, dict(os.environ), host.name))
    return commands
