"""The check of one GPU, on a CPU and tiny: its table, its JSON, and what becomes of a part that fails."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from megarec.parity.cases import Case
from tests.processes import python
from tools.gpu import numbers
from tools.gpu.context import SIZES, Context
from tools.gpu.runner import PARTS, expected

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore", "COLUMNS": "200"}
# Parts of its own in the place of the real ones: the forks have them too.
BROKEN = """
import os, runpy, signal, sys, time
from tools.gpu import ceilings, runner
from tools.gpu.runner import Part
def beyond(context):
    context.emit("loss", float("nan"), limit=1e-5)
    context.emit("other", 0.5, limit=1.0)
    context.check_limits()
def hang(context):
    context.emit("before", 1.0, "s")
    time.sleep(600)
def alone(context):
    if context.rank == 1: raise RuntimeError("rank 1 is out")
    time.sleep(600)
ceilings.raises = lambda context: 1 / 0
ceilings.beyond, ceilings.hang, ceilings.alone = beyond, hang, alone
ceilings.dies = lambda context: os.kill(os.getpid(), signal.SIGKILL)
names = ("raises", "beyond", "hang", "dies")
runner.PARTS = tuple(Part(name, 1, "ceilings", name) for name in names) + (
    Part("alone", 60, "ceilings", "alone", ranks=2), Part("ceilings", 60, "ceilings"))
sys.argv = ["gpu_check.py", "--device", "cpu", "--tiny", "--out", sys.argv[1]]
runpy.run_path("tools/gpu_check.py", run_name="__main__")
"""


def test_every_part_runs_tiny_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    done = python("tools/gpu_check.py", "--device", "cpu", "--tiny", "--out", out, cwd=ROOT, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert list(found["parts"]) == [part.name for part in PARTS]
    for name, part in found["parts"].items():
        assert part["rows"] and "failed" not in part, (name, part)
    whats = {name: [row["what"] for row in part["rows"]] for name, part in found["parts"].items()}
    assert "0.53 eager MFU" in whats["ladder"] and "0.53 examples/s" in whats["end to end"]
    assert [what.split()[0] for what in whats["true rank"] if "step" in what] == ["0.53", "1.25"]
    assert sum("tensor=2" in what for what in whats["two ranks"]) == 1
    for name in ("parity", "two ranks"):
        assert all(row["value"] <= row["limit"] for row in found["parts"][name]["rows"])
    assert [row["value"] for row in found["parts"]["repeatability, deterministic"]["rows"]] == [0, 0]
    assert expected(found["predictions"], "ceilings", "bf16 product") == "790 TFLOP/s"
    assert expected(found["predictions"], "parity", whats["parity"][0]).startswith("<= 1e-05")
    assert expected(found["predictions"], "ladder", "0.53 eager MFU").endswith("%")
    assert "predicted for an H200" in done.stdout and "790 TFLOP/s" in done.stdout


@pytest.mark.slow  # two checks in a row
def test_a_part_that_fails_is_reported_and_ends_no_other(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    done = python("-c", BROKEN, out, cwd=ROOT, env=ENVIRONMENT)
    assert done.returncode == 1, done.stderr
    parts: dict[str, Any] = json.loads(out.read_text())["parts"]
    assert parts["raises"]["failed"] == "ZeroDivisionError: division by zero"
    assert "1 / 0" in parts["raises"]["traceback"] or "ZeroDivisionError" in parts["raises"]["traceback"]
    assert parts["beyond"]["failed"] == "AssertionError: 1 of 2 beyond their limits: loss: nan > 1e-05"
    assert parts["hang"]["failed"] == "cut off after 1 s" and parts["hang"]["rows"][0]["what"] == "before"
    assert parts["dies"]["failed"] == "a process died without a result (exit code -9)"
    assert parts["alone"]["failed"] == "RuntimeError: rank 1 is out" and parts["alone"]["seconds"] < 30
    assert parts["ceilings"]["rows"] and "failed" not in parts["ceilings"]
    assert "FAILED" in done.stdout and "division by zero" in done.stdout


HANGING = """
import os, signal, sys, time
from pathlib import Path
from tools.gpu import runner
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored
def hang(name, device, size, shared, directory, rank):
    (directory / "ready").touch()
    (shared / "pid.partial").write_text(str(os.getpid()))
    (shared / "pid.partial").rename(shared / "pid")
    time.sleep(600)
