"""Files without a run: any slices in, any slices out; and what is refused."""

import errno
import json
import mmap
import os
import pickle
import struct
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from megarec.checkpoint.format import Index, read_header, read_index, sealed
from megarec.checkpoint.publish import Plan, publish, write_part
from megarec.checkpoint.reading import Reader, _tile, verify
from megarec.checkpoint.snapshot import Snapshot
from megarec.checkpoint.writing import file_header
from megarec.errors import DamagedCheckpoint, UserError
from megarec.slices import TensorSlice

ABOUT = {
    "format": "megarec checkpoint",
    "version": 2,
    "position": {"step": 3},
    "topology": {"ranks": 2},
    "config": {},
    "schema": {},
    "towers": None,
    "optimizer": "SGD",
    "loss_scale": None,
}


def save(directory: Path, pieces_of_ranks: list[list[TensorSlice]]) -> Path:
    """A published checkpoint that ranks with these pieces write."""
    ranks = len(pieces_of_ranks)
    plan = Plan(directory, 3, "t", ranks, ABOUT, ("latest",), keep=2, timeout=5.0)
    for rank in reversed(range(ranks)):
        snapshot = Snapshot()
        snapshot.take(pieces_of_ranks[rank])
        write_part(plan, rank, snapshot)
    publish(plan)
    return directory / "step-000000003"


def cut(tensor: Tensor, name: str, rows: list[int], columns: list[int]) -> list[TensorSlice]:
    """The grid of rectangles between the given cuts."""
    grid = []
    for top, bottom in zip([0, *rows], [*rows, tensor.shape[0]], strict=True):
        for left, right in zip([0, *columns], [*columns, tensor.shape[1]], strict=True):
            if top < bottom and left < right:
                shape = tuple(tensor.shape)
                grid.append(TensorSlice(name, shape, (top, left), tensor[top:bottom, left:right].clone()))
    return grid


