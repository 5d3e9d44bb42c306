"""The package as others see it: its public names, the `megarec` command, its metadata."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import megarec
from megarec import ray_cluster
from megarec.commands.cli import COMMANDS, LAUNCH
from megarec.scaling import proposals
from tests import processes

ROOT = Path(__file__).parents[1]


def python(*words: str, real: bool = True) -> "subprocess.CompletedProcess[str]":
    return processes.python(*words, cwd=ROOT, real=real)


def pins(file: str) -> set[str]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return {line for line in lines if line and not line.startswith("#")}


def test_every_public_name_is_there() -> None:
    assert all(getattr(megarec, name) is not None for name in megarec.__all__)
    assert set(megarec.__all__) <= set(dir(megarec))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = megarec.nothing


def test_importing_it_loads_nothing_heavy() -> None:
    ran = python(
        "-c",
        "import megarec, megarec.commands.cli, sys; print(sorted({'torch', 'pydantic', 'pyarrow'} & set(sys.modules)))",
    )
    assert ran.stdout == "[]\n", ran.stderr


@pytest.mark.parametrize("words", [["-m", "megarec"], ["-mmegarec"], ["-u", "-m", "megarec.train"]], ids=" ".join)
def test_no_module_of_the_working_directory_is_run(words: list[str], tmp_path: Path) -> None:
    for name in ("json", "argparse", "re", "typing", "pathlib", "pydantic"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name}.py of the working directory was run')")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = processes.python(*words, "--help", cwd=tmp_path, env=environment, real=True)
    assert ran.returncode == 0 and ran.stdout.startswith("usage: "), ran.stderr


def test_in_a_checkout_the_working_directory_stays_on_the_path() -> None:
    """It holds the package: processes that one of its commands starts must find the same one."""
    code = "import sys, runpy; runpy.run_module('megarec.commands.config_schema', run_name='x'); print(sys.path[0])"
    ran = subprocess.run([sys.executable, "-m", "megarec", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout.startswith("megarec "), ran.stderr
    assert processes.python("-c", code, cwd=ROOT, real=True).stdout == "\n"  # as in every program that imports it


def test_help_names_every_command() -> None:
    ran = python("-m", "megarec", "--help")
    assert ran.returncode == 0 and all(f"  {name} " in ran.stdout for name in COMMANDS)


def test_an_unknown_command_is_one_line_and_exit_2() -> None:
    ran = python("-m", "megarec", "flop")
    assert (ran.returncode, ran.stderr) == (2, "error: megarec: no command is called 'flop'; did you mean 'flops'?\n")


def test_a_command_is_the_code_of_its_tool() -> None:
    arguments = ["--config", "ds_configs/dlrm-criteo-terabyte.json", "--json"]
    command, tool = python("-m", "megarec", "flops", *arguments), python("tools/flops.py", *arguments, real=False)
    assert command.returncode == 0 and command.stdout == tool.stdout
    modules = [command.module for command in (*COMMANDS.values(), LAUNCH["preflight"]) if command.module]
    assert len(modules) == len(COMMANDS) - 1  # launch and bench have none
    for module in modules:
        name = module.rpartition(".")[2]
        script = ROOT / ("launch" if name in ("train", "preflight") else "tools") / f"{name}.py"
        assert f"from {module} import main\n" in script.read_text(encoding="utf-8")


def test_launch_has_commands_of_its_own() -> None:
    ran = python("-m", "megarec", "launch", "--help")
    assert ran.returncode == 0 and all(f"  {name} " in ran.stdout for name in LAUNCH)
    for name in LAUNCH:
        assert f"usage: megarec launch {name}" in python("-m", "megarec", "launch", name, "--help", real=False).stdout


def test_the_public_function_is_not_hidden_by_the_module_of_its_name() -> None:
    ran = python("-c", "import megarec, megarec.commands.train; print(callable(megarec.train))")
    assert ran.stdout == "True\n", ran.stderr


def test_the_metadata_agrees_with_the_pins_of_the_scripts() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert pins("requirements.txt") == {*project["dependencies"], *extras["cpu"]}
    assert pins("requirements-gpu.txt") == {*project["dependencies"], *extras["cuda"]}
    assert pins("requirements-dev.txt") == set(extras["dev"])
    assert pins("requirements-docs.txt") == set(extras["docs"])
    assert pins("requirements-serve.txt") == {*extras["export"], *extras["serve"]}
    for name, requirement in (("ray", ray_cluster.REQUIREMENT), ("search", proposals.REQUIREMENT)):
        assert extras[name] == [requirement] and requirement in extras["dev"]


def test_the_scripts_take_the_python_versions_of_the_metadata() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = [line.rpartition("3.")[2] for line in project["classifiers"] if ":: Python :: 3." in line]
    first, last = int(named[0]), int(named[-1])
    assert project["requires-python"] == f">=3.{first},<3.{last + 1}" and named == [*map(str, range(first, last + 1))]
    script = (ROOT / "launch/environment.sh").read_text(encoding="utf-8")
    assert f"(3, {first}) <= sys.version_info[:2] <= (3, {last})" in script
