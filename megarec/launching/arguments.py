"""The command lines of the launch scripts."""

import argparse
from pathlib import Path

from megarec.launching.hosts import read_environment
from megarec.launching.preflight import Job, plan_job

MASTER_PORT = 29500
GRACE_SECONDS = 60.0


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, required=True, help="the run's JSON")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one key")


def add_host_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hostfile", type=Path, required=True, help="a line a host: NAME slots=N")
    parser.add_argument("--master-addr", help="address of the first host (default: as the others resolve its name)")
    parser.add_argument("--master-port", type=int, default=MASTER_PORT, help="a port of the first host")


def add_restart_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--resume", action="store_true", help="continue from the latest checkpoint, if there is one")
    parser.add_argument("--restarts", type=_natural, default=0, metavar="K", help="start again after a crash or a "
                        "pre-emption, from the latest checkpoint, up to K times")  # fmt: skip
    parser.add_argument("--grace", type=_seconds, default=GRACE_SECONDS, metavar="SECONDS", help="what the ranks have "
                        "to save after SIGTERM or SIGUSR1, before they are killed (%(default)g)")  # fmt: skip


def job_of(arguments: argparse.Namespace) -> tuple[Job, dict[str, str]]:
    """The job on many hosts, and the variables of .deepspeed_env for its ranks.

    Raises:
        UserError: what needs no other host to be seen as wrong.
    """
    environment = environment_of_ranks()
    job = plan_job(
        arguments.hostfile,
        arguments.config,
        arguments.set,
        arguments.master_addr,
        arguments.master_port,
        environment.get("GLOO_SOCKET_IFNAME"),
    )
    return job, environment


def environment_of_ranks() -> dict[str, str]:
    """The variables of .deepspeed_env, at home and in the working directory."""
    return read_environment([Path.home(), Path.cwd()])


def _natural(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number}: expected 0 or more")
    return number


def _seconds(text: str) -> float:
    number = float(text)
    if not 0 < number < 1e6:
        raise argparse.ArgumentTypeError(f"{text}: expected a number of seconds above 0")
    return number
