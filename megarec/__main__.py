"""`python -m megarec`: the `megarec` command."""

from megarec.cli import main

main()
