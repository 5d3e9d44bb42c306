"""What is started, as a remote shell will read it."""

import argparse
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megarec.distributed.rendezvous import free_port
from megarec.errors import UserError
from megarec.launching.commands import (
    assignment_of,
    deepspeed_command,
    local_command,
    torchrun_commands,
    visible_devices,
)
from megarec.launching.hosts import Host, on_ssh_host
from megarec.launching.rank_process import Assignment

WORD = Assignment("job", "/it's $(here)", ["train.py", "--set", 'a=`b` "c"'], {"KEY": "$v"}, ["eth0"]).encode()
FAKE_PDSH = """#!/bin/sh
shift 5
echo "$*"
"""


@given(st.text(), st.lists(st.text()), st.dictionaries(st.text(), st.text()))
def test_an_assignment_is_one_word_that_no_shell_changes(
    directory: str, command: list[str], environment: dict[str, str]
) -> None:
    assignment = Assignment("job", directory, command, environment, ["eth0"])
    word = assignment.encode()
    assert shlex.quote(word) == word and "%" not in word
    assert Assignment.decode(word) == assignment


@given(
    st.lists(st.text(st.characters(blacklist_characters="\0", blacklist_categories=("Cs",))), min_size=1, max_size=4)
)
def test_a_remote_shell_gives_the_command_its_words(words: list[str]) -> None:
    *_, host, remote = on_ssh_host("host1", ["printf", "%s\\0", *words])
    assert host == "host1"
    done = subprocess.run(["sh", "-c", remote], capture_output=True, check=True)
    assert done.stdout.decode().split("\0")[:-1] == words


def test_the_deepspeed_launcher_hands_pdsh_a_command_with_nothing_unquoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real runner, with a pdsh that shows its command; a shell then reads it as the remote one would."""
    (tmp_path / "pdsh").write_text(FAKE_PDSH)
    (tmp_path / "pdsh").chmod(0o755)
    hostfile = tmp_path / "host file"
    hostfile.write_text("host1 slots=1\nhost2 slots=1\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", "/with space/$(touch pwned)")
    script = Path("/a checkout/it's $(touch pwned) 100%n/megarec/launching/rank.py")
    command = deepspeed_command(hostfile, WORD, "10.0.0.1", 29500, 600, script)
    done = subprocess.run(command.argv, env=command.environment, cwd="/", capture_output=True, text=True, check=True)
    exports, directory, launch = done.stdout.strip().split("; ", 2)
    assert (exports.split(";")[0], directory.strip()) == ("export PYTHONPATH=/", "cd /")
    words = shlex.split(launch)
    assert words[:4] == [sys.executable, "-u", "-m", "deepspeed.launcher.launch"]
    assert words[-2:] == [str(script).replace("%", "%%"), WORD]
    assert "--node_rank=%n" in words and "--no_local_rank" in words


def test_what_the_launcher_would_pass_unquoted_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = (tmp_path / "hostfile", WORD, "10.0.0.1", 29500, 600.0)
    monkeypatch.setenv("UCX_TLS", "$(reboot)")
    with pytest.raises(UserError, match=r"UCX_TLS='\$\(reboot\)': DeepSpeed's launcher hands it to a shell unquoted"):
        deepspeed_command(*where)
    monkeypatch.delenv("UCX_TLS")
    monkeypatch.setattr(sys, "executable", "/my venv/bin/python")
    with pytest.raises(UserError, match="/my venv/bin/python: DeepSpeed's launcher hands the path of Python"):
        deepspeed_command(*where)


def test_config_and_overrides_reach_the_ranks_word_for_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """launch/run.sh as people type it, with a rank that shows its words, through the real deepspeed launcher."""
    directory = tmp_path / 'it\'s $(touch pwned) "here"'
    directory.mkdir()
    monkeypatch.chdir(directory)
    (directory / "show.py").write_text("import sys; print(repr(sys.argv[1:]))")
    config, override = "my $(touch pwned) `run`.json", "train.output_dir=a \"b\" 'c' ; touch pwned"
    arguments = argparse.Namespace(config=config, set=[override], grace=60.0)
    assignment = assignment_of("job", arguments, ["lo"], resume=True)
    script, *words = assignment.command
    assert script.endswith("megarec/train.py") and words == ["--config", config, "--set", override, "--resume"]
    word = replace(assignment, command=[str(directory / "show.py"), *words]).encode()
    command = local_command(1, word, free_port())
    done = subprocess.run(command.argv, env=command.environment, cwd="/", capture_output=True, text=True, check=True)
    assert repr(words) in done.stdout.splitlines()
    assert not list(tmp_path.rglob("pwned")) and not Path("/pwned").exists()


def test_a_torchrun_a_host() -> None:
    hosts = [Host("a", 2, 0), Host("b", 2, 2)]
    commands = torchrun_commands(hosts, WORD, "10.0.0.1", 29501, 60)
    assert [command.host for command in commands] == ["a", "b"]
    program, *words = shlex.split(commands[1].argv[-1])
    assert program == "exec" and words[0] == sys.executable
    assert words[1].endswith("megarec/launching/torchrun.py")
    assert shlex.join(words[2:-2]) == (
        "--nnodes 2 --node_rank 1 --nproc_per_node 2 --master_addr 10.0.0.1 --master_port 29501"
    )
    assert words[-1] == WORD


def test_the_devices_that_the_user_chose_are_those_of_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_devices(8) == {}
    for chosen in ("2,3", "GPU-8932f937,GPU-46309b04", "2,3,5"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
        assert visible_devices(2) == {"CUDA_VISIBLE_DEVICES": chosen}
        assert "CUDA_VISIBLE_DEVICES" not in local_command(2, WORD, 29500).environment
    for chosen, count in (("2", 1), ("", 0), ("2,", 1)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
        expected = f"--num_gpus 2: CUDA_VISIBLE_DEVICES='{chosen}' shows {count}; give as many as ranks"
        with pytest.raises(UserError, match=expected):
            visible_devices(2)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert visible_devices(2) == {"CUDA_VISIBLE_DEVICES": "2,"}
