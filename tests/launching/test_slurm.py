"""launch/slurm.sh with stand-ins for Slurm and Python: what each node would start. No Slurm has run it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Runs the command once a node, in turn, and returns the largest exit code, as srun does.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do echo "option $1"; shift; done
worst=0
for node in 0 1; do SLURM_NODEID=$node "$@" || { code=$?; (( code > worst )) && worst=$code; }; done
exit $worst
"""
SCONTROL = '#!/bin/sh\ncase $1 in requeue) echo "$@" ;; *) printf "node-7\\nnode-9\\n" ;; esac\n'
PYTHON = '#!/bin/sh\nprintf "<%s>" "$@"; echo; exit "$SLURM_NODEID"\n'


def stand_in(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


WORDS = ["--config", "my run.json", "--set", "train.output_dir=$(touch pwned) 'x'"]


def submit(directory: Path, python: str = PYTHON, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run the script with stand-ins for Slurm and for the Python of the environment."""
    stand_in(directory / "bin/srun", SRUN)
    stand_in(directory / "bin/scontrol", SCONTROL)
    stand_in(directory / "my venv/bin/python", python)
    variables = {
        "PATH": f"{directory / 'bin'}:{os.environ['PATH']}",
        "MEGAREC_VENV": str(directory / "my venv"),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NODELIST": "node-[7,9]",
        "SLURM_JOB_ID": "1234567",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_CPUS_ON_NODE": "96",
        **environment,
    }
    command = ["bash", str(ROOT / "launch/slurm.sh"), *WORDS]
    return subprocess.run(command, env=variables, cwd=directory, capture_output=True, text=True)


def test_one_torchrun_a_node_with_the_words_as_they_were_given(tmp_path: Path) -> None:
    done = submit(tmp_path, RESTARTS="0")
    assert done.returncode == 1, done.stderr
    *options, first, second = done.stdout.splitlines()
    assert {"option --kill-on-bad-exit=1", "option --cpu-bind=none", "option --gpu-bind=none"} <= set(options)
    assert "option --cpus-per-task=96" in options
    expected = [str(ROOT / "megarec/launching/torchrun.py"), "--nnodes", "2", "--node_rank", "0"]
    expected += ["--nproc_per_node", "8", "--master_addr", "node-7", "--master_port", "24567"]
    expected += [str(ROOT / "megarec/train.py"), *WORDS]
    assert first == "".join(f"<{word}>" for word in expected)
    assert second == first.replace("<--node_rank><0>", "<--node_rank><1>")
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize(
    ("code", "count", "queued"),
    [(75, 0, True), (137, 2, True), (1, 3, False), (0, 0, False), (2, 0, False), (70, 1, False)],
)
def test_it_queues_itself_again_when_that_may_help(tmp_path: Path, code: int, count: int, queued: bool) -> None:
    done = submit(tmp_path, f"#!/bin/sh\nexit {code}\n", SLURM_RESTART_COUNT=str(count))
    assert done.returncode == (0 if queued else code)
    assert ("requeue 1234567" in done.stdout) == queued
    assert (f"QUEUED AGAIN: exit code {code}; restart {count + 1} of 3" in done.stderr) == queued
    assert ("NOT RESTARTED" in done.stderr) == (code != 0 and not queued)


def test_queued_again_it_resumes(tmp_path: Path) -> None:
    assert "--resume" not in submit(tmp_path, RESTARTS="0").stdout
    done = submit(tmp_path, RESTARTS="0", SLURM_RESTART_COUNT="1")
    assert done.stdout.splitlines()[-1].endswith("<--resume>")
    assert "RESTART 1 OF 0: resuming" in done.stdout


def test_torchrun_ends_with_the_exit_code_of_the_rank(tmp_path: Path) -> None:
    """Under torchrun itself: 75 means that the rank has saved, and SIGUSR1 must reach it alone."""
    (tmp_path / "rank.py").write_text(
        "import os, signal, sys, time\nsignal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))\n"
        "os.killpg(0, signal.SIGUSR1)\ntime.sleep(100)\n"
    )
    command = 'trap "" USR1; exec "$0" "$1" --nproc_per_node 1 "$2"'
    words = [sys.executable, str(ROOT / "megarec/launching/torchrun.py"), str(tmp_path / "rank.py")]
    done = subprocess.run(["bash", "-c", command, *words], capture_output=True, text=True, start_new_session=True)
    assert done.returncode == 75, done.stderr


def test_outside_of_slurm_it_says_so() -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    done = subprocess.run(["bash", ROOT / "launch/slurm.sh"], env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "submit this script with sbatch" in done.stderr
