"""What an earlier version wrote is read, resumed and exported with the numbers that it gave (README.txt beside it).

MEGAREC_EXACT=1 asks for the same floats: on the machine that wrote them. Elsewhere the last bits may differ.
"""

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import megarec
from megarec.config.load import load_config
from megarec.data.batch import Batch, Ids
from megarec.distributed.rank_pool import RankPool
from megarec.errors import UserError
from megarec.training import trainer
from tests.logged import logged_lines
from tests.processes import python

WRITTEN = Path(__file__).parent / "written_by_b9b1d12"
ROOT = Path(megarec.__file__).resolve().parent.parent
BEST, LATEST = "step-000000003", "step-000000006"
TOLERANCE = 0.0 if os.environ.get("MEGAREC_EXACT") == "1" else 1e-5


def recorded(name: str) -> Any:
    return json.loads((WRITTEN / "predictions.json").read_text())[name]


def batch() -> Batch:
    rows = json.loads((WRITTEN / "batch.json").read_text())
    ids = {
        name: Ids(torch.tensor(f["values"]), None if f["lengths"] is None else torch.tensor(f["lengths"]))
        for name, f in rows["ids"].items()
    }
    numeric = torch.tensor([[float.fromhex(x) for x in row] for row in rows["numeric"]], dtype=torch.float32)
    size = len(rows["labels"])
    return Batch(numeric, ids, torch.tensor(rows["labels"]).float(), torch.arange(size), size)


def check_logits(export: Path, name: str) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        logits = megarec.load_model(export).predict(batch())
    finally:
        torch.set_num_threads(before)
    expected = torch.tensor([float.fromhex(x) for x in recorded(name)], dtype=torch.float32)
    torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)


def check_metrics(work: Path, tolerance: float = TOLERANCE) -> None:
    found = json.loads((work / "run/metrics.json").read_text())
    for split, expected in recorded("metrics").items():
        for key, value in expected.items():
            number = float.fromhex(value) if isinstance(value, str) else value
            assert found[split][key] == pytest.approx(number, rel=0, abs=tolerance), (split, key)


def train(work: Path, overrides: list[str]) -> list[str]:
    """Runs on every rank; what it says."""
    lines = logged_lines()
    os.chdir(work)
    trainer.train(load_config(Path("run.json"), overrides), resume=True, started=time.time())
    return lines


def script(work: Path, *words: object, real: bool = False) -> str:
    """Run a script of this checkout in `work`; what it says on both streams."""
    done = python(*words, cwd=work, env={**os.environ, "DS_ACCELERATOR": "cpu"}, real=real)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def checkpoint(work: Path, *words: str, real: bool = False) -> str:
    return script(work, ROOT / "tools/checkpoint.py", *words, real=real)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A copy to work in: a run writes beside its checkpoints."""
    return Path(shutil.copytree(WRITTEN, tmp_path / "work"))


def test_its_export_predicts_the_same() -> None:
    check_logits(WRITTEN / "export", "export")


def test_a_batch_that_is_not_of_the_model_is_refused() -> None:
    """An id one past the end of a table would be the first row of the next one."""
    model, good = megarec.load_model(WRITTEN / "export"), batch()
    name = model.schema.categorical[0].name
    rows, ids = model.schema.categorical[0].rows, good.ids[name]

    def with_ids(**others: Ids) -> Batch:
        return dataclasses.replace(good, ids={**good.ids, **others})

    past, none = ids.values.clone(), {key: value for key, value in good.ids.items() if key != name}
    past[3] = rows
    wrong = {
        rf"batch.ids\['{name}'\] holds {rows}: expected": with_ids(**{name: Ids(past)}),
        rf"batch.ids misses '{name}'": dataclasses.replace(good, ids=none),
        rf"batch.ids\['{name}'\] has lengths, expected none": with_ids(
            **{name: Ids(ids.values, torch.ones_like(ids.values))}
        ),
        r"batch.ids\['multi_0'\] has no lengths, expected some": with_ids(multi_0=Ids(ids.values)),
        r"batch.numeric is \[16, 1\], expected \[16, 2\]": dataclasses.replace(good, numeric=good.numeric[:, :1]),
    }
    for message, bad in wrong.items():
        with pytest.raises(UserError, match=message):
            model.predict(bad)


def test_its_checkpoints_are_whole_and_export_the_same(work: Path) -> None:
    for name in (BEST, LATEST):
        assert json.loads(checkpoint(work, "verify", f"run/checkpoints/{name}", "--json"))["good"]
    checkpoint(work, "export", "run/checkpoints/best", "again")
    assert (work / "again/model.safetensors").read_bytes() == (work / "export/model.safetensors").read_bytes()
    check_logits(work / "again", "export")
    printed = checkpoint(work, "export", "run", "its-best", real=True)
    assert f"checkpoints/{BEST}: bytes" in printed and "step 3, is best, valid_logloss 0.672496" in printed
    check_logits(work / "its-best", "export")
    checkpoint(work, "export", "run/checkpoints/latest", "newest")
    check_logits(work / "newest", "latest")


def test_it_is_resumed_and_goes_on(work: Path, rank_pool: Callable[[int], RankPool]) -> None:
    logged = rank_pool(2).run(train, work, ["train.max_steps=9"])[0]
    assert any(f"resumed from run/checkpoints/{LATEST}" in text for text in logged)
    checkpoint(work, "export", "run/checkpoints/step-000000009", "longer")
    check_logits(work / "longer", "resumed 3 steps")
    check_metrics(work)


def test_one_rank_resumes_it(work: Path) -> None:
    sets = ("--set", "parallel.exchange=flat", "--set", "parallel.ranks_per_host=null")
    config = ("--config", "run.json", "--resume", *sets)
    text = script(work, ROOT / "launch/train.py", *config)
    assert f"resumed from run/checkpoints/{LATEST}" in text
    check_metrics(work, 1e-5)  # sums in another order
