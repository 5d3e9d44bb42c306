"""tools/checkpoint.py and what it hands on."""

import json
import os
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import megarec
from megarec.checkpoint import offline
from megarec.checkpoint.format import SEALED_EXPORT, sealed
from megarec.data.loader import EvalLoader
from megarec.data.schema import load_schema
from megarec.data.store import open_split
from megarec.distributed.rank_pool import RankPool
from megarec.errors import UserError
from megarec.slices import TensorSlice
from tests.checkpoint.runs import TOWER_MODULE, TOWERS, Leg, leg, write_run
from tests.checkpoint.test_checkpoint_files import save
from tests.processes import python

Pools = Callable[[int], RankPool]
TOOL = Path(__file__).parents[2] / "tools/checkpoint.py"


def tool(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    argv, code = sys.argv, 0
    sys.argv = [str(TOOL), *map(str, arguments)]
    try:
        runpy.run_path(str(TOOL), run_name="__main__")
    except SystemExit as error:
        code = int(error.code or 0)
    finally:
        sys.argv = argv
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def predictor_run(directory: Path, data: Path) -> Path:
    return write_run(directory, data, parallel={"towers": TOWERS}, tower_module=TOWER_MODULE)


@pytest.fixture(scope="module")
def trained(rank_pool: Pools, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Leg]:
    """A run on two ranks that was saved after three steps, and what it predicts."""
    path = predictor_run(tmp_path_factory.mktemp("trained"), data)
    legs = rank_pool(2).run(partial(leg, load=False, save=True, logits=True), path, [], 0, 3)
    return path, legs[0]


def run_directory(trained: tuple[Path, Leg]) -> Path:
    return trained[0].parent / "out"


def test_inspect_says_what_is_inside_and_reads_only_the_index(
    trained: tuple[Path, Leg], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run_directory(trained) / "checkpoints/step-000000003", tmp_path / "copy")
    for file in (tmp_path / "copy").glob("*.safetensors"):
        file.unlink()
    code, out, _ = tool(capsys, "inspect", tmp_path / "copy", "--json")
    found = json.loads(out)
    assert code == 0 and found["step"] == 3 and found["topology"]["ranks"] == 2
    assert found["tensors"]["table/single_1/weight"]["dtype"] == "F32"
    assert found["tensors"]["dense/over_arch.head.linears.0.weight/exp_avg"]["shape"][0] == 8
    sizes = {"F32": 4, "I64": 8, "U8": 1, "BOOL": 1}
    elements = {name: torch.Size(t["shape"]).numel() * sizes[t["dtype"]] for name, t in found["tensors"].items()}
    assert sum(elements.values()) < found["bytes"] < 1.5 * sum(elements.values()) + 20_000
    code, out, _ = tool(capsys, "inspect", run_directory(trained))
    assert code == 0 and "step 3" in out and "table/single_1/weight" in out


def test_verify_finds_a_flipped_bit(
    trained: tuple[Path, Leg], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool(capsys, "verify", run_directory(trained))[0] == 0
    shutil.copytree(run_directory(trained) / "checkpoints/step-000000003", tmp_path / "copy")
    file = tmp_path / "copy/rank-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    code, out, err = tool(capsys, "verify", tmp_path / "copy")
    assert code == 2 and out == "" and err.startswith(f"error: {file}: checksum") and err.count("\n") == 1


@pytest.mark.parametrize("ranks", [1, 5])
def test_a_reshaped_checkpoint_holds_the_same_and_resumes_the_same(
    rank_pool: Pools, data: Path, trained: tuple[Path, Leg], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, ranks: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(offline, "BLOCK", 256)  # many blocks of a few rows
    path = predictor_run(tmp_path, data)
    target = tmp_path / "out/checkpoints/step-000000003"
    code, out, _ = tool(capsys, "reshape", run_directory(trained), target, "--ranks", ranks, "--json")
    assert code == 0 and json.loads(out)["files"] == ranks
    assert tool(capsys, "verify", target)[0] == 0
    found = rank_pool(2).run(partial(leg, load=True, save=False), path, [], 3, 5)[0].losses
    expected = rank_pool(2).run(partial(leg, load=True, save=False), trained[0], [], 3, 5)[0].losses
    assert found == expected
    code, _, err = tool(capsys, "reshape", run_directory(trained), target, "--ranks", 2)
    assert code == 2 and "exists already" in err


def test_an_exported_model_predicts_what_the_run_predicted(
    rank_pool: Pools, data: Path, trained: tuple[Path, Leg], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool(capsys, "export", run_directory(trained), tmp_path / "model")[0] == 0
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"model.safetensors", "config.json"}
    names = load_file(tmp_path / "model/model.safetensors")
    assert names and not any("exp_avg" in name or "rowwise" in name or "touched" in name for name in names)
    model = megarec.load_model(tmp_path / "model")
    found = predictions(model, data)
    # On one rank the engine computes what the predictor computes.
    alone = rank_pool(1).run(partial(leg, load=True, save=False, logits=True), trained[0], [], 3, 3)[0].logits
    assert found == alone
    two = rank_pool(2).run(partial(leg, load=True, save=False, logits=True), trained[0], [], 3, 3)
    together = [a + b for a, b in zip(two[0].logits, two[1].logits, strict=True)]
    assert max(abs(x - y) for a, b in zip(found, together, strict=True) for x, y in zip(a, b, strict=True)) < 1e-6


def predictions(model: Any, data: Path) -> list[list[float]]:
    schema = load_schema(data)
    loader = EvalLoader(
        open_split(data, "test", schema, "error"), schema,
        batch_size=80, rank=0, world_size=1, seed=1, prefetch=1, pin_memory=False,
    )  # fmt: skip
    return [model.predict(batch).tolist() for batch in loader.batches()]


def test_a_model_whose_config_claims_other_sizes_is_refused(
    trained: tuple[Path, Leg], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool(capsys, "export", run_directory(trained), tmp_path / "model")[0] == 0
    path = tmp_path / "model/config.json"
    about = json.loads(path.read_text())
    about["schema"]["categorical"][0]["rows"] = about["schema"]["categorical"][4]["rows"] = 1 << 40
    for feature in about["schema"]["categorical"]:
        feature["rows"] = 1 << 40
    del about["seal"]
    path.write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"config.json: version 2 without a seal: edited"):
        megarec.load_model(tmp_path / "model")
    path.write_bytes(sealed(about, SEALED_EXPORT).replace(b'"dropout": 0.1', b'"dropout": 0.3'))
    with pytest.raises(UserError, match=r"config.json: its checksum is \w+, not the one of its seal"):
        megarec.load_model(tmp_path / "model")
    path.write_bytes(sealed(about, SEALED_EXPORT))
    with pytest.raises(UserError, match=r"table/\S+ is \[.*\], config.json says \[1099511627776, 8\]"):
        megarec.load_model(tmp_path / "model")


PEAK = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
"""


def peak_kilobytes(*arguments: object) -> int:
    """The most that the tool ever held, mapped pages included. (ru_maxrss counts the forking process too.)"""
    done = python("-c", PEAK, TOOL, *arguments)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read where Linux reports it")
@pytest.mark.parametrize("command", [("reshape", "--ranks", 3), ("export",)])
def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path, command: tuple[object, ...]) -> None:
    peaks = []
    for name, rows in (("small", 16), ("large", 1 << 16)):  # 2 x 64 MiB
        pieces = [
            [TensorSlice("table/w/weight", (2 * rows, 256), (rank * rows, 0), torch.ones(rows, 256))] for rank in (0, 1)
        ]
        checkpoint = save(tmp_path / name, pieces)
        peaks.append(peak_kilobytes(command[0], checkpoint, tmp_path / f"{name}-new", *command[1:]))
    assert peaks[1] - peaks[0] < 64 * 1024, peaks  # 47 MiB


@pytest.mark.parametrize("words", [("reshape", "--ranks", 3), ("export",)], ids=["reshape", "export"])
def test_a_signal_leaves_nothing_half_written(
    tmp_path: Path, words: tuple[object, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = save(tmp_path / "c", [[TensorSlice("table/w/weight", (4, 2), (0, 0), torch.ones(4, 2))]])
    write_file, rmtree = offline.write_file, shutil.rmtree
    sent: list[int] = []

    def while_it_writes(path: Path, blocks: Any) -> None:
        write_file(path, blocks)
        assert path.parent.name.startswith("new.tmp-")
        os.kill(os.getpid(), sent[0])
        time.sleep(60)

    def while_it_cleans(path: Path, **named: Any) -> None:
        os.kill(os.getpid(), sent[0])  # who asks twice
        rmtree(path, **named)

    monkeypatch.setattr(offline, "write_file", while_it_writes)
    monkeypatch.setattr(offline.shutil, "rmtree", while_it_cleans)
    # As in a terminal: background jobs and nohup ignore the last two, and so would the tool.
    usual = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    try:
        for number, expected in ((signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)):
            sent[:] = [number]
            code, out, err = tool(capsys, words[0], checkpoint, tmp_path / "new", *words[1:])
            assert (code, out) == (expected, "") and err in ("", "interrupted\n")
            assert {path.name for path in tmp_path.iterdir()} == {"c"}
        assert usual == {number: signal.getsignal(number) for number in usual}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_where_no_checkpoint_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = tool(capsys, "inspect", tmp_path)
    assert code == 2 and "no checkpoint" in err and err.count("\n") == 1


def test_a_runs_name_means_its_best(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Export took the latest, whose metrics nobody had printed."""
    checkpoints = tmp_path / "run/checkpoints"
    best = save(checkpoints, [[TensorSlice("table/w/weight", (2, 2), (0, 0), torch.ones(2, 2))]])
    shutil.copytree(best, checkpoints / "step-000000009")
    (checkpoints / "best").write_text(f"{best.name}\n")
    (checkpoints / "latest").write_text("step-000000009\n")
    metrics = {"step": 3, "test": {"auc": 0.72125, "logloss": 0.5}}
    (tmp_path / "run/metrics.json").write_text(json.dumps(metrics))
    for words in (["inspect"], ["verify"]):
        code, out, _ = tool(capsys, *words, tmp_path / "run")
        assert code == 0 and out.startswith(f"{best}: ")
    code, out, _ = tool(capsys, "reshape", tmp_path / "run", tmp_path / "reshaped", "--ranks", 2)
    assert code == 0 and out.startswith(f"{best}: ")
    code, out, _ = tool(capsys, "export", tmp_path / "run", tmp_path / "m", "--json")
    found = json.loads(out)
    assert code == 0 and (found["step"], found["is"], found["test_auc"]) == (3, "best", 0.72125)
    code, out, _ = tool(capsys, "export", checkpoints / "latest", tmp_path / "m2")
    assert code == 0 and out.startswith(f"{checkpoints / 'step-000000009'}: ") and "is latest" in out
    (checkpoints / "best").unlink()
    assert tool(capsys, "verify", tmp_path / "run")[1].startswith(f"{checkpoints / 'step-000000009'}: ")


@pytest.mark.parametrize("ranks", [0, -1, 16_385, 10**9])
def test_a_number_of_files_that_nobody_wants(tmp_path: Path, capsys: pytest.CaptureFixture[str], ranks: int) -> None:
    checkpoint = save(tmp_path / "c", [[TensorSlice("table/w/weight", (2, 2), (0, 0), torch.ones(2, 2))]])
    code, _, err = tool(capsys, "reshape", checkpoint, tmp_path / "new", "--ranks", ranks)
    assert code == 2 and err == f"error: --ranks {ranks}: expected 1 to 16,384 files\n"
    assert {path.name for path in tmp_path.iterdir()} == {"c"}


def test_names_with_markup_and_control_codes_are_shown_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "table/[/red]\x1b[2J\n/weight"
    checkpoint = save(tmp_path, [[TensorSlice(name, (2, 2), (0, 0), torch.ones(2, 2))]])
    code, out, _ = tool(capsys, "inspect", checkpoint)
    assert code == 0 and r"table/[/red]\x1b[2J\n/weight" in out and "\x1b" not in out


def test_a_run_or_a_checkpoint_is_no_export(trained: tuple[Path, Leg]) -> None:
    run = run_directory(trained)
    for path, kind in (
        (run, "a run"),
        (run / "checkpoints" / (run / "checkpoints/latest").read_text().strip(), "a checkpoint"),
    ):
        with pytest.raises(UserError, match=f"is {kind}, not an exported model: run 'tools/checkpoint.py export"):
            megarec.load_model(path)