runner.PREDICTIONS = runner.Part("predictions", 0.1, "")
def quick(name, *rest):
    (rest[3] / "ready").touch()
runner._work = lambda name, *rest: (hang if name == "hang" else quick)(name, *rest)
def keep(result):
    Path(sys.argv[1], "kept").write_text(" ".join(result["parts"]))
parts = [runner.Part("quick", 60, ""), runner.Part("hang", 300, "")]
runner.run_parts(parts, "cpu", "tiny", Path(sys.argv[1]), 300.0, keep)
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_part_outlives_the_check(tmp_path: Path, signum: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HANGING, tmp_path], cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE
    ) as check:
        pid_file = tmp_path / "hang/pid"
        while not pid_file.exists() or not (tmp_path / "hang/go").exists():
            assert check.poll() is None
            time.sleep(0.01)
        part = psutil.Process(int(pid_file.read_text()))
        check.send_signal(signum)
        assert check.wait(30) == -signum
    assert not psutil.wait_procs([part], timeout=60)[1]
    assert (tmp_path / "kept").read_text() == "quick"  # what there is, is kept


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda"], "finds no GPU here; --device cpu runs the same parts, small"),
        (["--device", "cpu", "--out", "."], "--out .: is not a regular file; expected the name of a file to write"),
        (["--device", "cpu", "--out", "none/gpu.json"], "--out none/gpu.json: there is no directory none"),
        (["--device", "cpu", "--part", "ladders"], "--part 'ladders': there is no such part; did you mean 'ladder'?"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    out = [] if "--out" in arguments else ["--out", tmp_path / "gpu.json"]
    done = python("tools/gpu_check.py", *out, *arguments, cwd=ROOT, env=ENVIRONMENT, real="--part" in arguments)
    assert (done.returncode, done.stdout) == (2, "") and message in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "gpu.json").exists()


def test_sizes_are_those_of_the_review() -> None:
    cuda = SIZES["cuda"]
    assert cuda.gemm == 8192 and cuda.job == (32, 8) and cuda.rows == ("61", "108")
    assert [row for row, _ in cuda.ladder] == ["0.53", "1.25", "2.12", "5.6", "22.23"]
    assert sum(part.seconds for part in PARTS) < 600


def test_ranks_go_on_together_after_a_case_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = numbers.dist.HashStore()
    monkeypatch.setattr(numbers, "case_losses", lambda path, overrides, steps: [1.0] if "good" in overrides else 1 / 0)
    bad, good = Case(2, topology=("bad",)), Case(2, topology=("good",))
    for case in (bad, good):
        store.set(f"{case.name}/1", "")  # the other rank
    kept = {"path": tmp_path, "cases": [bad, good], "references": {(): [1.0]}, "store": store}
    context = Context(CPU, SIZES["tiny"], tmp_path, tmp_path, rank=0, kept=kept)
    with pytest.raises(AssertionError, match="2 ranks, bad: ZeroDivisionError"):
        numbers.run_parity(context)
    assert [row["value"] for row in kept["rows"]] == ["failed", 0.0]


def test_a_limit_takes_no_nan(tmp_path: Path) -> None:
    context = Context(CPU, SIZES["tiny"], tmp_path, tmp_path, rank=0)
    context.emit("fine", 1.0, limit=1.0)
    context.check_limits()
    context.emit("not", float("nan"), limit=1.0)
    with pytest.raises(AssertionError, match="1 of 2 beyond their limits: not: nan > 1"):
        context.check_limits()
