"""A trial's process with one that attends it: neither outlives the sweep, and no two work in one directory.

The sweep starts it, here or over ssh, with a pipe as its standard input. However the sweep ends, kill -9 included,
the pipe closes, and the trial is killed. Until it has ended the directory's lock keeps its successor waiting.

Plain standard library except for small functions: it runs beside every trial.
"""

import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path
from signal import SIGKILL

from megarec.launching.hosts import accelerator
from megarec.launching.rank_process import die_with_parent

ROOT = Path(__file__).resolve().parents[2]
_BOOT = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); from megarec.scaling.trial_process import main; sys.exit(main())"
)


def attended(folder: Path, environment: dict[str, str], command: list[str]) -> list[str]:
    """The command that runs another one, attended, in this working directory.

    Args:
        folder: for its `lock` and its output, `output.txt`.
        environment: variables to set.
    """
    variables = [f"{key}={value}" for key, value in environment.items()]
    return [sys.executable, "-P", "-c", _BOOT, str(ROOT), str(Path.cwd()), str(folder), *variables, "--", *command]


def main() -> int:
    directory, folder, *rest = sys.argv[1:]
    split = rest.index("--")
    os.environ.update(dict(variable.split("=", 1) for variable in rest[:split]))
    os.environ.setdefault("DS_ACCELERATOR", accelerator())
    os.chdir(directory)
    Path(folder).mkdir(parents=True, exist_ok=True)
    threading.Thread(target=_end_with_the_sweep, daemon=True).start()
    with (Path(folder) / "lock").open("a") as lock, (Path(folder) / "output.txt").open("a") as log:
        fcntl.flock(lock, fcntl.LOCK_EX)
        child = subprocess.Popen(
            rest[split + 1 :],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=(lock.fileno(),),  # it holds the lock as well: should this process be killed alone
            preexec_fn=lambda: die_with_parent(SIGKILL),
        )
        return child.wait()


def _end_with_the_sweep() -> None:
    sys.stdin.read()
    os._exit(128 + SIGKILL)  # the kernel kills the child
