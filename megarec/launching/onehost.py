"""One run on this machine under the deepspeed launcher, watched and restarted; the command behind launch/run.sh."""

import argparse
import secrets
import socket
import sys
from pathlib import Path

from megarec.config.load import load_config
from megarec.distributed.rendezvous import free_port
from megarec.errors import UserError, exits_cleanly
from megarec.launching.arguments import add_restart_arguments, add_run_arguments, environment_of_ranks
from megarec.launching.commands import assignment_of, local_command
from megarec.launching.failure_report import verdict
from megarec.launching.hosts import Host
from megarec.launching.restarts import End, run_with_restarts, say
from megarec.launching.supervise import Watch, supervise
from megarec.signals import Interruption

LOOPBACK = "lo"


@exits_cleanly
def main() -> None:
    parser = argparse.ArgumentParser(prog="launch/run.sh", description="Start one run on this machine, and restart it.")
    parser.add_argument("--num_gpus", type=int, required=True, help="ranks; without GPUs, processes on the CPU")
    add_run_arguments(parser)
    add_restart_arguments(parser)
    arguments = parser.parse_args()
    if arguments.num_gpus < 1:
        raise UserError(f"--num_gpus {arguments.num_gpus}: expected at least 1")
    config = load_config(arguments.config, arguments.set)
    environment = environment_of_ranks()

    def start(number: int, resume: bool) -> End:
        return run(arguments, environment, resume, interruption)

    with Interruption() as interruption:
        checkpoints = Path(config.train.output_dir) / "checkpoints"
        sys.exit(run_with_restarts(start, arguments.restarts, arguments.resume, checkpoints, interruption))


def run(arguments: argparse.Namespace, environment: dict[str, str], resume: bool, interruption: Interruption) -> End:
    """Start the ranks and stay until the last has ended."""
    assignment = assignment_of(secrets.token_hex(8), arguments, environment, [LOOPBACK], resume)
    command = local_command(arguments.num_gpus, assignment.encode(), free_port())
    record = supervise(assignment.job, [command], Watch(interruption, None, arguments.grace))
    code, lines = verdict(record, [Host(socket.gethostname(), arguments.num_gpus, 0)], {})
    for line in lines:
        say(line)
    return End(code, lines[0].partition(": ")[2] if lines else "")


if __name__ == "__main__":
    main()
