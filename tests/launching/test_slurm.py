"""launch/slurm.sh with stand-ins for Slurm and Python: what each node would start. No Slurm has run it."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Runs the command once a node, in turn, and returns the largest exit code, as srun does.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do echo "option $1"; shift; done
worst=0
for node in 0 1; do SLURM_NODEID=$node "$@" || { code=$?; (( code > worst )) && worst=$code; }; done
exit $worst
"""
PYTHON = '#!/bin/sh\nprintf "<%s>" "$@"; echo; exit "$SLURM_NODEID"\n'


def stand_in(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def test_one_torchrun_a_node_with_the_words_as_they_were_given(tmp_path: Path) -> None:
    stand_in(tmp_path / "bin/srun", SRUN)
    stand_in(tmp_path / "bin/scontrol", "#!/bin/sh\nprintf 'node-7\\nnode-9\\n'\n")
    stand_in(tmp_path / "my venv/bin/python", PYTHON)
    environment = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "MEGAREC_VENV": str(tmp_path / "my venv"),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NODELIST": "node-[7,9]",
        "SLURM_JOB_ID": "1234567",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
    }
    words = ["--config", "my run.json", "--set", "train.output_dir=$(touch pwned) 'x'"]
    done = subprocess.run(["bash", ROOT / "launch/slurm.sh", *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    *options, first, second = done.stdout.splitlines()
    assert "option --kill-on-bad-exit=1" in options
    expected = ["-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", "0", "--nproc_per_node", "8"]
    expected += ["--master_addr", "node-7", "--master_port", "24567", str(ROOT / "launch/train.py"), *words]
    assert first == "".join(f"<{word}>" for word in expected)
    assert second == first.replace("<--node_rank><0>", "<--node_rank><1>")


def test_outside_of_slurm_it_says_so() -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    done = subprocess.run(["bash", ROOT / "launch/slurm.sh"], env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "submit this script with sbatch" in done.stderr
