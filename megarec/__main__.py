"""`python -m megarec`: the `megarec` command."""

from megarec.commands.cli import main

main()
