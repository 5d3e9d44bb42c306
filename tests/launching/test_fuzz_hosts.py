"""Malformed hostfiles, .deepspeed_env files and rendezvous variables, seeded: read, or refused in one line."""

import os
import random
from pathlib import Path

import pytest

from megarec.distributed.process import device_number
from megarec.distributed.rendezvous import check_variables, keep_to_loopback
from megarec.errors import UserError
from megarec.launching.exit_report import rank_number
from megarec.launching.hosts import MOST_BYTES, read_environment, read_hostfile

NAMES = ["node-1", "node-2", "-oProxyCommand=x", "a b", "ü", "10.0.0.1", "n[1-9]", "$(reboot)", "", "x" * 5_000, "\0"]
SLOTS = ["slots=1", "slots=8", "slots=0", "slots=-1", "slots=1e3", "slots=٣", "slots=" + "9" * 5_000, "slots=", "8", ""]
JOINTS = [" ", "\t", "  ", "", "\0", "\x0b", " \u2028 "]
ENDS = ["\n", "\r\n", "", "\n\n", " # comment\n", "\x1c", "\ufeff\n"]
KEYS = ["TOKEN", "export TOKEN", "", "1A", "A-B", "A\0", "Ü", "#A", "LD_PRELOAD"]
VALUES = ["x", "", "a=b", "it's $(x)", "\0", "ü", "x" * 5_000, "\ud800"]
NUMBERS = [
    "0",
    "1",
    "2",
    "-1",
    "",
    " 1",
    "1.0",
    "1e3",
    "٣",
    "9" * 5_000,
    "x",
    "0x10",
    "+1",
    "65536",
    "29500",
    "1_0",
    "²",
]
ADDRESSES = ["127.0.0.1", "localhost", "::1", "", "x" * 300, "a..b", "\0", "host with space", "[::1]", "ü." * 40]
CORRECT = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def damaged(text: str, chance: random.Random) -> bytes:
    content = bytearray(text.encode(errors="surrogatepass"))
    if chance.random() < 0.3 and content:
        for _ in range(3):
            content[chance.randrange(len(content))] = chance.randrange(256)
    return bytes(content)


def assert_one_line(error: UserError, *named: str) -> None:
    text = str(error)
    assert text.isprintable() and all(name in text for name in named), text
    assert len(text) < 12_000


def test_hostfiles(tmp_path: Path) -> None:
    chance, path, read = random.Random(13), tmp_path / "hostfile", 0
    for number in range(300):
        good = number % 3 == 0
        names, slots = (NAMES[:2], SLOTS[:1]) if good else (NAMES, SLOTS)
        joints, ends = (JOINTS[:3], ENDS[:2]) if good else (JOINTS, ENDS)
        lines = [[chance.choice(part) for part in (names, joints, slots, ends)] for _ in range(chance.randrange(1, 4))]
        path.write_bytes(damaged("".join(map("".join, lines)), chance))
        try:
            hosts = read_hostfile(path)
        except UserError as error:
            assert_one_line(error, str(path))
        else:
            read += 1
            assert hosts and len({host.name for host in hosts}) == len(hosts)
            assert all(host.slots >= 1 and host.name.isascii() and not host.name.startswith("-") for host in hosts)
    assert read > 20


def test_files_that_are_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "long").write_text("# a comment\n" * (MOST_BYTES // 10))
    for path in (tmp_path, tmp_path / "fifo", Path("/dev/zero"), tmp_path / "long", tmp_path / "no", Path("a\0b")):
        with pytest.raises(UserError) as refused:
            read_hostfile(path)
        assert_one_line(refused.value)
    os.mkfifo(tmp_path / ".deepspeed_env")
    with pytest.raises(UserError, match="it is not a file"):
        read_environment([tmp_path])


def test_variables_of_ranks(tmp_path: Path) -> None:
    chance, path, read = random.Random(14), tmp_path / ".deepspeed_env", 0
    for number in range(300):
        keys, values = (KEYS[:1], VALUES[:4]) if number % 3 == 0 else (KEYS, VALUES)
        lines = [f"{chance.choice(keys)}={chance.choice(values)}\n" for _ in range(chance.randrange(4))]
        path.write_bytes(damaged("".join(lines), chance))
        try:
            found = read_environment([tmp_path])
        except UserError as error:
            assert_one_line(error, str(path))
        else:
            read += 1
            assert all("\0" not in key + value and "=" not in key for key, value in found.items())
    assert read > 20


def test_rendezvous_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    chance, accepted = random.Random(15), 0
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    for _ in range(400):
        variables = dict(CORRECT)
        for name in chance.sample(sorted(variables), chance.randrange(3)):
            value = chance.choice([*(ADDRESSES if name == "MASTER_ADDR" else NUMBERS), None])
            if value is None:
                del variables[name]
            else:
                variables[name] = value
        keep_to_loopback(variables)
        try:
            check_variables(variables)
        except UserError as error:
            assert_one_line(error)
            wrong = str(error).split("=")[0].split(" ")[0]
            assert variables.get(wrong) != CORRECT.get(wrong) or wrong in ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        else:
            accepted += 1
            assert "RANK" not in variables or int(variables["RANK"]) < int(variables["WORLD_SIZE"])
    assert accepted > 50


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set, while RANK is set: expected the address of rank 0's host"),
        ({"MASTER_PORT": "abc"}, "MASTER_PORT='abc', while RANK is set: expected a whole number from 1 to 65535"),
        ({"MASTER_PORT": None}, "MASTER_PORT is not set, while RANK is set: expected"),
        ({"RANK": "2"}, "RANK='2', while RANK is set: expected a whole number from 0 to 1"),
        ({"RANK": "x"}, "RANK='x', while RANK is set: expected a whole number from 0 to 1"),
        ({"RANK": None}, "WORLD_SIZE='2', while RANK is not set: expected RANK beside it"),
        ({"WORLD_SIZE": None}, "WORLD_SIZE is not set, while RANK is set: expected"),
        ({"LOCAL_RANK": None}, "LOCAL_RANK is not set, while RANK is set: expected"),
        ({"LOCAL_WORLD_SIZE": "many"}, "LOCAL_WORLD_SIZE='many', while RANK is set: expected"),
        ({"MASTER_ADDR": "a..b"}, "MASTER_ADDR='a..b', while RANK is set: expected a name or address"),
    ],
)
def test_a_variable_that_is_missing_or_wrong_is_named(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, str | None], line: str
) -> None:
    variables = {key: value for key, value in (CORRECT | change).items() if value is not None}
    with pytest.raises(UserError) as refused:
        check_variables(variables)
    assert str(refused.value).startswith(line)
    monkeypatch.setenv("RANK", variables.get("RANK", ""))
    assert rank_number() in (0, 2)


def test_a_rank_without_a_device_of_its_own_names_how_many_there_are() -> None:
    assert [device_number({"LOCAL_RANK": number}, 2) for number in ("0", "1")] == [0, 1]
    with pytest.raises(UserError, match=r"LOCAL_RANK=2: this host shows 2 devices to the rank; start at most 2 ranks"):
        device_number({"LOCAL_RANK": "2"}, 2)
