"""The one reader of JSON: what it takes, and one line for each thing that it does not."""

import ast
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megarec.checkpoint.format import Index, read_export, read_index
from megarec.checkpoint.offline import said_of
from megarec.config.load import load_config
from megarec.data.cache import _whole
from megarec.data.preparation.table_spec import load_table_spec
from megarec.data.schema import read_schema
from megarec.errors import UserError
from megarec.files import parse_json, read_json, renamed_to, write_whole
from megarec.launching.exit_report import parse
from megarec.launching.preflight import files_of
from megarec.scaling.grid import read_grid
from megarec.scaling.results import _read_row, validation_loss
from megarec.scaling.sweep import _metrics

ROOT = Path(__file__).parents[1]
RUN = {"model": {"name": "lr"}, "data": {"path": "somewhere"}}
NO_CONFIG: Any = None
READERS: dict[str, tuple[str, Callable[[Path], object]]] = {  # the file's name, and who reads it
    "config": ("a.json", load_config),
    "schema": ("schema.json", read_schema),
    "spec": ("a.json", load_table_spec),
    "study": ("a.json", read_grid),
    "preflight": ("a.json", lambda path: files_of(path, NO_CONFIG)),
    "index": ("index.json", lambda path: read_index(path.parent)),
    "export": ("config.json", lambda path: read_export(path.parent)),
    "metrics": ("metrics.json", lambda path: _metrics(path.parent)),
    "row of a trial": ("a.json", _read_row),
}
MEASURED = ("metrics", "row of a trial")  # what runs write may hold NaN

BAD = {
    "twice": (b'{"a": {"b": 1, "b": 2}}', "the key 'a.b' appears twice, as 1 and as 2; keep one"),
    "twice in a list": (b'[{"b": {}, "c": 0, "b": []}]', "the key '0.b' appears twice, as {} and as []; keep one"),
    "deep list": (b"[" * 100_000 + b"]" * 100_000, "nested too deep"),
    "deep object": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deep"),
    "open list": (b"[" * 100_000, "nested too deep"),
    "long integer": (b'{"a": ' + b"9" * 5_000 + b"}", "a number of 5,000 digits (99999999999999999999...)"),
    "long real": (b'{"a": 0.' + b"9" * 5_000 + b"}", "a number of 5,002 digits (0.999999999999999999...)"),
    "large": (b'{"a": -1e999}', "-1e999: beyond the range of numbers"),
    "deep, not too deep for Python": (b'{"a":' * 300 + b'"\\u0041"' + b"}" * 300, "nested too deep"),
    "NaN": (b'{"a": NaN}', "NaN: not a JSON number"),
    "infinity": (b'{"a": [-Infinity]}', "-Infinity: not a JSON number"),
    "no JSON": (b'{"a": 1,}', ":1:9: not JSON: "),
    "empty": (b"", ":1:1: not JSON: Expecting value"),
    "Latin-1": ('{"a": "é"}'.encode("latin-1"), "not UTF-8 text at byte 7"),
    "NUL": (b'{"a": "b\\u0000"}', "a NUL or half a character"),
    "half a character": (b'{"\\ud800": 1}', "a NUL or half a character"),
}


@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_json_of_ours_is_one_line(reader: str, tmp_path: Path) -> None:
    name, read = READERS[reader]
    path = tmp_path / name
    for kind, (content, expected) in BAD.items():
        if reader in MEASURED and kind in ("NaN", "infinity"):
            continue
        path.write_bytes(content)
        if reader == "metrics" and ("not JSON" in expected or "not UTF-8" in expected):
            assert read(path) is None  # a run that was killed while it wrote
            continue
        with pytest.raises(UserError) as error:
            read(path)
        message = str(error.value)
        assert message.startswith(str(path)) and expected in message, (kind, message)
        assert "\n" not in message and len(message) < 400


