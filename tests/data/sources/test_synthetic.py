from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from megarec.data.schema import CategoricalFeature, Schema, load_schema
from megarec.data.sources.synthetic import Shape, prepare_like, prepare_synthetic
from megarec.data.store import open_split
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
    ("sizes", "message"),
    [
        ({"examples": 9}, "--examples 9: expected at least 10"),
        ({"single": 0}, "--single 0"),
        ({"examples": 10**30}, "--examples 10*: expected at most 1,000,000,000,000"),
        ({"single": 10**8}, "--single 10*: expected at most 10,000"),
        ({"rows": 10**20}, "--rows 10*: expected at most"),
        ({"seed": 10**30}, "--seed 10*: expected at most"),
    ],
)
def test_sizes_that_make_no_sense(tmp_path: Path, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare_synthetic(Shape(**sizes), tmp_path / "out")


def wide_schema(features: int, numeric: int) -> Schema:
    """Huge tables, some lists, one table shared: far more rows than a machine holds."""
    categorical = [
        CategoricalFeature(name=f"f{i}", rows=5 * 10 ** (i % 9), multi_valued=i % 3 == 1, pooling="mean")
        for i in range(features)
    ]
    shared = CategoricalFeature(name="shared", rows=categorical[8].rows, table="f8", pooling="mean")
    return Schema(
        name="wide",
        label="clicked",
        categorical=(*categorical, shared),
        numeric=tuple(f"x{i}" for i in range(numeric)),
        rows={"train": 10**12, "valid": 0, "test": 0},
    )


def test_the_features_of_a_schema_with_capped_tables(tmp_path: Path) -> None:
    like = wide_schema(features=11, numeric=3)
    schema = prepare_like(like, tmp_path / "out", examples=305, seed=1, max_rows=40)
    assert schema == load_schema(tmp_path / "out")
    assert schema.rows == {"train": 244, "valid": 30, "test": 31}
    assert [f.rows for f in schema.categorical] == [5, 40, 40, 40, 40, 40, 40, 40, 40, 5, 40, 40]
    same = {"name", "multi_valued", "pooling", "table"}
    assert [f.model_dump(include=same) for f in schema.categorical] == [
        f.model_dump(include=same) for f in like.categorical
    ]
    store = open_split(tmp_path / "out", "train", schema, "error")  # ids beyond the capped rows would be refused
    assert len(store) == 244


def test_huge_tables_need_no_memory(tmp_path: Path) -> None:
    """Uncapped ids reach far into tables that could not be held: 500 million rows and more."""
    schema = prepare_like(wide_schema(9, 0), tmp_path / "out", examples=1_000, seed=1)
    assert schema.categorical[8].rows == 5 * 10**8
    assert pq.read_table(tmp_path / "out" / "train")["f8"].to_numpy().max() > 4 * 10**8


def test_the_label_depends_on_the_features_with_the_fewest_rows(tmp_path: Path) -> None:
    """f0 and f9 have 5 rows: the label's rate differs between their values by far more than chance allows;
    between those of `shared`, which is not among the eight smallest, it does not."""
    schema = prepare_like(wide_schema(11, 0), tmp_path / "out", examples=40_000, seed=3, max_rows=100)
    table = pq.read_table(tmp_path / "out" / "train")
    label = table[schema.label].to_numpy()

    def chi_square_per_value(feature: str) -> float:
        ids = table[feature].to_numpy()
        rate = label.mean()
        groups = [label[ids == i] for i in np.unique(ids)]
        return float(np.mean([len(g) * (g.mean() - rate) ** 2 / (rate * (1 - rate)) for g in groups]))

    assert max(chi_square_per_value("f0"), chi_square_per_value("f9")) > 10
    assert chi_square_per_value("shared") < 2


def test_many_columns_are_written_in_small_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megarec.data.sources.synthetic._CHUNK_VALUES", 24 * 50)
    schema = prepare_like(wide_schema(20, 2), tmp_path / "out", examples=203, seed=1, max_rows=9)
    groups = pq.ParquetFile(tmp_path / "out" / "train" / "000.parquet").metadata
    assert [groups.row_group(i).num_rows for i in range(groups.num_row_groups)] == [50, 50, 50, 12]
    assert len(open_split(tmp_path / "out", "train", schema, "error")) == 162


@pytest.mark.parametrize(
    ("sizes", "message"),
    [({"examples": 9, "seed": 1}, "--examples 9"), ({"examples": 10, "seed": 1, "max_rows": 1}, "--max-rows 1")],
)
def test_sizes_for_a_schema_that_make_no_sense(tmp_path: Path, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=f"{message}: expected at least"):
        prepare_like(wide_schema(9, 1), tmp_path / "out", **sizes)
    assert not (tmp_path / "out").exists()


def test_weights_where_the_schema_has_them(tmp_path: Path) -> None:
    tags = CategoricalFeature(name="tags", rows=9, multi_valued=True, weighted=True)
    like = Schema(name="x", categorical=(CategoricalFeature(name="user", rows=5), tags), rows={})
    schema = prepare_like(like, tmp_path / "out", examples=60, seed=1)
    _, ids, _ = open_split(tmp_path / "out", "train", schema, "error").gather(np.arange(10))
    weights = ids["tags"].weights
    assert weights is not None and weights.shape == ids["tags"].values.shape
    assert weights.min() >= 0.5 and weights.unique().numel() > 2
