"""The command line that the preflight and the launcher share."""

import argparse
from pathlib import Path

from megarec.launching.environment_file import read_environment
from megarec.launching.preflight import Job, plan_job

MASTER_PORT = 29500


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hostfile", type=Path, required=True, help="a line a host: NAME slots=N")
    parser.add_argument("--config", type=Path, required=True, help="the run's JSON")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one key")
    parser.add_argument("--master-addr", help="address of the first host (default: as the others resolve its name)")
    parser.add_argument("--master-port", type=int, default=MASTER_PORT, help="a port of the first host")


def job_of(arguments: argparse.Namespace) -> tuple[Job, dict[str, str]]:
    """The job, and the variables of .deepspeed_env for its ranks.

    Raises:
        UserError: what needs no other host to be seen as wrong.
    """
    environment = read_environment([Path.home(), Path.cwd()])
    job = plan_job(
        arguments.hostfile,
        arguments.config,
        arguments.set,
        arguments.master_addr,
        arguments.master_port,
        environment.get("GLOO_SOCKET_IFNAME"),
    )
    return job, environment
