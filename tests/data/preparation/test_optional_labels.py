"""A label that rows may lack stays missing from a file to a batch; one that they may not is a bad row."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from megarec.config.sections import DataConfig
from megarec.data.loader import TrainLoader
from megarec.data.preparation.kept_spec import load_prepared
from megarec.data.preparation.prepare import prepare_table
from megarec.data.schema import load_schema, selected
from megarec.data.statistics.report import statistics
from megarec.data.store import open_split
from megarec.errors import UserError
from tests.data.preparation.test_prepare import all_splits, write_spec

COLUMNS: dict[str, Any] = {
    "user": {"type": "categorical"},
    "click": {"type": "label"},
    "buy": {"type": "label", "optional": True},
    "counts": {"type": "weight"},
}
ROWS = ["a,1,1,0.5", "b,0,,1", "a,1,0,2", "b,0,1,0", "c,1,,3"]


def prepared(tmp_path: Path, rows: list[str]) -> Path:
    (tmp_path / "rows.csv").write_text("\n".join(["user,click,buy,counts", *rows]) + "\n")
    out = tmp_path / "out"
    prepare_table(write_spec(tmp_path, {"name": "shop", "columns": COLUMNS}), all_splits(tmp_path / "rows.csv"), out)
    return out


def test_missing_labels_and_weights_reach_the_batch(tmp_path: Path) -> None:
    out = prepared(tmp_path, ROWS)
    schema = load_schema(out)
    assert schema.labels == ("click", "buy") and schema.optional == ("buy",) and not schema.weighted
    assert load_prepared(out).kept.spec.columns["buy"].optional  # type: ignore[union-attr]
    assert pq.read_table(out / "train")["buy"].to_pylist() == [1, None, 0, 1, None]

    both = selected(schema, DataConfig(path=str(out), label=["click", "buy"], weighted=True))
    store = open_split(out, "train", both, "error")
    batch = TrainLoader(
        store, both, batch_size=5, rank=0, world_size=1, seed=1, prefetch=1, pin_memory=False
    ).batch(0, 0)  # fmt: skip
    found = sorted(map(tuple, np.column_stack([batch.labels.numpy(), batch.weights]).tolist()), key=str)  # type: ignore[list-item]
    nan = float("nan")
    wanted = [(1.0, 1.0, 0.5), (0.0, nan, 1.0), (1.0, 0.0, 2.0), (0.0, 1.0, 0.0), (1.0, nan, 3.0)]
    assert list(map(str, found)) == sorted(map(str, wanted)) and batch.some_missing
    moved = batch.in_one_buffer(pinned=False)
    assert moved.some_missing and moved.weights is not None and moved.weights.equal(batch.weights)  # type: ignore[arg-type]

    alone = open_split(out, "train", selected(schema, DataConfig(path=str(out))), "error")
    assert alone.gather(np.arange(5))[2].tolist() == [1, 0, 1, 0, 1] and alone.labels == [0, 1]
    splits = statistics(out).labels["buy"]
    assert (splits["train"].missing, splits["train"].invalid, splits["train"].rate) == (2, 0, 2 / 3)


@pytest.mark.parametrize(
    ("row", "message"),
    [("a,,1,1", "columns.click.optional"), ("a,1,2,1", "expected 0 or 1"), ("a,1,nan?,1", "0 or 1")],
)
def test_what_is_no_label_is_a_bad_row(tmp_path: Path, row: str, message: str) -> None:
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        prepared(tmp_path, [*ROWS, row])


def test_a_null_where_none_may_be_is_seen_in_the_shards_and_so_is_a_weight_below_0(tmp_path: Path) -> None:
    out = prepared(tmp_path, ROWS)
    path = out / "schema.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps(about | {"optional": []}))
    schema = load_schema(out)
    with pytest.raises(UserError, match="buy=None, expected present"):
        open_split(out, "train", selected(schema, DataConfig(path=str(out), label="buy")), "error")
    table = pq.read_table(out / "train").to_pandas()
    table.loc[3, "counts"] = -1.0
    table.to_parquet(next((out / "train").glob("*.parquet")))
    weighted = selected(schema, DataConfig(path=str(out), weighted=True))
    with pytest.raises(UserError, match=r"row 3 .*counts=-1.0, expected a finite number of at least 0"):
        open_split(out, "train", weighted, "error")
    with pytest.raises(UserError, match=r"data\.weighted=true, and shop has no weight column"):
        selected(schema.model_copy(update={"weight": None}), DataConfig(path=str(out), weighted=True))
