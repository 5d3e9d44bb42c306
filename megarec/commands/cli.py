"""`megarec NAME ...`: finds the command by its name and imports no other.

megarec --help
megarec train --config run.json
megarec launch one-host --num_gpus 2 --config run.json
"""

import importlib
import sys
from typing import NamedTuple

import megarec
from megarec.errors import UserError, did_you_mean, exits_cleanly


class Command(NamedTuple):
    """A command of the list.

    Attributes:
        module, function: where it is; it reads sys.argv.
        does: one line for --help.
    """

    module: str
    does: str
    function: str = "main"


LAUNCH = {
    "one-host": Command("megarec.launching.cli", "one run on this machine, watched and restarted", "one_host"),
    "multihost": Command("megarec.launching.cli", "one run on the hosts of a hostfile", "multihost"),
    "preflight": Command("megarec.commands.preflight", "check the hosts of a hostfile before a run"),
}
COMMANDS = {
    "train": Command("megarec.commands.train", "train one model from one JSON"),
    "launch": Command("", f"start a watched run: {', '.join(LAUNCH)}"),
    "prepare": Command("megarec.commands.prepare_data", "raw data to parquet shards and schema.json"),
    "import-recipe": Command("megarec.commands.import_recipe", "a FuxiCTR recipe to a run's JSON and its data's spec"),
    "flops": Command("megarec.commands.flops", "count a run's parameters and training FLOPs per example"),
    "placement": Command("megarec.commands.placement", "show where a run's tables lie, and why"),
    "partition-towers": Command("megarec.commands.partition_towers", "assign the categorical features to towers"),
    "evaluate": Command("megarec.commands.evaluate", "score a trained model on a prepared split"),
    "importance": Command("megarec.commands.importance", "what each feature is worth to a trained model"),
    "rehearse": Command("megarec.commands.rehearse", "rehearse one true rank of a larger job in one process"),
    "plan": Command("megarec.commands.plan", "predict a run's step on a cluster, and whether towers pay there"),
    "parity": Command("megarec.commands.parity", "compare loss curves under many topologies with one process"),
    "checkpoint": Command("megarec.commands.checkpoint", "inspect, verify, reshape and export checkpoints"),
    "serve": Command("megarec.commands.serve", "score raw rows of an export over HTTP"),
    "scaling-law": Command("megarec.commands.scaling_law", "sweep, fit and draw quality as a power of compute"),
    "config-schema": Command("megarec.commands.config_schema", "print the JSON schema of a run's file"),
    "bench": Command("", "benchmarks; from a checkout only, as python tools/bench.py"),
}


@exits_cleanly
def main() -> None:
    dispatch("megarec", sys.argv[1:], COMMANDS)


def dispatch(program: str, words: list[str], commands: dict[str, Command]) -> None:
    """Run the command that the first argument names, with the others as its sys.argv.

    Raises:
        UserError: there is no such command.
    """
    if not words:
        raise UserError(f"{program}: expected a command; see {program} --help")
    name, *rest = words
    if name in ("-h", "--help"):
        print(usage(program, commands))
    elif name == "--version" and commands is COMMANDS:
        print(f"megarec {megarec.__version__}")
    elif name not in commands:
        raise UserError(f"{program}: no command is called {name!r}; {did_you_mean(name, commands)}")
    elif name == "launch":
        dispatch("megarec launch", rest, LAUNCH)
    elif name == "bench":
        raise UserError("megarec bench: benchmarks are not installed; in a checkout run python tools/bench.py")
    else:
        main = getattr(importlib.import_module(commands[name].module), commands[name].function)
        sys.argv = [f"{program} {name}", *rest]  # argparse calls the program by the first of them
        main()


def usage(program: str, commands: dict[str, Command]) -> str:
    width = max(map(len, commands))
    lines = [f"  {name:{width}}  {command.does}" for name, command in commands.items()]
    return "\n".join([f"usage: {program} COMMAND ...", "", *lines, "", f"{program} COMMAND --help shows more."])
