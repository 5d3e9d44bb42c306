"""The grid of a study: what its trials are, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from megarec.errors import UserError
from megarec.scaling.grid import of_models, read_grid
from megarec.scaling.results import Rows
from megarec.scaling.sweep import folder_of
from tests.scaling.studies import write_study

RATES = [{"dense.learning_rate": 0.01}, {"dense.learning_rate": 0.001, "embedding.learning_rate": 0.02}]


def test_every_model_has_every_rate_and_seed(tmp_path: Path) -> None:
    trials = read_grid(write_study(tmp_path, learning_rates=RATES))
    assert [(t.model, t.rate, t.seed, t.tuning) for t in trials] == [
        (model, rate, seed, seed == 1) for model in ("wukong-tiny", "lr") for rate in (0, 1) for seed in (1, 2)
    ]
    assert len({trial.name for trial in trials}) == 8
    last = trials[3].config
    assert (last.train.seed, last.dense.learning_rate, last.embedding.learning_rate) == (2, 0.001, 0.02)
    assert last.deepspeed["tensorboard"] == {"enabled": True}
    assert trials[0].examples == 800
    assert trials[0].gflop == pytest.approx(800 * trials[0].cost.flop / 1e9)
    assert [(model, len(own)) for model, own in of_models(trials)] == [("wukong-tiny", 4), ("lr", 4)]


def test_the_hash_follows_config_and_data(tmp_path: Path) -> None:
    study = write_study(tmp_path)
    first = read_grid(study)
    base = json.loads((tmp_path / "base.json").read_text())
    base["train"].update(threads=2, output_dir="elsewhere")
    (tmp_path / "base.json").write_text(json.dumps(base))
    assert [t.name for t in read_grid(study)] == [t.name for t in first]
    base["train"]["epochs"] = 2
    (tmp_path / "base.json").write_text(json.dumps(base))
    assert not {t.name for t in read_grid(study)} & {t.name for t in first}
    base["train"]["epochs"] = 1
    (tmp_path / "base.json").write_text(json.dumps(base))
    schema = tmp_path / "data/schema.json"
    schema.write_text(schema.read_text().replace("seed 1", "seed 2"))
    assert not {t.name for t in read_grid(study)} & {t.name for t in first}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"modles": {}}, "unknown key 'modles'; did you mean 'models'?"),
        ({"models": {}}, "models={}: dictionary should have at least 1 item"),
        ({"models": {"a/b": {}}}, "'a/b' cannot name a directory"),
        ({"models": {"lr": {"model.dmi": 4}}}, "models.lr: .*unknown key 'model.dmi'; did you mean 'dim'"),
        ({"learning_rates": [{"dense.learning_rate": -1}]}, "greater than or equal to 0"),
        ({"seeds": []}, "at least 1 item"),
        ({"seeds": [1, 1]}, "has the same run twice"),
        ({"base": "absent.json"}, "absent.json: cannot be read"),
    ],
)
def test_a_study_that_does_not_do_is_refused(tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_grid(write_study(tmp_path, **sections))


def test_a_models_name_is_the_name_of_a_directory_however_long(tmp_path: Path) -> None:
    """As a path it was too long for a file, or another's."""
    names = ["wukong-1", "a+b_c.d", "a" * 300, "a" * 299 + "b"]
    trials = read_grid(write_study(tmp_path, models={name: {} for name in names}, seeds=[1]))
    assert [trial.model for trial in trials] == names and len({trial.name for trial in trials}) == 4
    assert trials[0].name == f"wukong-1-seed1-{trials[0].config_hash}"  # as sweeps of earlier versions called it
    rows = Rows(tmp_path / "out", trials)
    for trial in trials:
        folder_of(rows.output, trial).mkdir(parents=True)
        assert folder_of(rows.output, trial).parent == tmp_path / "out/runs"
        assert rows._path(trial).parent == tmp_path / "out/rows"
        rows._path(trial).write_text('{"valid_auc": null, "valid_logloss": 0.5}')
    assert set(Rows(tmp_path / "out", trials).of) == {trial.name for trial in trials}


@pytest.mark.parametrize(
    "name", ["../../victim", "/victim", "a/b", "..", ".hidden", "a\\b", "-o", "a b", "", "\n", "é"]
)
def test_a_models_name_is_no_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="cannot name a directory"):
        read_grid(write_study(tmp_path, models={name: {}}))
