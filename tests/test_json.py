"""The one reader of JSON: what it takes, and one line for each thing that it does not."""

import json
import os
import time
from pathlib import Path

import pytest

from megarec.config.load import load_config
from megarec.data.schema import read_schema
from megarec.data.sources.table_spec import load_table_spec
from megarec.errors import UserError
from megarec.files import read_json
from megarec.scaling.grid import read_grid

RUN = {"model": {"name": "lr"}, "data": {"path": "somewhere"}}
READERS = {"config": load_config, "schema": read_schema, "spec": load_table_spec, "study": read_grid}

BAD = {
    "twice": (b'{"a": {"b": 1, "b": 2}}', "the key 'a.b' is there twice, as 1 and as 2; keep one"),
    "twice in a list": (b'[{"b": {}, "c": 0, "b": []}]', "the key '0.b' is there twice, as {} and as []; keep one"),
    "deep list": (b"[" * 100_000 + b"]" * 100_000, "nested too deep"),
    "deep object": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deep"),
    "open list": (b"[" * 100_000, "nested too deep"),
    "long integer": (b'{"a": ' + b"9" * 5_000 + b"}", "a number of 5,000 digits (99999999999999999999...)"),
    "long real": (b'{"a": 0.' + b"9" * 5_000 + b"}", "a number of 5,002 digits (0.999999999999999999...)"),
    "large": (b'{"a": -1e999}', "-1e999: beyond the range of numbers"),
    "NaN": (b'{"a": NaN}', "NaN: no number of JSON"),
    "infinity": (b'{"a": [-Infinity]}', "-Infinity: no number of JSON"),
    "no JSON": (b'{"a": 1,}', ":1:9: not JSON: "),
    "empty": (b"", ":1:1: not JSON: Expecting value"),
    "Latin-1": ('{"a": "é"}'.encode("latin-1"), "not UTF-8 text at byte 7"),
    "NUL": (b'{"a": "b\\u0000"}', "a NUL or half a character"),
    "half a character": (b'{"\\ud800": 1}', "a NUL or half a character"),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_json_of_ours_is_one_line(kind: str, reader: str, tmp_path: Path) -> None:
    content, expected = BAD[kind]
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        READERS[reader](path)
    message = str(error.value)
    assert message.startswith(str(path)) and expected in message and "\n" not in message and len(message) < 400


@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_regular_file_is_one_line_and_no_wait(reader: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(4 << 30)
    wrong = {"fifo": "is a FIFO", "/dev/zero": "is a device", ".": "is a directory", "huge": "4,294,967,296 bytes"}
    wrong |= {"absent": "No such file or directory", "a" * 300: "File name too long", "a\0b": "null byte"}
    for name, why in wrong.items():
        started = time.monotonic()
        with pytest.raises(UserError, match="expected ") as error:
            READERS[reader](tmp_path / name)
        assert why in str(error.value) and "\n" not in str(error.value)
        assert time.monotonic() - started < 60


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_a_byte_order_mark_is_no_mistake(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(json.dumps({"ä": "€"}, ensure_ascii=False).encode(encoding))
    assert read_json(path, "a test's JSON") == {"ä": "€"}
    path.write_bytes(json.dumps(RUN).encode(encoding))
    assert load_config(path).data.path == "somewhere"


def test_a_section_in_another_file_is_read_by_the_same_reader(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({**RUN, "train": "train.json", "parallel": {"towers": "t.json"}}))
    (tmp_path / "train.json").write_text('{"epochs": 1, "epochs": 2}')
    with pytest.raises(UserError, match=r"train\.json: the key 'epochs' is there twice, as 1 and as 2"):
        load_config(tmp_path / "run.json")
    (tmp_path / "train.json").write_text("{}")
    (tmp_path / "t.json").write_text('{"towers": [["a"]], "towers": [["b"]]}')
    with pytest.raises(UserError, match=r"t\.json: the key 'towers' is there twice"):
        load_config(tmp_path / "run.json")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("parallel.timeout_seconds=Infinity", "Infinity: no number of JSON"),
        ("dense.eps=NaN", "NaN: no number of JSON"),
        ("dense.eps=1e999", "1e999: beyond the range of numbers"),
        ("train.epochs=" + "9" * 5_000, "a number of 5,000 digits"),
        ("model.mlp=" + "[" * 100_000, "nested too deep"),
        ('train={"epochs": 1, "epochs": 2}', "the key 'epochs' is there twice"),
    ],
)
def test_an_override_is_read_by_the_same_reader(override: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    with pytest.raises(UserError) as error:
        load_config(tmp_path / "run.json", [override])
    assert str(error.value).startswith("--set ") and expected in str(error.value) and len(str(error.value)) < 300


def test_words_of_python_mean_what_their_users_mean(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    words = ["train.fall_back=True", "train.background_checkpoints=False", "train.max_steps=None", "model.bias=False"]
    config = load_config(tmp_path / "run.json", words)
    assert config.train.fall_back and not config.train.background_checkpoints and not config.model.bias
    assert config.train.max_steps is None
