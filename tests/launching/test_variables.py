"""Keys and tokens of .deepspeed_env reach the ranks, and no command line; no file of the working directory is run."""

import argparse
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from megarec.errors import UserError
from megarec.launching.commands import assignment_of
from megarec.launching.variables import file_of, read_variables, variables_on

ROOT = Path(__file__).parents[2]
SECRET = "s3cr3t $(touch pwned) ü"


def test_a_file_of_mode_600_that_is_gone_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    before = os.umask(0)
    try:
        with variables_on(None, "0123abcd", {"TOKEN": SECRET}):
            assert stat.S_IMODE(file_of("0123abcd").stat().st_mode) == 0o600
            assert read_variables("0123abcd") == {"TOKEN": SECRET} and read_variables("another") == {}
    finally:
        os.umask(before)
    assert not list(tmp_path.iterdir())
    with variables_on(None, "0123abcd", {}):
        assert not list(tmp_path.iterdir())


def test_over_ssh_only_standard_input_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for ssh that keeps its command and runs it."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "ssh").write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/commands\nshift 5\nexec sh -c "$*"\n')
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with variables_on(["host1", "host2"], "0123abcd", {"TOKEN": SECRET}):  # one home for both
        assert read_variables("0123abcd") == {"TOKEN": SECRET}
        assert len(list((tmp_path / "home").iterdir())) == 1
    assert not list((tmp_path / "home").iterdir())
    commands = (tmp_path / "commands").read_text()
    assert "host1" in commands and "host2" in commands and "s3cr3t" not in commands and "TOKEN" not in commands


def test_a_home_that_takes_no_file_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "gone"))
    expected = r"this machine: [^\n]* cannot be written to ~/\.megarec-a there \(File[^\n]*$"
    with pytest.raises(UserError, match=expected), variables_on(None, "a", {"TOKEN": "x"}):
        pass


def test_no_command_line_has_a_value(tmp_path: Path) -> None:
    """launch/run.sh as people type it, with a rank that looks at the command lines of all its ancestors, and in a
    directory whose json.py would take over whatever imports it."""
    home, place = tmp_path / "home", tmp_path / "work"
    for directory in (home, place):
        directory.mkdir()
    (home / ".deepspeed_env").write_text(f"HOME_TOKEN={SECRET}\n")
    (place / ".deepspeed_env").write_text("WORK_TOKEN=wörk=\n")
    for name in ("json", "argparse", "signal", "deepspeed", "psutil"):
        (place / f"{name}.py").write_text(f"open({str(tmp_path / 'taken_over')!r}, 'w')")
    (place / "run.json").write_text("{}")
    shutil.copytree(ROOT / "launch", tmp_path / "checkout/launch")
    shutil.copytree(ROOT / "megarec", tmp_path / "checkout/megarec", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "checkout/megarec/train.py").write_text(
        "import os, psutil\n"
        "lines = [' '.join(p.cmdline()) for p in psutil.Process().parents()]\n"
        "assert os.environ['HOME_TOKEN'] == 's3cr3t $(touch pwned) ü', os.environ['HOME_TOKEN']\n"
        "assert os.environ['WORK_TOKEN'] == 'wörk='\n"
        "assert any('deepspeed.launcher' in line for line in lines), lines\n"
        "print('shown', any('s3cr3t' in line for line in lines), flush=True)\n"
    )
    config = {"data": {"path": "data"}, "model": {"name": "dnn"}}
    (place / "run.json").write_text(json.dumps(config))
    environment = {**os.environ, "HOME": str(home), "MEGAREC_VENV": sys.prefix, "DS_ACCELERATOR": "cpu"}
    environment.pop("PYTHONPATH", None)
    command = ["bash", str(tmp_path / "checkout/launch/run.sh"), "--num_gpus", "1", "--config", "run.json"]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    assert not (tmp_path / "taken_over").exists()
    assert done.returncode == 0, done.stderr
    assert "shown False" in done.stdout
    assert {path.name for path in home.iterdir()} - {".cache", ".triton"} == {".deepspeed_env"}


def test_an_assignment_has_none_of_them() -> None:
    arguments = argparse.Namespace(config="run.json", set=[], grace=60.0)
    assert set(assignment_of("job", arguments, ["lo"], resume=False).environment) <= {
        "TORCH_CPP_LOG_LEVEL", "PYTHONUNBUFFERED", "DS_ACCELERATOR", "OMP_NUM_THREADS"
    }  # fmt: skip