@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_regular_file_is_one_line_and_no_wait(reader: str, tmp_path: Path) -> None:
    name, read = READERS[reader]
    path = tmp_path / name

    def refused(why: str) -> None:
        started = time.monotonic()
        with pytest.raises(UserError, match=r"expected |not a plain file") as error:
            read(path)
        assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
        assert why in str(error.value) or "not a plain file" in str(error.value)
        assert time.monotonic() - started < 60

    os.mkfifo(path)
    refused("is a FIFO")
    path.unlink()
    path.symlink_to("/dev/zero")
    refused("is a device")
    path.unlink()
    with path.open("wb") as file:
        file.truncate(4 << 30)
    refused("4,294,967,296 bytes")
    path.unlink()
    path.mkdir()
    refused("is a directory")


def test_derived_or_informative_values_are_no_reason_to_stop(tmp_path: Path) -> None:
    index = Index.model_construct(step=3, position={})
    (tmp_path / "c/step-000000003").mkdir(parents=True)
    for content, _ in BAD.values():
        (tmp_path / "built.json").write_bytes(content)
        assert _whole(tmp_path, "", None) is None  # a cache, which is rebuilt
        (tmp_path / "metrics.json").write_bytes(content)
        about = said_of(tmp_path / "c/step-000000003", index)
        assert str(about.get("metrics", tmp_path)).startswith(str(tmp_path))  # NaN is none of its faults
    (tmp_path / "built.json").unlink()
    os.mkfifo(tmp_path / "built.json")
    assert _whole(tmp_path, "", None) is None


@pytest.mark.parametrize(("name", "why"), [("absent", "No such file"), ("a" * 300, "too long"), ("a\0b", "null byte")])
def test_a_name_that_no_file_has(name: str, why: str, tmp_path: Path) -> None:
    for read in (load_config, read_schema, load_table_spec, read_grid, _read_row):
        with pytest.raises(UserError, match=f"cannot be read .*{why}.*; expected "):
            read(tmp_path / name)


