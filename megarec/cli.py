"""The `megarec` command: one subcommand for every tool of a checkout, with the same code and arguments.

megarec --help
megarec prepare movielens-100k --output data/movielens-100k
megarec train --config run.json                                  # one rank
deepspeed --num_gpus 8 --module megarec.train --config run.json  # many
"""

import importlib
import sys

from megarec.errors import UserError, did_you_mean, exits_cleanly

COMMANDS = {
    "train": (
        "megarec.train",
        "one run on one rank (more: deepspeed --module megarec.train)",
    ),
    "prepare": ("megarec.commands.prepare_data", "raw files -> parquet shards + schema.json"),
    "flops": ("megarec.commands.flops", "parameters and training FLOPs per example, by part"),
    "rehearse": ("megarec.commands.rehearse", "one process as one true rank of a larger job"),
    "placement": ("megarec.commands.placement", "where the tables of a run lie, and why"),
    "partition-towers": ("megarec.commands.partition_towers", "a learned assignment of features to towers"),
    "parity": ("megarec.commands.parity", "many topologies against one process"),
    "checkpoint": ("megarec.commands.checkpoint", "inspect, verify, reshape, export"),
    "scaling-law": ("megarec.commands.scaling_law", "sweep, table, fit, plot"),
    "preflight": ("megarec.commands.preflight", "check the hosts of a hostfile"),
    "config-schema": ("megarec.commands.config_schema", "the JSON schema of a run's file"),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(["usage: megarec COMMAND [arguments]; megarec COMMAND --help says which", "", *lines])


@exits_cleanly
def main() -> None:
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return
    if name == "--version":
        import megarec

        print(megarec.__version__)
        return
    if name not in COMMANDS:
        raise UserError(f"megarec {name}: no such command; {did_you_mean(name, COMMANDS)}")
    sys.argv = [f"megarec {name}", *arguments]
    importlib.import_module(COMMANDS[name][0]).main()


if __name__ == "__main__":
    main()
