"""Seeded damage and malice in checkpoints and exports: the right value or one line, no hang, nothing written.

In this process, through the functions that the tools call. What nobody resealed gives the right value or is refused;
what a forger sealed again may have any content, but ends in bounded time. The seed is fixed, so that a failure is one
that everybody sees; change SEED and ROUNDS by hand to look for more.
"""

import copy
import json
import os
import random
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import megarec
from megarec.checkpoint import offline
from megarec.checkpoint.format import INDEX, MODEL_CONFIG, MODEL_FILE, SEALED_EXPORT, read_index, sealed
from megarec.checkpoint.reading import verify
from megarec.checkpoint.writing import file_entry
from megarec.errors import UserError
from megarec.serving.predictor import load_checkpoint
from tests.checkpoint.test_written_before import BEST, LATEST, WRITTEN, batch

SEED = 13
ROUNDS = 60  # of each kind of damage
SECONDS_OF_ONE = 20.0  # on a busy machine; alone it takes a hundredth

Damage = Callable[[random.Random, Path], object]
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 3, 10**30, -(10**30), 1 << 61, 1 << 40, 1e308, 0.5, "", "auto", "..", "/etc/passwd",
    "a" * 300, [], {}, [[]], [{}], [0], [-1, 0], [1 << 61, 1 << 61], {"a": 1}, "rank-00000.safetensors", "F32", "BF16",
    "[/red]\x1b[2J\n", [0] * 2_000, [["a"]] * 3,
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What is damaged: of this version with seals, and of an earlier one without."""
    path = tmp_path_factory.mktemp("whole")
    shutil.copytree(WRITTEN / "run/checkpoints" / BEST, path / "earlier checkpoint")
    shutil.copytree(WRITTEN / "export", path / "earlier export")
    offline.reshape(path / "earlier checkpoint", path / "checkpoint", 3)
    offline.export(path / "checkpoint", path / "export")
    return {name: path / name for name in ("checkpoint", "export", "earlier checkpoint", "earlier export")}


def logits_of(path: Path) -> list[float]:
    """Of a checkpoint or an export; a checkpoint is also looked at by the tools."""
    if (path / INDEX).exists() or not (path / MODEL_CONFIG).exists():
        offline.inspect(path)
        model = load_checkpoint(path)
    else:
        model = megarec.load_model(path)
    found: list[float] = model.predict(batch()).tolist()
    return found


def pick(rng: random.Random, path: Path) -> Path:
    return rng.choice(sorted(path.iterdir()))


def flip(rng: random.Random, path: Path) -> None:
    file = pick(rng, path)
    content = bytearray(file.read_bytes())
    content[rng.randrange(min(len(content), rng.choice([60, 1 << 30])))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def truncate(rng: random.Random, path: Path) -> None:
    file = pick(rng, path)
    os.truncate(file, rng.choice([0, 1, 8, 44, file.stat().st_size - 1, rng.randrange(file.stat().st_size)]))


def append(rng: random.Random, path: Path) -> None:
    with pick(rng, path).open("ab") as file:
        file.write(rng.choice([b"\0", b" ", b"\n", b"}", b"{}", bytes(8)]))


def swap(rng: random.Random, path: Path) -> None:
    one, other = rng.sample(sorted(path.iterdir()), 2)
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def foreign(rng: random.Random, path: Path) -> None:
    """A file of another checkpoint of the same run."""
    file = pick(rng, path)
    there = WRITTEN / "run/checkpoints" / LATEST / file.name
    file.write_bytes((there if there.exists() else WRITTEN / "export" / MODEL_CONFIG).read_bytes())


def another_kind(rng: random.Random, path: Path) -> None:
    """Missing, a FIFO, a directory, or a link."""
    file = pick(rng, path)
    kind = rng.choice(["missing", "fifo", "directory", "link", "device", "loop", "huge"])
    if kind == "link":
        file.rename(path.parent / "elsewhere")
        file.symlink_to(path.parent / "elsewhere")
        return
    file.unlink()
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "directory":
        file.mkdir()
    elif kind in ("device", "loop"):
        file.symlink_to("/dev/zero" if kind == "device" else file.name)
    elif kind == "huge":
        with file.open("wb") as opened:
            opened.truncate(4 << 30)


def about_of(path: Path) -> Path:
    return path / (INDEX if (path / INDEX).exists() else MODEL_CONFIG)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield value, key
        yield from places(part)


def change(rng: random.Random, value: Any) -> None:
    """One to three places of a JSON value become something else."""
    for _ in range(rng.choice([1, 1, 2, 3])):
        holder, key = rng.choice(list(places(value)) or [({"": 0}, "")])
        how = rng.randrange(6)
        if how == 0 and isinstance(holder, dict):
            holder.pop(key, None)
        elif how == 1 and isinstance(holder, dict):
            holder[rng.choice(["", "more", "\n", "a" * 300])] = copy.deepcopy(rng.choice(VALUES))
        elif how == 2:
            other, place = rng.choice(list(places(value)) or [(holder, key)])
            holder[key] = copy.deepcopy(other[place])
        elif how == 3 and isinstance(holder[key] if isinstance(holder, list) else holder.get(key), int | float):
            holder[key] = rng.choice(
                [holder[key] + 1, -holder[key], holder[key] * 1_000_000, 1 << 40, float(holder[key])]
            )
        else:
            holder[key] = copy.deepcopy(rng.choice(VALUES))


def reseal(path: Path, about: dict[str, Any]) -> None:
    export = path.name == MODEL_CONFIG
    path.write_bytes(sealed(about, SEALED_EXPORT if export else 3))


def forged(rng: random.Random, path: Path) -> None:
    """The JSON is changed, and sealed again."""
    file = about_of(path)
    about = json.loads(file.read_text())
    part = rng.choice([about, about, about["config"], about["schema"], about.get("tensors", about)])
    change(rng, part)
    reseal(file, about)


def forged_header(rng: random.Random, path: Path) -> None:
    """The header of a tensor file is changed, and its size and checksum with it."""
    file = rng.choice(sorted(path.glob("*.safetensors")))
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    if rng.random() < 0.2:
        text = rng.choice([b"[" * 100_000, b"{}", b"[]", b'{"a":1,"a":2}', b"9" * 5_000, b"NaN", b'"\xff"', b""])
    else:
        change(rng, header)
        text = json.dumps(header).encode()
    claimed = rng.choice([len(text)] * 8 + [0, 1 << 62, len(text) + 1, len(content) * 2])
    file.write_bytes(struct.pack("<Q", claimed) + text + content[8 + length :])
    about = json.loads(about_of(path).read_text())
    entry = file_entry(file).model_dump()
    if "files" in about:
        about["files"][file.name] = entry
    else:
        about["file"] = entry
    reseal(about_of(path), about)


HOSTILE = [
    b"", b"{", b"[" * 100_000, b'{"a":' * 100_000, b'{"seal": "', bytes(100), b"\xff\xfe{}", b"\xef\xbb\xbf{}", b"NaN",
    b"9" * 5_000, b'{"version": 2, "version": 3}', b'{"seal": 3}', b"[]", b'"index"', b"\x80\x04.",
    b'{"format": "megarec model"}',
]  # fmt: skip


def hostile(rng: random.Random, path: Path) -> None:
    about_of(path).write_bytes(rng.choice(HOSTILE))


HARM: dict[str, Damage] = {f.__name__: f for f in (flip, truncate, append, swap, foreign, another_kind, hostile)}
FORGED: dict[str, Damage] = {f.__name__: f for f in (forged, forged_header)}


def names(path: Path) -> set[str]:
    return {str(found) for found in path.rglob("*")}


@pytest.mark.parametrize("kind", [*HARM, *FORGED])
def test_a_right_value_or_one_line(kind: str, whole: dict[str, Path], tmp_path: Path) -> None:
    rng = random.Random(f"{SEED} {kind}")
    right = logits_of(whole["checkpoint"])
    refused = 0
    for number in range(ROUNDS):
        which = rng.choice(list(whole))
        path = tmp_path / f"{number}" / which
        shutil.copytree(whole[which], path)
        {**HARM, **FORGED}[kind](rng, path)
        before, began = names(tmp_path), time.monotonic()
        try:
            found = logits_of(path)
            if "checkpoint" in which:
                verify(path, read_index(path))
        except UserError as error:
            refused += 1
            assert str(error) and str(error).isprintable() and len(str(error)) < 4_100, (number, which, error)
        else:
            unsealed = which.startswith("earlier") and kind in ("flip", "swap", "foreign")
            assert found == right or kind in FORGED or unsealed, (number, which)
        assert time.monotonic() - began < SECONDS_OF_ONE, (number, which)
        assert names(tmp_path) == before, (number, which)
        shutil.rmtree(tmp_path / f"{number}")
    assert refused


def layers_without_sizes(about: dict[str, Any]) -> None:
    about["config"]["tower_module"]["num_fm"] = None


def deep(about: dict[str, Any]) -> None:
    about["config"]["model"].update(layers=1_000, mlp=[8] * 1_000)


def wide_schema(about: dict[str, Any]) -> None:
    about["schema"]["categorical"] += [{"name": f"f{i}", "rows": 2} for i in range(2_000)]
    about["config"]["parallel"].update(towers=None, exchange="flat")
    about["config"]["tower_module"] = {"name": "identity"}


def twice(about: dict[str, Any]) -> None:
    about["schema"]["numeric"] = [f"n{i}" for i in range(100_000)] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (layers_without_sizes, "describes no model that can be built"),
        (deep, "1,000,000 linear layers"),
        (wide_schema, "config.json says"),
        (twice, "columns named twice"),
    ],
)
def test_a_forged_export_ends_in_time(
    change: Callable[[dict[str, Any]], None], message: str, whole: dict[str, Path], tmp_path: Path
) -> None:
    path = Path(shutil.copytree(whole["export"], tmp_path / "export"))
    about = json.loads((path / MODEL_CONFIG).read_text())
    change(about)
    reseal(path / MODEL_CONFIG, about)
    began = time.monotonic()
    with pytest.raises(UserError, match=message):
        megarec.load_model(path)
    assert time.monotonic() - began < SECONDS_OF_ONE


def test_a_tensor_file_that_leaves_bytes_out(whole: dict[str, Path], tmp_path: Path) -> None:
    """Another library read the header of an export again, and refused what we accept with an error of its own."""
    path = Path(shutil.copytree(whole["export"], tmp_path / "export"))
    file = path / MODEL_FILE
    file.write_bytes(file.read_bytes() + bytes(8))
    about = json.loads((path / MODEL_CONFIG).read_text())
    about["file"] = file_entry(file).model_dump()
    reseal(path / MODEL_CONFIG, about)
    assert logits_of(path) == logits_of(whole["export"])