def test_what_was_measured_may_be_no_number(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text('{"test": {"auc": NaN, "ne": -Infinity}}')
    found = _metrics(tmp_path)
    assert found is not None and math.isnan(found["test"]["auc"]) and found["test"]["ne"] == -math.inf
    (tmp_path / "row.json").write_text('{"valid_auc": NaN, "valid_logloss": null}')
    assert math.isnan(_read_row(tmp_path / "row.json")["valid_auc"])
    (tmp_path / "row.json").write_text('{"valid_auc": 0.5}')
    with pytest.raises(UserError, match=r"row.json: valid_logloss is '', expected a number or null"):
        _read_row(tmp_path / "row.json")


def test_half_a_line_of_a_killed_rank_is_none_of_its_causes() -> None:
    whole = '@megarec j {"rank": 1, "host": "h", "code": 1, "cause": "c", "lost": false}'
    found = parse(whole, "j")
    assert found is not None and (found.rank, found.cause) == (1, "c")
    for outcome in ('{"rank": 1, "ho}', '{"rank": NaN}', "{" * 5_000 + "}", '{"rank": 1, "rank": 2}', "{}"):
        assert parse(f"@megarec j {outcome}", "j") is None


def test_a_row_of_a_sweep_whose_quality_is_no_number_is_never_the_best() -> None:
    by_auc: Any = SimpleNamespace(config=SimpleNamespace(train=SimpleNamespace(best_by="auc")))
    for value in (None, math.nan, math.inf, -math.inf):
        assert validation_loss(by_auc, {"valid_auc": value, "valid_logloss": 0.5}) == math.inf
    assert validation_loss(by_auc, {"valid_auc": 0.75, "valid_logloss": 0.5}) == -0.75


def test_a_key_that_comes_again_is_found_in_time() -> None:
    pairs = ", ".join(f'"{number}": {{}}' for number in range(200_000))
    with pytest.raises(UserError, match=r"the key '199999' appears twice, as {} and as 1"):
        parse_json(f'{{{pairs}, "199999": 1}}', "here")


PARSERS = {"json.load", "json.loads", "model_validate_json", "validate_json"}
ELSEWHERE = {  # where another reader stands, and why
    "megarec/serving/scorer/bundle.py": "runs where this package is not; one line for what is no manifest",
    "megarec/serving/scorer/scorer.py": "runs where this package is not; the manifest has the file's size",
    "megarec/serving/server.py": "a request's body, bounded in bytes; it refuses constants and depth itself",
    "megarec/files.py": "it is the reader",
    "megarec/checkpoint/format.py": "pydantic's strict types are those of JSON; the one reader has read it before",
    "megarec/launching/rank_process.py": "the launcher's own word; a path in it may hold any byte",
    "megarec/launching/probe.py": "runs on hosts without this package, on the launcher's own words",
    "megarec/launching/probe_client.py": "a path in an answer may hold any byte; what is no JSON is a host's failure",
    "megarec/data/preparation/encode.py": "the work's own note; what is not whole is made again",
    "megarec/data/preparation/infer.py": "the spec that it is about to write, as its reader would take it",
    "megarec/data/preparation/merge.py": "the work's own note; what is not whole is made again",
    "megarec/data/preparation/scan.py": "the work's own note; what is not whole is made again",
    "megarec/data/preparation/splits.py": "the work's own note; what is not whole is made again",
    "megarec/scaling/search_report.py": "the words that the search itself gave a trial as --set",
    "tools/benchmarks/groups.py": "what the tools print",
    "tools/benchmarks/recipe_plain.py": "plain torch beside the package, which it does not import",
    "tools/benchmarks/testbed.py": "what `ip -json` says",
    "tools/benchmarks/towers.py": "what its own ranks say",
    "tools/benchmarks/towers_rank.py": "what the benchmark says, and a trace that it wrote",
}


def other_readers() -> Iterator[str]:
    for folder in ("megarec", "tools", "launch"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                named = isinstance(node, ast.Attribute) and not PARSERS.isdisjoint((node.attr, ast.unparse(node)))
                bare = isinstance(node, ast.ImportFrom) and node.module == "json"
                if named or bare:
                    yield str(path.relative_to(ROOT))


def test_no_other_reader_of_json() -> None:
    assert set(other_readers()) == set(ELSEWHERE), "read it by megarec.files, or say here why not"


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
    with pytest.raises(UserError, match=r"train\.json: the key 'epochs' appears twice, as 1 and as 2"):
        load_config(tmp_path / "run.json")
    (tmp_path / "train.json").write_text("{}")
    (tmp_path / "t.json").write_text('{"towers": [["a"]], "towers": [["b"]]}')
    with pytest.raises(UserError, match=r"t\.json: the key 'towers' appears twice"):
        load_config(tmp_path / "run.json")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("parallel.timeout_seconds=Infinity", "Infinity: not a JSON number"),
        ("dense.eps=NaN", "NaN: not a JSON number"),
        ("dense.eps=1e999", "1e999: beyond the range of numbers"),
        ("train.epochs=" + "9" * 5_000, "a number of 5,000 digits"),
        ("model.mlp=" + "[" * 100_000, "nested too deep"),
        ('train={"epochs": 1, "epochs": 2}', "the key 'epochs' appears twice"),
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


def test_writing_replaces_files_alone_and_a_link_stays(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "to_fifo").symlink_to("fifo")
    for name in ("fifo", "to_fifo"):
        with pytest.raises(OSError, match="is not a regular file"):
            write_whole(tmp_path / name, b"x")
    (tmp_path / "link").symlink_to("file")
    for content in (b"new", b"replaced"):
        write_whole(tmp_path / "link", content)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_bytes() == content
    assert (tmp_path / "fifo").is_fifo() and len(list(tmp_path.iterdir())) == 4


def test_two_may_write_the_same_file_at_the_same_time(tmp_path: Path) -> None:
    """As tasks do that run again elsewhere: each has a file of its own until one is whole."""
    path, work = tmp_path / "data/file", tmp_path / "work/beside"
    for directory in (path.parent, work.parent):
        directory.mkdir()
    with renamed_to(path, beside=work) as first, renamed_to(path) as second:
        first.write_bytes(b"first")
        second.write_bytes(b"second")
        assert [file.parent for file in (first, second)] == [work.parent, path.parent] and not path.exists()
    assert path.read_bytes() == b"first"  # which ends last
    with pytest.raises(KeyError), renamed_to(path) as third:
        third.write_bytes(b"third")
        raise KeyError
    assert path.read_bytes() == b"first"
    assert list(path.parent.iterdir()) == [path] and not list(work.parent.iterdir())
