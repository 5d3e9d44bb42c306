"""One run on many hosts, from one of them: preflight, start, watch; the command behind launch/multihost.sh."""

import argparse
import secrets
import sys
import tempfile
import time
from pathlib import Path

from megarec.errors import UserError, exits_cleanly
from megarec.launching.arguments import add_host_arguments, add_restart_arguments, add_run_arguments, job_of
from megarec.launching.commands import assignment_of, deepspeed_command, torchrun_commands
from megarec.launching.failure_report import verdict
from megarec.launching.hosts import write_hostfile
from megarec.launching.preflight import Job, Report, check_hosts, table, without
from megarec.launching.restarts import End, run_with_restarts, say
from megarec.launching.supervise import Watch, supervise
from megarec.signals import Interruption

SECOND_LOOK_SECONDS = 5.0  # at hosts that just ended a job: their ranks may have to go first


@exits_cleanly
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="launch/multihost.sh", description="Start one run on the hosts of a hostfile."
    )
    add_host_arguments(parser)
    add_run_arguments(parser)
    add_restart_arguments(parser)
    parser.add_argument("--restart-on-remaining", action="store_true", help="restart without the hosts that the "
                        "preflight finds something wrong with")  # fmt: skip
    parser.add_argument("--launcher", choices=("deepspeed", "torchrun"), default="deepspeed")
    arguments = parser.parse_args()
    job, environment = job_of(arguments)

    def start(number: int, resume: bool) -> End:
        nonlocal job
        job, report = checked(job, number > 0, arguments.restart_on_remaining)
        return run(arguments, job, report, environment, resume, interruption)

    with Interruption() as interruption:
        checkpoints = Path(job.config.train.output_dir) / "checkpoints"
        sys.exit(run_with_restarts(start, arguments.restarts, arguments.resume, checkpoints, interruption))


def checked(job: Job, again: bool, on_remaining: bool) -> tuple[Job, Report]:
    """What the preflight finds, and the job, after a restart perhaps on the hosts that remain.

    Raises:
        UserError: something is wrong with a host that is needed.
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


def run(
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
    assignment = assignment_of(secrets.token_hex(8), arguments, environment, interfaces, resume)
    where = (assignment.encode(), report.master, job.port, job.config.parallel.timeout_seconds)
    with tempfile.TemporaryDirectory(prefix="megarec-") as directory:
        if arguments.launcher == "deepspeed":
            hostfile = Path(directory) / "hostfile"
            write_hostfile(hostfile, job.hosts)
            commands = [deepspeed_command(hostfile, *where)]
        else:
            commands = torchrun_commands(job.hosts, *where)
        record = supervise(assignment.job, commands, Watch(interruption, names, arguments.grace))
    code, lines = verdict(record, job.hosts, report.addresses)
    for line in lines:
        say(line)
    return End(code, lines[0].partition(": ")[2] if lines else "")


if __name__ == "__main__":
    main()
