"""Runs that read lists position by position leave the trainer: raw rows have its logits, 1, 7 and 512 at a time."""

import csv
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megarec.checkpoint.offline import locate
from megarec.data.preparation.prepare import MaxBad, prepare_table
from megarec.distributed.rank_pool import RankPool
from megarec.serving.export.bundle import export_bundle
from megarec.serving.export.golden import _lengths
from tests.checkpoint.runs import leg, write_run
from tests.serving.trained_runs import raw_rows, trainer_logits

pytest.importorskip("onnxruntime", reason="the extra 'export' is not installed")
pytest.importorskip("onnxscript", reason="the extra 'export' is not installed")
from megarec.serving.scorer.scorer import Scorer

COLUMNS = {
    "item": {"type": "categorical"},
    "user": {"type": "categorical", "hash": 40},
    "past": {"type": "sequence", "max_length": 9, "newest": "last", "table": "item"},
    "stars": {"type": "sequence", "max_length": 9, "newest": "last", "dtype": "integer"},
    "pages": {"type": "sequence", "max_length": 9, "newest": "first"},
    "tags": {"type": "multi_valued"},
    "price": {"type": "numeric", "standardise": True},
    "label": {"type": "label"},
}
PAST = {"features": ["past", "stars"], "target": ["item"], "max_length": 4, "tables": "target"}
PAGES = {"features": ["pages"], "target": ["user"], "max_length": 3}
HSTU = {"block": "hstu", "heads": 2}
WITH_TOWERS = "din and hstu past tower modules"
CASES: dict[str, dict[str, Any]] = {
    "din": {"model": {"sequences": [PAST | {"block": "din", "mlp": [8]}, PAGES | {"block": "din"}]}},
    "hstu": {"model": {"name": "dcn", "layers": 1, "head": [8], "sequences": [PAST | HSTU, PAGES | HSTU]}},
    WITH_TOWERS: {
        "model": {"sequences": [PAST | {"block": "din", "mlp": [8]}, PAGES | HSTU]},
        "parallel": {"towers": [["item", "past", "stars"], ["user", "pages", "tags"]]},
        "tower_module": {"name": "wukong", "num_fm": 1, "num_lcb": 1, "rank": 4, "mlp": [8]},
    },
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lists of 0 to 11 values; preparation keeps 9 and the model 3 or 4."""
    directory, random = tmp_path_factory.mktemp("sequences"), np.random.default_rng(7)
    for split, rows in (("train", 300), ("valid", 80), ("test", 512)):
        with (directory / f"{split}.csv").open("w", newline="") as file:
            lines = csv.writer(file)
            lines.writerow(COLUMNS)
            for _ in range(rows):
                count, item = int(random.integers(12)), int(random.integers(30))
                past, pages = random.integers(30, size=count), random.integers(15, size=random.integers(6))
                lists = ("|".join(f"{name}{n}" for n in own) for name, own in (("i", past), ("p", pages)))
                stars = "|".join(map(str, random.integers(1, 6, count)))
                seen, viewed = lists
                tags = "|".join(f"t{n}" for n in random.integers(5, size=random.integers(3)))
                price = round(float(random.exponential(20)), 2)
                lines.writerow([f"i{item}", f"u{random.integers(60)}", seen, stars, viewed, tags, price, count % 2])
    (directory / "spec.json").write_text(json.dumps({"name": "sequences", "columns": COLUMNS}))
    splits = {split: [directory / f"{split}.csv"] for split in ("train", "valid", "test")}
    prepare_table(directory / "spec.json", splits, directory / "data", workers=1, max_bad=MaxBad())
    return directory / "data"


@pytest.mark.parametrize("case", ["din", "hstu", pytest.param(WITH_TOWERS, marks=pytest.mark.slow)])
def test_raw_rows_have_the_logits_of_the_trainer(
    case: str, data: Path, rank_pool: Callable[[int], RankPool], tmp_path: Path
) -> None:
    sections = {"dense": {"learning_rate": 0.001}, "embedding": {"learning_rate": 0.02}} | CASES[case]
    path = write_run(tmp_path, data, **sections)
    run = json.loads(path.read_text())
    if "name" in CASES[case]["model"]:
        run["model"] = {"dim": 8} | CASES[case]["model"]
    path.write_text(json.dumps(run))
    rank_pool(1).run(partial(leg, load=False, save=True), path, [], 0, 3)
    checkpoint = locate(tmp_path / "out/checkpoints/latest")
    export_bundle(checkpoint, tmp_path / "exported")
    scorer, expected, rows = Scorer(tmp_path / "exported"), trainer_logits(checkpoint, data), raw_rows(data)
    assert expected.std() > 1e-3 and len(rows) == 512
    for size in (1, 7, 512):
        found = scorer.score(rows[:size])
        assert not found.errors and np.abs(found.logits - expected[:size]).max() <= 1e-5

    longest = max(rows, key=lambda row: row["past"].count("|"))
    newest = {name: "|".join(longest[name].split("|")[-4:]) for name in ("past", "stars")}
    older = {name: "|".join(["i1", longest[name]]) for name in ("past",)} | {"stars": f"5|{longest['stars']}"}
    apart = longest | {"stars": newest["stars"]}
    found = scorer.score([longest, longest | newest, longest | older, apart])
    assert found.logits[0] == found.logits[1] == found.logits[2], "older values than the newest four do not count"
    assert found.errors == {3: "stars: 4 values, expected 9, one for each of past"}


def test_lists_of_the_golden_sample_are_equally_long_once_they_are_cut() -> None:
    features = [
        {"name": name, "multi_valued": most is not None, "raw": {} if most is None else {"max_length": most}}
        for name, most in (("item", None), ("past", 2), ("stars", 9), ("alone", 9))
    ]
    manifest = {"features": features, "sequences": [{"features": ["past", "stars"]}, {"features": ["item"]}]}
    random = np.random.default_rng(1)
    drawn = [_lengths(manifest, random) for _ in range(100)]
    assert {(own["past"], own["stars"]) for own in drawn} == {(0, 0), (1, 1), (2, 2)}
    assert {own["alone"] for own in drawn} == {0, 1, 2, 3}
