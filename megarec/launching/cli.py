"""`megarec launch one-host` and `multihost` (launch/run.sh, launch/multihost.sh): start a run, watch it, restart it."""

import argparse
import secrets
import socket
import sys
import tempfile
import time
from pathlib import Path

from megarec.config.load import load_config
from megarec.distributed.rendezvous import free_port
from megarec.errors import ArgumentParser, UserError, exits_cleanly
from megarec.launching.commands import (
    assignment_of,
    deepspeed_command,
    local_command,
    torchrun_commands,
    visible_devices,
)
from megarec.launching.failure_report import failure_report
from megarec.launching.hosts import Host, read_environment, write_hostfile
from megarec.launching.preflight import Job, Report, check_hosts, plan_job, table, without
from megarec.launching.restarts import End, run_with_restarts, say
from megarec.launching.supervise import Watch, supervise
from megarec.launching.variables import variables_on
from megarec.signals import Interruption

LOOPBACK = "lo"
SECOND_LOOK_SECONDS = 5.0  # at hosts that just ended a job: their ranks may have to end first
MASTER_PORT = 29500
GRACE_SECONDS = 60.0


@exits_cleanly
def one_host() -> None:
    parser = ArgumentParser(description="Start one run on this machine, and restart it.")
    parser.add_argument("--num_gpus", type=int, required=True, help="ranks; without GPUs, processes on the CPU")
    add_run_arguments(parser)
    add_restart_arguments(parser)
    arguments = parser.parse_args()
    if arguments.num_gpus < 1:
        raise UserError(f"--num_gpus {arguments.num_gpus}: expected at least 1")
    config = load_config(arguments.config, arguments.set)
    environment = visible_devices(arguments.num_gpus) | environment_of_ranks()

    def start(number: int, resume: bool) -> End:
        return run_here(arguments, environment, resume, interruption)

    with Interruption() as interruption:
        checkpoints = Path(config.train.output_dir) / "checkpoints"
        sys.exit(run_with_restarts(start, arguments.restarts, arguments.resume, checkpoints, interruption))


def run_here(
    arguments: argparse.Namespace, environment: dict[str, str], resume: bool, interruption: Interruption
) -> End:
    """Start the ranks and stay until the last has ended."""
    assignment = assignment_of(secrets.token_hex(8), arguments, [LOOPBACK], resume)
    command = local_command(arguments.num_gpus, assignment.encode(), free_port())
    with variables_on(None, assignment.job, environment):
        record = supervise(assignment.job, [command], Watch(interruption, None, arguments.grace))
    return _shown(*failure_report(record, [Host(socket.gethostname(), arguments.num_gpus, 0)], {}))


@exits_cleanly
def multihost() -> None:
    parser = ArgumentParser(description="Start one run on the hosts of a hostfile.")
    add_host_arguments(parser)
    add_run_arguments(parser)
    add_restart_arguments(parser)
    parser.add_argument("--restart-on-remaining", action="store_true", help="restart without the hosts that the "
                        "preflight refuses")  # fmt: skip
    parser.add_argument("--launcher", choices=("deepspeed", "torchrun"), default="deepspeed")
    arguments = parser.parse_args()
    job, environment = job_of(arguments)

    def start(number: int, resume: bool) -> End:
        nonlocal job
        job, report = checked(job, number > 0, arguments.restart_on_remaining)
        return run_on_hosts(arguments, job, report, environment, resume, interruption)

    with Interruption() as interruption:
        checkpoints = Path(job.config.train.output_dir) / "checkpoints"
        sys.exit(run_with_restarts(start, arguments.restarts, arguments.resume, checkpoints, interruption))


def checked(job: Job, again: bool, on_remaining: bool) -> tuple[Job, Report]:
    """The preflight's findings, and the job, after a restart perhaps on the hosts that remain.

    Raises:
        UserError: a required host fails the preflight.
    """
    report = check_hosts(job)
    if report.failures and again:
        time.sleep(SECOND_LOOK_SECONDS)
        report = check_hosts(job)
        lost = {failure.host for failure in report.failures}
        if lost and on_remaining and len(lost) < len(job.hosts):
            for failure in report.failures:
                say(f"GOING ON WITHOUT {failure}")
            job = without(job, lost)
            report = check_hosts(job)
    if report.failures:
        raise UserError("\n".join(["the preflight found:", *map(str, report.failures)]))
    print("preflight: all is well", *table(job, report), sep="\n", flush=True)
    return job, report


def run_on_hosts(
    arguments: argparse.Namespace,
    job: Job,
    report: Report,
    environment: dict[str, str],
    resume: bool,
    interruption: Interruption,
) -> End:
    """Start the ranks and stay until the last has ended."""
    names = [host.name for host in job.hosts]
    interfaces = [report.interfaces[name] for name in names]
    assignment = assignment_of(secrets.token_hex(8), arguments, interfaces, resume)
    where = (assignment.encode(), report.master, job.port, job.config.parallel.timeout_seconds)
    with (
        tempfile.TemporaryDirectory(prefix="megarec-") as directory,
        variables_on(names, assignment.job, environment),
    ):
        if arguments.launcher == "deepspeed":
            hostfile = Path(directory) / "hostfile"
            write_hostfile(hostfile, job.hosts)
            commands = [deepspeed_command(hostfile, *where)]
        else:
            commands = torchrun_commands(job.hosts, *where)
        record = supervise(assignment.job, commands, Watch(interruption, names, arguments.grace))
    return _shown(*failure_report(record, job.hosts, report.addresses))


def _shown(code: int, lines: list[str]) -> End:
    """Print how the job ended, its cause first."""
    for line in lines:
        say(line)
    return End(code, lines[0].partition(": ")[2] if lines else "")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, required=True, help="the run's JSON")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one key")


def add_host_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hostfile", type=Path, required=True, help="a line a host: NAME slots=N")
    parser.add_argument("--master-addr", help="address of the first host (default: as the others resolve its name)")
    parser.add_argument("--master-port", type=_port, default=MASTER_PORT, help="a port of the first host")


def add_restart_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--resume", action="store_true", help="continue from the latest checkpoint, if there is one")
    parser.add_argument("--restarts", type=_natural, default=0, metavar="K", help="start again after a crash or a "
                        "pre-emption, from the latest checkpoint, up to K times")  # fmt: skip
    parser.add_argument("--grace", type=_seconds, default=GRACE_SECONDS, metavar="SECONDS", help="for the ranks "
                        "to save after SIGTERM or SIGUSR1, before they are killed (%(default)g)")  # fmt: skip


def job_of(arguments: argparse.Namespace) -> tuple[Job, dict[str, str]]:
    """The job on many hosts, and the variables of .deepspeed_env for its ranks.

    Raises:
        UserError: a mistake that shows without the other hosts.
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


def _port(text: str) -> int:
    number = int(text)
    if not 0 < number < 65536:
        raise argparse.ArgumentTypeError(f"{number}: expected a port, 1 to 65535")
    return number


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
