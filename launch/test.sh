#!/usr/bin/env bash
# The tests, on a fresh machine too: sets up the environment, then runs pytest with the arguments given.
#   bash launch/test.sh                    all but what is marked slow
#   bash launch/test.sh -m slow            only that: more topologies, kills, sweeps, compilers
#   bash launch/test.sh tests/models -x    any pytest arguments
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
use_environment requirements-dev.txt requirements-serve.txt
cd "$root"
exec python -m pytest --numprocesses 3 --dist loadfile "$@"  # on two cores: many tests wait for launchers
