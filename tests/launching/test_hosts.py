from pathlib import Path

import pytest

from megarec.errors import UserError
from megarec.launching.hosts import Host, read_environment, read_hostfile


def test_hosts_in_order_with_their_ranks(tmp_path: Path) -> None:
    path = tmp_path / "hostfile"
    path.write_text("# the rack\n\nnode-1.rack slots=4  # with a comment\n  node_2\tslots=4\n")
    hosts = read_hostfile(path)
    assert hosts == [Host("node-1.rack", 4, 0), Host("node_2", 4, 4)]
    assert [host.ranks for host in hosts] == ["ranks 0-3", "ranks 4-7"]
    assert Host("one", 1, 7).ranks == "rank 7"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a slots=2\nb slots=x\n", ":2: 'b slots=x' is not a host; expected 'NAME slots=N'"),
        ("a\n", ":1: 'a' is not a host"),
        ("a slots=2 max_slots=4\n", ":1: 'a slots=2 max_slots=4' is not a host"),
        ("a slots=0\n", ":1: a has slots=0"),
        ("a slots=2\n\na slots=2\n", ":3: host 'a' is listed twice, first in line 1"),
        ("a slots=2\nb slots=4\n", ":2: b has slots=4, but a has slots=2; every host needs equal slots"),
        ("# nothing\n", ": lists no host"),
    ],
)
def test_mistakes_are_reported_with_their_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "hostfile"
    path.write_text(text)
    with pytest.raises(UserError) as raised:
        read_hostfile(path)
    assert str(raised.value).startswith(f"{path}{message}")


@pytest.mark.parametrize(
    "name", ["$(reboot)", "a;b", "-oProxyCommand=x", "node[1-4]", "a,b", "a'b", "user@host", "a%n", "^file"]
)
def test_names_that_ssh_pdsh_or_a_shell_would_read_as_more_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "hostfile"
    path.write_text(f"{name} slots=1\n")
    with pytest.raises(UserError, match="is not a host's name"):
        read_hostfile(path)


def test_a_missing_hostfile(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be read \(No such file"):
        read_hostfile(tmp_path / "none")


def test_variables_of_the_working_directory_go_before_those_at_home(tmp_path: Path) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    for directory, text in ((home, "A=1\nB=a b=$c\n"), (here, "A=2\n")):
        directory.mkdir()
        (directory / ".deepspeed_env").write_text(text)
    assert read_environment([home, here, tmp_path]) == {"A": "2", "B": "a b=$c"}


@pytest.mark.parametrize("line", ["# comment", "", "export A=1", "A", "=1", "1A=2"])
def test_anything_but_key_and_value_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / ".deepspeed_env").write_text(f"A=1\n{line}\nB=1\n")
    with pytest.raises(UserError, match=r"\.deepspeed_env:2: .*expected KEY=VALUE"):
        read_environment([tmp_path])