@settings(max_examples=20, deadline=None)
@given(drawn=st.data())
def test_any_slice_is_read_out_of_any_slices(drawn: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    rows, columns = drawn.draw(st.integers(1, 7)), drawn.draw(st.integers(1, 7))
    dtype = drawn.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]))
    whole = torch.randint(0, 2 if dtype is torch.bool else 100, (rows, columns)).to(dtype)
    cuts = [sorted(drawn.draw(st.lists(st.integers(0, size), max_size=3))) for size in (rows, columns)]
    pieces = cut(whole, "a/weight", *cuts)
    number = TensorSlice("a/step", (), (), torch.tensor(7.0))
    ranks = drawn.draw(st.integers(1, 3))
    split = [pieces[rank::ranks] + [number] * (rank == 0) for rank in range(ranks)]
    directory = save(tmp_path_factory.mktemp("any"), split)
    index = read_index(directory)
    verify(directory, index)
    reader = Reader(directory, index)
    for asked in cut(torch.zeros_like(whole), "a/weight", *(sorted({0, n // 2}) for n in (rows, columns))):
        reader.fill(asked)
        assert torch.equal(asked.tensor, whole[tuple(map(slice, asked.start, asked.stop))])
    step = TensorSlice("a/step", (), (), torch.zeros(()))
    reader.fill(step)
    assert step.tensor == 7.0


def test_files_are_safetensors_and_nothing_else_is_left(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    directory = save(tmp_path, [cut(whole[:2], "w", [], []), []])
    assert {path.name for path in tmp_path.iterdir()} == {"latest", "step-000000003"}
    assert {path.name for path in directory.iterdir()} == {f"rank-0000{r}.safetensors" for r in (0, 1)} | {"index.json"}
    assert torch.equal(load_file(directory / "rank-00000.safetensors")["w@0,0"], whole[:2])
    assert load_file(directory / "rank-00001.safetensors") == {}


def test_a_file_larger_than_the_memory_is_mapped(tmp_path: Path) -> None:
    """A sparse one: nothing of a map that is only read counts as memory."""
    about = dict(line.split()[:2] for line in Path("/proc/meminfo").read_text().splitlines())
    rows = (int(about["MemTotal:"]) + int(about["SwapTotal:"])) * 1024 // 4096 + (1 << 18)
    header = file_header([("w", torch.float32, (rows, 1024))])
    path, size = tmp_path / "rank-00000.safetensors", len(header) + rows * 4096
    try:
        path.write_bytes(header)
        os.truncate(path, size)
    except OSError:
        pytest.skip("this file system has no files of that size")
    with path.open("r+b") as file:
        file.seek(size - 4)
        file.write(struct.pack("<f", 7.0))
    part = {"file": path.name, "key": "w", "start": [0, 0], "stop": [rows, 1024]}
    tensors = {"w": {"dtype": "F32", "shape": [rows, 1024], "slices": [part]}}
    index = {**ABOUT, "step": 3, "tensors": tensors, "files": {path.name: {"bytes": size, "xxh3": "0" * 16}}}
    index_json = json.dumps(index)
    last = TensorSlice("w", (rows, 1024), (rows - 1, 1020), torch.ones(1, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Reader(tmp_path, Index.model_validate_json(index_json)).fill(last)
    assert last.tensor.tolist() == [[0.0, 0.0, 0.0, 7.0]]


def test_a_map_that_the_system_refuses_names_the_file(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(mmap, "mmap", refuses)
    with pytest.raises(UserError, match=r"rank-00000.safetensors: cannot be mapped .*\(Cannot allocate memory\)"):
        verify(good, read_index(good))


@pytest.fixture
def good(tmp_path: Path) -> Path:
    whole = torch.arange(40.0).view(10, 4)
    top, bottom = cut(whole, "w", [5], [])
    return save(tmp_path, [[top], [bottom]])


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change index.json."""

    def spoil(directory: Path) -> None:
        path = directory / "index.json"
        index = json.loads(path.read_text())
        change(index)
        path.write_bytes(sealed(index))

    return spoil


def with_file(content: Callable[[Path], bytes]) -> Callable[[Path], None]:
    """Replace a file, and make the index agree with its new size and checksum."""

    def spoil(directory: Path) -> None:
        path = directory / "rank-00001.safetensors"
        path.write_bytes(content(path))
        from megarec.checkpoint.writing import file_entry

        entry = file_entry(path).model_dump()
        edited(lambda index: index["files"].update({path.name: entry}))(directory)

    return spoil


class Trap:
    """Unpickling it would leave a file behind."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch sprung",)


def bit_flip(directory: Path) -> None:
    path = directory / "rank-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 0x10
    path.write_bytes(content)


def truncate(directory: Path) -> None:
    path = directory / "rank-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def link(directory: Path) -> None:
    path = directory / "rank-00001.safetensors"
    path.rename(directory.parent / "elsewhere.safetensors")
    path.symlink_to(directory.parent / "elsewhere.safetensors")


def foreign(directory: Path) -> None:
    save_file({"other": torch.zeros(25)}, directory / "rank-00001.safetensors")


def huge_header(path: Path) -> bytes:
    return struct.pack("<Q", 1 << 60) + path.read_bytes()[8:]


def claims(shape: list[int]) -> Callable[[Path], bytes]:
    """A file whose tensor claims to be of some shape."""

    def content(path: Path) -> bytes:
        header = json.dumps({"w@5,0": {"dtype": "F32", "shape": shape, "data_offsets": [0, 80]}}).encode()
        return struct.pack("<Q", len(header)) + header + bytes(80)

    return content


def first_slice(key: str, value: Any) -> Callable[[Path], None]:
    return edited(lambda index: index["tensors"]["w"]["slices"][1].update({key: value}))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (truncate, r"rank-00001.safetensors: \d+ bytes, the index says \d+: truncated"),
        (bit_flip, "rank-00001.safetensors: checksum .* damaged"),
        (lambda d: (d / "rank-00001.safetensors").unlink(), "rank-00001.safetensors: cannot be read"),
        (lambda d: (d / "index.json").unlink(), "index.json is missing"),
        (lambda d: (d / "index.json").write_text("{"), "index.json:1:2: not JSON"),
        (lambda d: (d / "index.json").write_text("[" * 100_000), "index.json: nested too deep"),
        (lambda d: (d / "index.json").write_bytes(pickle.dumps(Trap())), "index.json: not UTF-8 text at byte 0"),
        (edited(lambda index: index.update(more=1)), "index.json: more"),
        (foreign, "rank-00001.safetensors: .* another file"),
        (with_file(lambda path: pickle.dumps(Trap()) + bytes(100)), "rank-00001.safetensors: not a safetensors file"),
        (with_file(lambda path: b"PK\3\4" + bytes(100)), "rank-00001.safetensors: not a safetensors file"),
        (with_file(huge_header), "a header of 1,152,921,504,606,846,976 bytes"),
        (with_file(claims([1 << 40, 1 << 40])), "not a safetensors file"),
        (with_file(claims([-5, -4])), "not natural numbers"),
        (with_file(claims([20])), "is not the torch.float32 .5, 4. of the index"),
        (link, "rank-00001.safetensors: not a plain file"),
        (first_slice("file", "../elsewhere.safetensors"), "index.json: tensors.w.slices.1.file"),
        (first_slice("file", "/etc/passwd"), "index.json: tensors.w.slices.1.file"),
        (first_slice("file", "rank-00009.safetensors"), "rank-00009.safetensors is not listed"),
        (first_slice("stop", [1 << 61, 4]), "slice .* is not in shape"),
        (first_slice("stop", [9, 4]), "its slices have 36 elements"),
        (edited(lambda index: index["tensors"]["w"].update(shape=[1 << 40, 1 << 20])), "its slices have 40 elements"),
        (
            edited(lambda index: index["tensors"]["w"]["slices"][1].update(start=[4, 0], stop=[9, 4])),
            "of the index|once",
        ),
    ],
)
def test_what_is_damaged_or_malicious_is_refused_with_its_reason(
    good: Path, spoil: Callable[[Path], Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify(good, read_index(good))
    monkeypatch.chdir(good.parent)
    spoil(good)
    with pytest.raises(DamagedCheckpoint, match=reason) as refused:
        verify(good, read_index(good))
    assert "\n" not in str(refused.value)
    assert not (good.parent / "sprung").exists()


def test_slices_that_overlap_are_refused(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(4, 3)
    (top,) = cut(whole[:2], "w", [], [])
    pieces = [TensorSlice("w", (4, 3), (0, 0), top.tensor), TensorSlice("w", (4, 3), (1, 0), top.tensor)]
    directory = save(tmp_path, [[pieces[0]], [pieces[1]]])
    with pytest.raises(DamagedCheckpoint, match="do not cover"):
        verify(directory, read_index(directory))


def test_many_slices_are_checked_in_seconds() -> None:
    """Comparing pairs took a minute for 200,000 of them."""
    count = 200_000
    low = np.stack([np.arange(count), np.zeros(count, dtype=np.int64)], axis=1)
    high = low + np.array([1, 4])
    began = time.monotonic()
    assert _tile(low, high, (0, 0), (count, 4))
    high[7, 0] += 1
    assert not _tile(low, high, (0, 0), (count, 4))
    assert time.monotonic() - began < 10


def test_two_slices_of_the_same_numbers_are_refused(good: Path) -> None:
    edited(lambda index: index["tensors"].update(v=index["tensors"]["w"]))(good)
    with pytest.raises(DamagedCheckpoint, match="is the source of two slices"):
        read_index(good)


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"a": ([2], [0, 8]), "b": ([2], [4, 12])}, "b: overlaps another tensor"),
        ({"a": ([10**4000], [0, 8])}, r"its header: a number of 4,001 digits \(1000000"),
        ({"a": ([1] * 9, [0, 4])}, "a: 9 dimensions"),
        ({"a": ([True, 1], [0, 4])}, "a: sizes that are not natural"),
    ],
    ids=["overlap", "digits", "dimensions", "bool"],
)  # fmt: skip
def test_headers_that_cannot_be_are_refused(tmp_path: Path, entries: dict[str, Any], reason: str) -> None:
    header = {name: {"dtype": "F32", "shape": s, "data_offsets": o} for name, (s, o) in entries.items()}
    text = json.dumps(header).encode()
    (tmp_path / "f.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))
    with pytest.raises(DamagedCheckpoint, match=reason) as refused:
        read_header(tmp_path / "f.safetensors")
    assert len(str(refused.value)) < 1_000


def test_a_name_cannot_break_the_line(good: Path) -> None:
    edited(lambda index: index["tensors"].update({"w\n\x1b[31m": index["tensors"].pop("w")}))(good)
    first_slice = edited(lambda index: index["tensors"]["w\n\x1b[31m"].update(shape=[9, 9]))
    first_slice(good)
    with pytest.raises(DamagedCheckpoint, match=r"w\\n\\x1b\[31m") as refused:
        read_index(good)
    assert str(refused.value).isprintable()
