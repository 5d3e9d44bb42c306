"""One run on many hosts, from one of them: preflight, start, watch; the command behind launch/multihost.sh."""

import argparse
import os
import secrets
import sys

from megarec.errors import UserError, exits_cleanly
from megarec.launching.arguments import add_arguments, job_of
from megarec.launching.assignment import Assignment
from megarec.launching.commands import accelerator, deepspeed_command, torchrun_commands
from megarec.launching.preflight import ROOT, Job, Report, check_hosts, table
from megarec.launching.supervise import supervise, verdict

# Quiet and single-threaded where the user says nothing: what launch/quickstart.sh does for one host.
_QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONUNBUFFERED": "1"}


@exits_cleanly
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="launch/multihost.sh", description="Start one run on the hosts of a hostfile."
    )
    add_arguments(parser)
    parser.add_argument("--resume", action="store_true", help="continue from the latest checkpoint, if there is one")
    parser.add_argument("--launcher", choices=("deepspeed", "torchrun"), default="deepspeed")
    arguments = parser.parse_args()
    job, environment = job_of(arguments)
    report = check_hosts(job)
    if report.failures:
        raise UserError("\n".join(["the preflight found:", *map(str, report.failures)]))
    print("preflight: all is well", *table(job, report), sep="\n", flush=True)
    sys.exit(run(arguments, job, report, environment))


def run(arguments: argparse.Namespace, job: Job, report: Report, environment: dict[str, str]) -> int:
    """Start the ranks and stay until the last has ended; returns the job's true exit code."""
    assignment = Assignment(
        job=secrets.token_hex(8),
        directory=str(job.directory),
        command=_command(arguments),
        environment=_QUIET | {"DS_ACCELERATOR": accelerator()} | _passed_on() | environment,
        interfaces=[report.interfaces[host.name] for host in job.hosts],
    )
    where = (assignment.encode(), report.master, job.port, job.config.parallel.timeout_seconds)
    if arguments.launcher == "deepspeed":
        commands = [deepspeed_command(arguments.hostfile, *where)]
    else:
        commands = torchrun_commands(job.hosts, *where)
    record = supervise(assignment.job, commands)
    code, lines = verdict(record, job.hosts, report.addresses)
    for line in lines:
        print(line, file=sys.stderr)
    return code


def _command(arguments: argparse.Namespace) -> list[str]:
    command = [str(ROOT / "launch/train.py"), "--config", str(arguments.config)]
    for override in arguments.set:
        command += ["--set", override]
    return [*command, "--resume"] if arguments.resume else command


def _passed_on() -> dict[str, str]:
    """Variables of this shell that are about the run itself."""
    return {key: value for key, value in os.environ.items() if key in ("OMP_NUM_THREADS", "DS_ACCELERATOR")}


if __name__ == "__main__":
    main()
