"""Stands in for launch/train.py in tests of the sweep: the same command line and files, without a model.

A state goes through a hash at every step, so that the final state shows whether each step was taken once and in order.
It resumes from its last checkpoint and refuses company. `model.dropout` above 0.8 makes it fail, above 0.9 the fault
policy stops it.
"""

import hashlib
import json
import os
import socket
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megarec.config.load import load_config
from megarec.errors import STOPPED

STEPS, STEP_SECONDS = 8, 0.02


def still_runs(process: str) -> bool:
    """Neither gone, nor a zombie that nobody has reaped, nor about to take the signal of its sweep's end."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    dead = fields["State"].startswith(("Z", "X"))
    return not dead and not any(int(fields[name], 16) for name in ("SigPnd", "ShdPnd"))


def main() -> None:
    config_path = Path(sys.argv[sys.argv.index("--config") + 1])
    overrides = [word for flag, word in zip(sys.argv, sys.argv[1:], strict=False) if flag == "--set"]
    assert "--resume" in sys.argv
    config = load_config(config_path, overrides)
    output = Path(config.train.output_dir)
    host = socket.gethostname()  # hosts number their processes each by itself
    mine = output / f"at-work-{host}-{os.getpid()}"
    mine.touch()
    for other in output.glob(f"at-work-{host}-*"):  # of processes that were killed, unless one still runs
        if other != mine:
            assert not still_runs(other.name.rpartition("-")[2]), "two runs in one directory"
            other.unlink()
    with (output / "starts").open("a") as starts:
        starts.write("x")
    if config.model.dropout > 0.9:
        (output / "metrics.json").write_text(json.dumps({"stopped": "non-finite loss", "train": {"steps": 3}}))
        sys.exit(STOPPED)
    if config.model.dropout > 0.8:
        sys.exit("this run fails")
    checkpoint = output / "checkpoint.json"
    content = [config.model.model_dump(mode="json"), config.train.seed, config.dense.learning_rate]
    step, state = json.loads(checkpoint.read_text()) if checkpoint.is_file() else (0, json.dumps(content))
    while step < STEPS:
        time.sleep(STEP_SECONDS)
        step, state = step + 1, hashlib.sha256(state.encode()).hexdigest()
        partial = output / "checkpoint.partial"
        partial.write_text(json.dumps([step, state]))
        partial.replace(checkpoint)
    loss = 0.3 + int(state[:8], 16) / 2**33
    quality = {"auc": 1 - loss, "logloss": loss, "ne": loss, "calibration": 1.0}
    train = {"steps": STEPS, "examples_per_second": 1000.0, "first_step_seconds": 0.1}
    test = {"test": quality} if config.train.test else {}
    (output / "metrics.json").write_text(json.dumps({**test, "valid": quality, "train": train}))


if __name__ == "__main__":
    main()
