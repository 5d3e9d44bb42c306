"""Every model leaves the trainer: raw rows scored by numpy and onnxruntime have the trainer's logits."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from megarec.config.models import MODELS as KNOWN
from megarec.serving.export import bundle
from megarec.serving.export.bundle import export_bundle
from megarec.serving.scorer import Scorer
from megarec.serving.scorer.scorer import ROWS_AT_ONCE
from megarec.serving.scorer.tables import TableType
from tests.checkpoint.test_written_before import WRITTEN
from tests.serving.trained_runs import OF_TABLE, RUNS, SIZES, raw_rows, trainer_logits

pytest.importorskip("onnxruntime", reason="the extra 'export' is not installed")
pytest.importorskip("onnxscript", reason="the extra 'export' is not installed")

BATCHES = (1, 7, 4_096)
LARGE = 65_536  # scored in parts
MODELS = {str(run["model"]["name"]): name for name, run in reversed(RUNS.items())}  # the plainest run of each
# Kinds of interaction that differ most; the other runs are slow.
FAST = {"wukong", "autoint", "xdeepfm", "afn", "dlrm, dlrm towers", "wukong, several and small embeddings", OF_TABLE}


def test_there_are_twelve_models() -> None:
    assert {*MODELS} == {*KNOWN} and len(KNOWN) == 12


@pytest.mark.parametrize("large", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "large"])
@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in RUNS]
)
def test_raw_rows_have_the_logits_of_the_trainer(
    name: str,
    large: bool,
    trained: Callable[[str], Path],
    data: Path,
    columns: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To 1e-5, with fp32 tables and with fp16; of these the trainer's model has the same rounded rows."""
    own = columns if name == OF_TABLE else data
    checkpoint, rows = trained(name), raw_rows(own)
    for kind in ("fp32", "fp16"):
        export_bundle(checkpoint, tmp_path / kind, tables=kind)
        # The dense model does not depend on the tables' type: it is translated once.
        monkeypatch.setattr(bundle, "export_onnx", lambda _, path: shutil.copy(tmp_path / "fp32/dense.onnx", path))
        scorer, expected = Scorer(tmp_path / kind), trainer_logits(checkpoint, own, kind)
        assert expected.std() > 1e-3 and np.abs(expected).max() < 100  # beyond, float32 itself is as coarse as 1e-6
        for size in (LARGE,) if large else BATCHES:
            places = np.arange(size) % len(rows)
            found = scorer.score([rows[place] for place in places])
            assert not found.errors and np.abs(found.logits - expected[places]).max() <= 1e-5
            assert found.probabilities == pytest.approx(1 / (1 + np.exp(-expected[places].astype(float))), abs=1e-5)


@pytest.mark.parametrize(("step", "name"), [("step-000000003", "export"), ("step-000000006", "latest")])
def test_a_checkpoint_of_two_ranks_and_an_earlier_version(step: str, name: str, tmp_path: Path) -> None:
    """Towers over two hosts, ZeRO 1: the rows have the logits that the version which wrote it computed itself."""
    export_bundle(WRITTEN / "run/checkpoints" / step, tmp_path / "out", WRITTEN / "data")
    expected = [float.fromhex(logit) for logit in json.loads((WRITTEN / "predictions.json").read_text())[name]]
    found = Scorer(tmp_path / "out").score(raw_rows(WRITTEN / "data")[: len(expected)])
    assert found.logits == pytest.approx(expected, rel=0, abs=1e-5) and np.std(expected) > 1e-3


def test_more_rows_than_one_part_keep_their_places(trained: Callable[[str], Path], data: Path, tmp_path: Path) -> None:
    export_bundle(trained("wukong"), tmp_path / "out")
    scorer, rows, expected = Scorer(tmp_path / "out"), raw_rows(data), trainer_logits(trained("wukong"), data)
    places = np.arange(2 * ROWS_AT_ONCE + 7) % len(rows)
    bad = (0, ROWS_AT_ONCE - 1, ROWS_AT_ONCE, len(places) - 1)
    found = scorer.score([{} if place in bad else rows[row] for place, row in enumerate(places)])
    assert set(found.errors) == {*bad} == {*np.flatnonzero(np.isnan(found.logits))}
    assert np.nanmax(np.abs(found.logits - expected[places])) <= 1e-5


def test_quantised_tables_are_smaller_and_near(
    trained: Callable[[str], Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, rows = trained("wukong"), raw_rows(data)
    expected = trainer_logits(checkpoint, data)
    sizes, off = {}, {}
    for kind in get_args(TableType):
        export_bundle(checkpoint, tmp_path / kind, tables=kind)
        monkeypatch.setattr(bundle, "export_onnx", lambda _, path: shutil.copy(tmp_path / "fp32/dense.onnx", path))
        sizes[kind] = sum(path.stat().st_size for path in (tmp_path / kind / "tables").iterdir())
        off[kind] = float(np.abs(Scorer(tmp_path / kind).score(rows).logits - expected).max())
    width = SIZES["dim"]
    wanted = {"fp32": 4 * width, "fp16": 2 * width, "int8": width + 2, "int4": width // 2 + 4}
    assert {kind: size * 4 * width // sizes["fp32"] for kind, size in sizes.items()} == wanted
    assert off["fp32"] <= 1e-5 < off["int4"] < 0.5 and off["fp16"] <= 2e-3 and off["int8"] <= 5e-2
