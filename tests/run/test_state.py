"""Where a run stands goes to disk and comes back as it was."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megarec.checkpoint.format import read_index
from megarec.errors import DamagedCheckpoint
from megarec.run.state import TrainState


def index_of(directory: Path, position: dict[str, Any]) -> Path:
    """A checkpoint of nothing but a position."""
    about: dict[str, Any] = {"format": "megarec checkpoint", "version": 2, "step": 3, "optimizer": "SGD"}
    about |= {"towers": None, "loss_scale": None}
    about |= {key: {} for key in ("topology", "config", "schema", "tensors", "files")}
    (directory / "index.json").write_text(json.dumps({**about, "position": position}))
    return directory


@pytest.mark.parametrize(
    "position",
    [
        TrainState(),
        TrainState(step=3, best=-0.75, best_by="auc", left_out=[7, 9], losses=[1.0, 0.5], skipped={"loss": 2}),
        TrainState(step=3, best=0.0, best_by="logloss", validation_due=True),
    ],
)
def test_it_comes_back_with_its_types(tmp_path: Path, position: TrainState) -> None:
    found = TrainState.from_json(read_index(index_of(tmp_path, position.to_json())).position, tmp_path / "index.json")
    assert repr(found) == repr(position)  # 7 and 7.0 are equal, and not the same


def test_what_an_earlier_version_wrote(tmp_path: Path) -> None:
    """It turned steps into floats, and knew no best_by."""
    earlier = {"step": 3, "best": None, "left_out": [7.0], "losses": [1]}
    found = TrainState.from_json(read_index(index_of(tmp_path, earlier)).position, tmp_path / "index.json")
    assert (found.best, found.best_by, found.losses) == (math.inf, None, [1.0])
    assert repr(found.left_out) == "[7]"


@pytest.mark.parametrize(
    ("values", "where"),
    [
        ({"step": -1}, "step"),
        ({"step": True}, "step"),
        ({"step": "3"}, "step"),
        ({"step": 1 << 62}, "step"),
        ({"since_best": -1}, "since_best"),
        ({"validation_due": 1.5}, "validation_due"),
        ({"best_by": True}, "best_by"),
        ({"skipped": {"loss": -2}}, "skipped.loss"),
        ({"step": None}, "step"),
        ({"skipped_steps": 1.5}, "skipped_steps"),
        ({"left_out": [0.5]}, "left_out.0"),
        ({"best_by": "loss"}, "best_by"),
        ({"more": 1}, "more"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_with_the_file(tmp_path: Path, values: dict[str, Any], where: str) -> None:
    index = read_index(index_of(tmp_path, values))
    with pytest.raises(DamagedCheckpoint) as refused:
        TrainState.from_json(index.position, tmp_path / "index.json")
    assert str(refused.value).startswith(f"{tmp_path / 'index.json'}: position.{where}: ")
    assert "\n" not in str(refused.value)
