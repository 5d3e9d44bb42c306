"""The launch scripts hand on the arguments they are given; a stand-in for the environment's programs shows them."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ODD = "train.output_dir=it's $(touch pwned) 100%n"
STAND_IN = """#!/bin/sh
exec "{python}" -c 'import json, sys; print(json.dumps(["{name}", *sys.argv[1:]]), file=open("{log}", "a"))' "$@"
"""


def calls(tmp_path: Path, script: str, *arguments: str) -> list[list[str]]:
    """What a script of launch/ calls of the environment, after its installation."""
    for folder in ("launch", "ds_configs/studies"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    for path in ROOT.glob("requirements*.txt"):
        shutil.copy(path, tmp_path)
    log, programs = tmp_path / "log", tmp_path / "environment/bin"
    programs.mkdir(parents=True)
    for name in ("python", "deepspeed"):
        (programs / name).write_text(STAND_IN.format(python=shutil.which("python3"), name=name, log=log))
        (programs / name).chmod(0o755)
    environment = {**os.environ, "MEGAREC_VENV": str(tmp_path / "environment"), "PYTHON": "python3"}
    command = ["bash", str(tmp_path / "launch" / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("pwned"))
    installation, *others = [json.loads(line) for line in log.read_text().splitlines()]
    assert installation[:4] == ["python", "-P", "-m", "pip"]
    return others


def test_the_quickstart_trains_with_its_overrides(tmp_path: Path) -> None:
    prepared, trained = calls(tmp_path, "quickstart.sh", "--set", ODD)
    assert prepared[:3] == ["python", "tools/prepare_data.py", "movielens-100k"]
    assert trained[0] == "deepspeed" and trained[-2:] == ["--set", ODD]


def test_the_tests_take_the_arguments_of_pytest(tmp_path: Path) -> None:
    (ran,) = calls(tmp_path, "test.sh", "tests/models", "-x")
    assert ran[:3] == ["python", "-m", "pytest"] and ran[-2:] == ["tests/models", "-x"]


@pytest.mark.parametrize(("arguments", "jobs"), [([], "2"), (["5"], "5")])
def test_the_planted_study_runs_so_many_at_a_time(arguments: list[str], jobs: str, tmp_path: Path) -> None:
    prepared, swept, *rest = calls(tmp_path, "planted.sh", *arguments)
    assert prepared[1:3] == ["tools/prepare_data.py", "synthetic"]
    assert swept[1:3] == ["tools/scaling_law.py", "sweep"] and swept[-2:] == ["--jobs", jobs]
    assert [call[2] for call in rest] == ["table", "fit", "plot"]


def test_the_study_of_towers_partitions_before_it_runs(tmp_path: Path) -> None:
    prepared, *partitioned, swept, table = calls(tmp_path, "towers.sh", "3", "towers-first")
    assert prepared[1:3] == ["tools/prepare_data.py", "grouped"]
    assert [call[1] for call in partitioned] == ["tools/partition_towers.py"] * 4
    assert swept[swept.index("--study") + 1] == "ds_configs/studies/towers-first.json"
    assert swept[1:3] == ["tools/scaling_law.py", "sweep"] and swept[-2:] == ["--jobs", "3"]
    assert table[1:3] == ["tools/scaling_law.py", "towers"]
