from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from megarec.data.schema import load_schema
from megarec.data.store import open_split
from megarec.data.synthetic import Shape, prepare_synthetic
from megarec.errors import UserError


def test_shape_and_label(tmp_path: Path) -> None:
    schema = prepare_synthetic(Shape(examples=1003, single=3, multi=2, numeric=2, rows=17), tmp_path / "out")
    assert schema == load_schema(tmp_path / "out") and "synthetic" in schema.source
    assert schema.rows == {"train": 802, "valid": 100, "test": 101}
    assert [(f.name, f.table) for f in schema.categorical if f.multi_valued] == [
        ("multi_0", "single_0"),
        ("multi_1", None),
    ]
    store = open_split(tmp_path / "out", "train", schema, "error")  # every id and number is checked here
    _, ids, labels = store.gather(np.arange(len(store)))
    assert 0.3 < labels.mean() < 0.7
    lengths = ids["multi_0"].lengths
    assert lengths is not None and lengths.min() == 0 and lengths.max() > 1


@pytest.mark.parametrize(("single", "multi", "numeric"), [(1, 0, 0), (1, 1, 0), (2, 0, 3)])
def test_any_mix(tmp_path: Path, single: int, multi: int, numeric: int) -> None:
    schema = prepare_synthetic(Shape(50, single, multi, numeric), tmp_path / "out")
    assert len(open_split(tmp_path / "out", "valid", schema, "error")) == 5


def test_fixed_by_its_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        prepare_synthetic(Shape(examples=200, seed=seed), tmp_path / name)
    a, b, c = (pq.read_table(tmp_path / name / "train") for name in "abc")
    assert a.equals(b) and not a.equals(c)


def test_the_signal_can_be_learnt_from_numbers_alone(tmp_path: Path) -> None:
    """Logistic regression would do better; least squares is enough to beat chance by far."""
    schema = prepare_synthetic(Shape(), tmp_path / "out")
    splits = {}
    for split in ("train", "test"):
        store = open_split(tmp_path / "out", split, schema, "error")  # type: ignore[arg-type]
        numeric, _, labels = store.gather(np.arange(len(store)))
        splits[split] = numeric.numpy(), labels.numpy()
    weights = np.linalg.lstsq(splits["train"][0], splits["train"][1] - 0.5, rcond=None)[0]
    scores, labels = splits["test"][0] @ weights, splits["test"][1]
    auc = (scores[labels == 1][:, None] > scores[labels == 0]).mean()
    assert auc > 0.6


@pytest.mark.parametrize(
    ("sizes", "told"), [({"examples": 9}, "--examples 9: expected at least 10"), ({"single": 0}, "--single 0")]
)
def test_sizes_that_make_no_sense(tmp_path: Path, sizes: dict[str, int], told: str) -> None:
    with pytest.raises(UserError, match=told):
        prepare_synthetic(Shape(**sizes), tmp_path / "out")
