"""A forked script ends as one of a fresh interpreter does, and has found everything imported."""

import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.processes import lives, python

PROGRAM = """
import os, sys, threading, time
print(sys.argv[1:], __name__, os.getcwd(), sorted(k for k in os.environ if k.startswith("MEGAREC")), sys.path[0])
print("and", "errors", file=sys.stderr)
def late():
    time.sleep(0.1)
    print("late")
threading.Thread(target=late).start()
import atexit
atexit.register(print, "last")
"""


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("", 0),
        ("sys.exit()", 0),
        ("sys.exit(75)", 75),
        ("sys.exit('a mistake')", 1),
        ("raise KeyError('x')", 1),
        ("os.kill(os.getpid(), 15)", -15),
    ],
)
def test_a_fork_ends_as_a_fresh_interpreter_does(end: str, code: int, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(PROGRAM + end)
    given = {"cwd": tmp_path, "env": {**os.environ, "MEGAREC_WORD": "x"}}
    forked, fresh = (python(script, "a b", 3, real=real, **given) for real in (False, True))
    assert forked.returncode == fresh.returncode == code
    assert forked.stdout == fresh.stdout
    assert forked.stderr.splitlines()[0] == "and errors"
    assert forked.stderr.splitlines()[-1] == fresh.stderr.splitlines()[-1]


def test_code_and_modules(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package/part.py").write_text("import sys; print(__name__, sys.argv[1:])")
    for words in (("-c", "import sys; print(sys.argv)", 1), ("-m", "package.part", 2)):
        forked, fresh = (python(*words, cwd=tmp_path, real=real) for real in (False, True))
        assert forked.returncode == 0 and forked.stdout == fresh.stdout


def test_it_has_everything_and_none_of_the_tests_paths() -> None:
    code = "import sys; print('deepspeed' in sys.modules, '__compatible_ops__' in vars(sys.modules['deepspeed.ops']))"
    assert python("-c", code).stdout == "True True\n"
    assert python("-c", "import conftest").stderr.endswith("No module named 'conftest'\n")


@pytest.mark.parametrize("real", [False, True])
def test_the_job_of_this_process_is_not_the_scripts(real: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run in a test process leaves its variables, and its store listens on."""
    job = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "26546"}
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    code = f"import os; print([os.environ.get(name) for name in {list(job)}])"
    assert python("-c", code, real=real).stdout == f"{[None] * 5}\n"
    assert python("-c", code, env={**os.environ, "DS_ACCELERATOR": "cpu"}, real=real).stdout == f"{[None] * 5}\n"
    other = {**os.environ, "MASTER_PORT": "26547"}
    assert python("-c", code, env=other, real=real).stdout == f"{[*list(job.values())[:4], '26547']}\n"


def test_one_that_takes_too_long_is_killed() -> None:
    with pytest.raises(subprocess.TimeoutExpired) as raised:
        python("-c", "import time; print('begun', flush=True); time.sleep(600)", timeout=5)
    assert raised.value.output in (b"begun\n", b"")  # a busy machine may not have come so far


def warm(venv: Path, *words: str, given: str = "", **options: Any) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([venv / "bin/python", *words], input=given, capture_output=True, text=True, **options)


def test_a_shell_finds_forks(warm_venv: Path, tmp_path: Path) -> None:
    code = "import sys; print('deepspeed' in sys.modules, input(), sys.argv, file=sys.stderr); sys.exit(75)"
    done = warm(warm_venv, "-u", "-c", code, "x", given="typed\n", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (75, "", "True typed ['-c', 'x']\n")
    grandchild = "import sys; print('torch' in sys.modules)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    assert warm(warm_venv, "-c", child).stdout == "True\n"
    assert warm(warm_venv, "-c", "import os, signal; os.kill(os.getpid(), 9)").returncode == -9
    assert warm(warm_venv, "-", given="import sys; print('torch' in sys.modules)").stdout == "False\n"
    source = subprocess.run(["bash", "-c", f"{warm_venv}/bin/deepspeed --help"], capture_output=True, text=True)
    assert source.returncode == 0 and "usage: deepspeed" in source.stdout


def test_signals_reach_a_fork_and_it_ends_with_who_asked_for_it(warm_venv: Path) -> None:
    code = (
        "import os, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
        "print(os.getpid(), flush=True); time.sleep(600)"
    )
    for number, code_of_its_own in ((signal.SIGTERM, 7), (signal.SIGKILL, -9)):
        with subprocess.Popen([warm_venv / "bin/python", "-c", code], stdout=subprocess.PIPE, text=True) as asking:
            assert asking.stdout is not None
            fork = psutil.Process(int(asking.stdout.readline()))
            asking.send_signal(number)
            assert asking.wait(60) == code_of_its_own
        psutil.wait_procs([fork], timeout=60)
        assert not lives(fork)


def test_no_test_gives_up_the_private_backend_of_its_process() -> None:
    """The simulated accelerator takes it for good: only scripts of tests/device may import it, in their own process."""
    tests = Path(__file__).parent
    importing = {
        str(path.relative_to(tests))
        for path in tests.rglob("*.py")
        if re.search(
            r"^from tests\.device\.(simulated|measure|glue|dense_bytes) import", path.read_text(), re.MULTILINE
        )
    }
    assert {path for path in importing if not path.startswith("device/") or "/test_" in path} == set()
