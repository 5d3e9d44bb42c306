#!/usr/bin/env bash
# Two hosts on one machine: network namespaces with an address, a hostname and an sshd each, joined by a slow link.
# The run is launched as on real hosts: first with the flat exchange, which gives the losses of one process, then with
# towers, which halve the embeddings that cross the link (gradients of the dense side cross it as before).
#   bash docs/examples/two_hosts_on_a_laptop.sh     as root, after: apt-get install -y openssh-server pdsh iproute2
# Where namespaces are not possible it says so and ends. Nothing is left behind, even after kill -9.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source launch/environment.sh
use_environment
shop=docs/examples/shop
python tools/prepare_data.py table --schema $shop/columns.json --output data/shop \
  --train $shop/train.csv --valid $shop/valid.csv --test $shop/test.csv

PYTHONPATH=$root MEGAREC_VENV=$venv exec python - <<'END_OF_PYTHON'
import os
import sys
import tempfile
from pathlib import Path

from tools.benchmarks.testbed import NetnsHosts, why_not

if reason := why_not():
    sys.exit(print(f"skipped: {reason}"))
FLAT = ["--set", "parallel.exchange=flat"]
TOWERS = ["--set", "parallel.exchange=tower", "--set", "parallel.towers=2"]
TOWERS += ["--set", 'tower_module={"name": "dlrm", "compression": 2}']
with tempfile.TemporaryDirectory() as directory, NetnsHosts(Path(directory), hosts=2, slots=1, mbit=100) as hosts:
    for name, exchange in (("flat", FLAT), ("towers", TOWERS)):
        command = ["bash", "launch/multihost.sh", "--hostfile", str(hosts.hostfile)]
        command += ["--config", "docs/examples/shop/run.json", "--set", "train.epochs=1"]
        command += ["--set", f"train.output_dir=runs/two-hosts-{name}", *exchange]
        before = hosts.bytes()["host1"][0]
        if code := hosts.start("host1", command, env=os.environ | {"PATH": os.environ["PATH"] + ":/usr/sbin"}).wait():
            sys.exit(code)
        print(f"{name}: host1 sent {(hosts.bytes()['host1'][0] - before) / 1e6:.1f} MB", flush=True)
END_OF_PYTHON
