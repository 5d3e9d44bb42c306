"""tools/evaluate.py: a run's own metrics of its test split, for a run, a checkpoint and an export; errors."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import log_loss, ndcg_score, roc_auc_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megarec.checkpoint.format import sealed
from megarec.checkpoint.offline import export
from megarec.commands import evaluate, importance
from megarec.config.load import load_config
from megarec.data.sources.synthetic import Shape, prepare_synthetic
from megarec.distributed.rank_pool import RankPool
from megarec.evaluation import prediction_table
from megarec.training.trainer import train

TOOL = Path(__file__).parents[2] / "tools/evaluate.py"
TOWERS = [["single_0", "single_2", "multi_0"], ["single_1", "single_3", "multi_1"]]
RUN = {
    "model": {"layers": 1, "num_fm": 2, "num_lcb": 2, "rank": 4, "mlp": [16], "dim": 8, "head": [8], "dropout": 0.1},
    "embedding": {"learning_rate": 0.1},
    "dense": {"learning_rate": 0.01},
    "parallel": {"exchange": "tower", "towers": TOWERS, "ranks_per_host": 1},
    "tower_module": {"name": "wukong", "num_fm": 1, "num_lcb": 1, "rank": 4, "mlp": [8]},
    "deepspeed": {"zero_optimization": {"stage": 2}},
}
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,600 examples of training, 200 of validation, 200 of test; with a group, which no model reads."""
    path = tmp_path_factory.mktemp("evaluate") / "data"
    prepare_synthetic(Shape(examples=2_000, seed=2), path)
    for shard in path.glob("*/*.parquet"):
        table = pq.read_table(shard)
        users = np.random.default_rng(len(table)).integers(0, 25, len(table)) * 10**12
        pq.write_table(table.append_column("user", pa.array(users)), shard)
    schema = json.loads((path / "schema.json").read_text())
    (path / "schema.json").write_text(json.dumps(schema | {"group": "user"}))
    return path


def train_on_a_rank(path: Path) -> dict[str, Any]:
    return train(load_config(path), resume=False, started=time.time())


@pytest.fixture(scope="module")
def run(rank_pool: Callable[[int], RankPool], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of two ranks on two hosts, with tower modules; its batches do not divide the splits."""
    directory = tmp_path_factory.mktemp("run")
    sections = {"data": {"path": str(data), "batch_size": 96}, "train": {"epochs": 3, "output_dir": f"{directory}/out"}}
    (directory / "run.json").write_text(json.dumps(RUN | sections))
    rank_pool(2).run(train_on_a_rank, directory / "run.json")
    return directory / "out"


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Exit code, standard output and standard error of the command."""

    def called(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
        code = 0
        try:
            evaluate.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return called


def copied_data(data: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The data set with another schema.json."""
    shutil.copytree(data, target, ignore=shutil.ignore_patterns(".arrow"))
    schema = json.loads((target / "schema.json").read_text())
    change(schema)
    (target / "schema.json").write_text(json.dumps(schema))
    return target


@pytest.mark.parametrize("split", ["test", "valid"])
def test_a_run_scores_as_it_recorded_itself(call: Call, run: Path, data: Path, split: str) -> None:
    code, out, err = call("--run", run, "--data", data, "--split", split, "--json")
    assert code == 0, err
    found, recorded = json.loads(out), json.loads((run / "metrics.json").read_text())[split]
    gauc, recorded_gauc = found.pop("gauc"), recorded.pop("gauc")
    for name in ("ndcg", "hit_rate"):
        assert list(recorded[name]) == ["10"] and found[name] == pytest.approx(recorded.pop(name), rel=0, abs=1e-6)
    assert set(recorded) == {"auc", "logloss", "ne", "calibration", "prediction_mean", "examples"}
    assert {name: found[name] for name in recorded} == pytest.approx(recorded, rel=0, abs=1e-6)
    assert gauc.pop("column") == "user" and gauc == pytest.approx(recorded_gauc, rel=0, abs=1e-6)
    assert f"GAUC {recorded_gauc['by_impressions']:.4f} by impressions" in (run / "log.txt").read_text()
    (events,) = run.glob("tensorboard/**/events*")
    drawn = EventAccumulator(str(events)).Reload()
    for tag, value in (("gauc_by_group", recorded_gauc["by_group"]), ("ndcg_at_10", found["ndcg"]["10"])):
        assert value in [pytest.approx(point.value, abs=1e-6) for point in drawn.Scalars(f"{split}/{tag}")]
    assert found["calibrated_logloss"] is None and found["slices"] == []


def test_checkpoints_pointers_and_exports_are_the_same_model(call: Call, run: Path, data: Path, tmp_path: Path) -> None:
    best = run / "checkpoints" / (run / "checkpoints/best").read_text().strip()
    export(best, tmp_path / "exported")
    expected = call("--run", run, "--data", data, "--json")[1]
    for model in (best, run / "checkpoints", run / "checkpoints/best", tmp_path / "exported"):
        assert call("--run", model, "--data", data, "--json")[1] == expected, model
    shutil.copytree(run, tmp_path / "no best")
    (tmp_path / "no best/checkpoints/best").unlink()
    latest = (run / "checkpoints/latest").read_text().strip()
    assert f"no best/checkpoints/{latest} on {data}" in call("--run", tmp_path / "no best", "--data", data)[1]


def test_predictions_are_the_rows_of_the_split_in_order(
    call: Call, run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prediction_table, "ROWS_PER_GROUP", 150)
    file = tmp_path / "predictions.parquet"
    file.write_text("an earlier one")
    found = json.loads(call("--run", run, "--data", data, "--json", "--predictions", file)[1])
    table = pq.read_table(file)
    assert table.column_names == ["label", "logit", "prediction", "group"] and list(tmp_path.iterdir()) == [file]
    assert pq.ParquetFile(file).metadata.num_row_groups == 2  # 96 + 96, and the last 8
    labels, logits, predictions, groups = (column.to_numpy() for column in table)
    rows = pa.concat_tables(pq.read_table(shard) for shard in sorted((data / "test").glob("*.parquet")))
    assert labels.tolist() == rows["label"].to_pylist() and groups.tolist() == rows["user"].to_pylist()
    np.testing.assert_allclose(predictions, 1 / (1 + np.exp(-logits.astype(np.float64))), rtol=1e-12)
    for scores in (logits, predictions):
        assert found["auc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-6)
    assert found["logloss"] == pytest.approx(log_loss(labels, predictions), abs=1e-9)
    by_group = [(groups == g).nonzero()[0] for g in np.unique(groups)]
    aucs = [(len(own), roc_auc_score(labels[own], logits[own])) for own in by_group if len(set(labels[own])) == 2]
    assert found["gauc"]["by_group"] == pytest.approx(np.mean([auc for _, auc in aucs]), abs=1e-12)
    weighted = sum(n * auc for n, auc in aucs) / sum(n for n, _ in aucs)
    assert found["gauc"]["by_impressions"] == pytest.approx(weighted, abs=1e-12)
    assert (found["gauc"]["groups"], found["gauc"]["one_label"]) == (len(by_group), len(by_group) - len(aucs))
    gains = [ndcg_score(labels[own][None], logits[own][None], k=10) for own in by_group if labels[own].any()]
    assert found["ndcg"]["10"] == pytest.approx(np.mean(gains), abs=1e-12)


def test_everything_that_a_ranking_team_asks_for(call: Call, run: Path, data: Path, tmp_path: Path) -> None:
    latest = run / "checkpoints" / (run / "checkpoints/latest").read_text().strip()
    options = ["--slice", "single_0", "numeric_0", "--calibrate", "--k", "1", "5", "--bootstrap", "50"]
    options += ["--compare", latest, "--html", tmp_path / "page.html"]
    code, out, err = call("--run", run, "--data", data, "--json", *options)
    assert code == 0, err
    found = json.loads(out)
    assert call("--run", run, "--data", data, "--json", *options)[1] == out, "seeded"
    assert set(found["intervals"]) == {
        "auc", "logloss", "ne", "calibration", "gauc_by_impressions", "gauc_by_group", "ndcg@1", "ndcg@5",
        "hit_rate@1", "hit_rate@5",
    }  # fmt: skip
    assert found["intervals"]["auc"][0] < found["auc"] < found["intervals"]["auc"][1]
    ids, numbers = found["slices"]
    assert ids["column"] == "single_0" and sum(own["examples"] for own in ids["values"]) <= 200
    assert sum(own["examples"] for own in ids["values"]) + ids["left_out"]["examples"] == 200
    assert len(numbers["values"]) == 10 and {own["examples"] for own in numbers["values"]} == {20}
    assert found["calibrated_logloss"]["fitted_on"] == "valid"
    assert 0 < found["calibrated_logloss"]["temperature"] < 1 and 0 < found["calibrated_logloss"]["histogram"] < 1
    assert sum(own["examples"] for own in found["reliability"]) == 200
    compared = found["compared"]
    assert (compared["other"], compared["draws"], compared["drawn_by"]) == (str(latest), 50, "groups")
    assert compared["metrics"]["auc"]["this"] == pytest.approx(found["auc"], abs=1e-12)
    assert compared["metrics"]["gauc_by_group"]["this"] == pytest.approx(found["gauc"]["by_group"], abs=1e-12)
    html = (tmp_path / "page.html").read_text()
    body = html[html.index("<body") : html.index("</html>")]
    ElementTree.fromstring(body.replace("class=name>", 'class="name">').replace("class=n>", 'class="n">'))
    assert "reliability curve" in html and "prefers-color-scheme: dark" in html and "<script" not in html
    assert "http" not in html.replace("http-equiv", "") and f"Beside {latest}" in html and "GAUC by group" in html
    lines = call("--run", run, "--data", data, *options)[1]
    for words in ("95 % interval, 50 draws", "HR@5", "with temperature", "p-value", "drawn by groups"):
        assert words in lines


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--group", "usr"], "there is no column 'usr'; did you mean 'user'?"),
        (["--slice", "multi_0"], "column 'multi_0' is list<"),
        (["--k", "0"], "'0': expected a whole number from 1 to 10,000"),
        (["--compare", "nowhere"], "--compare nowhere: is not a directory"),
        (["--compare", "nowhere", "--bootstrap", "0"], "a comparison needs draws"),
        (["--html", "no/page.html"], "--html no/page.html: no is not a directory"),
    ],
)
def test_wrong_options_are_one_line(call: Call, run: Path, data: Path, options: list[str], message: str) -> None:
    code, out, err = call("--run", run, "--data", data, *options)
    assert (code, out) == (2, "") and message in err


def test_without_a_group_there_is_no_gauc_and_any_column_can_be_one(
    call: Call, run: Path, data: Path, tmp_path: Path
) -> None:
    other = copied_data(data, tmp_path / "data", lambda schema: schema.pop("group"))
    found = json.loads(call("--run", run, "--data", other, "--json", "--bootstrap", "0")[1])
    assert found["gauc"] is None and found["intervals"] == {} and "ndcg" not in found
    by_user, by_id = (
        json.loads(call("--run", run, "--data", other, "--json", "--bootstrap", "0", "--group", name)[1])["gauc"]
        for name in ("user", "single_0")
    )
    assert by_user["groups"] == 25 and by_id["column"] == "single_0" and by_id["groups"] > 25


def test_importance_is_one_table_or_json(
    run: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["importance", str(run), "--repeats", "2", "--json"])
    importance.main()
    found = json.loads(capsys.readouterr().out)
    recorded = json.loads((run / "metrics.json").read_text())["test"]
    assert (found["examples"], found["repeats"]) == (200, 2) and found["auc"] == pytest.approx(
        recorded["auc"], abs=1e-6
    )
    schema = json.loads((data / "schema.json").read_text())
    names = {feature["name"] for feature in schema["categorical"]} | set(schema["numeric"])
    assert {own["feature"] for own in found["features"]} == names
    assert any(own["logloss_lost"]["mean"] > 0 for own in found["features"])
    monkeypatch.setattr(sys, "argv", ["importance", str(run), "--repeats", "2", "--split", "valid"])
    importance.main()
    lines = capsys.readouterr().out.splitlines()
    assert (
        "valid: 200 examples, 2 repeats" in lines[0] and lines[3].startswith("feature") and len(lines) == 4 + len(names)
    )
    monkeypatch.setattr(sys, "argv", ["importance", "nowhere"])
    with pytest.raises(SystemExit) as ended:
        importance.main()
    assert ended.value.code == 2 and "error: RUN nowhere: is not a directory" in capsys.readouterr().err


def with_a_bad_row(data: Path, target: Path) -> Path:
    other = copied_data(data, target, lambda schema: None)
    table = pq.read_table(other / "test/000.parquet")
    column = table.schema.get_field_index("single_0")
    ids = [100, *table["single_0"].to_pylist()[1:]]
    pq.write_table(table.set_column(column, table.schema.field(column), [ids]), other / "test/000.parquet")
    return other


def test_a_bad_row_is_an_error_or_is_left_out_as_the_run_does(
    call: Call, run: Path, data: Path, tmp_path: Path
) -> None:
    other = with_a_bad_row(data, tmp_path / "data")
    code, _, err = call("--run", run, "--data", other)
    assert code == 2 and f"{other}/test/000.parquet: row 0 (from 0): single_0=100, expected an id in [0, 100)" in err
    name = (run / "checkpoints/best").read_text().strip()
    shutil.copytree(run / "checkpoints" / name, tmp_path / "copy")
    index = json.loads((tmp_path / "copy/index.json").read_text())
    index["config"]["data"]["bad_rows"] = "skip"
    (tmp_path / "copy/index.json").write_bytes(sealed(index))
    code, out, err = call("--run", tmp_path / "copy", "--data", other, "--json")
    assert code == 0 and json.loads(out)["examples"] == 199
    assert err == "data.bad_rows=skip: left out of test: {'single_0 is not an id in [0, 100)': 1}\n"


def rename(schema: dict[str, Any]) -> None:
    schema["categorical"][1]["name"] = "single_x"


def more_rows(schema: dict[str, Any]) -> None:
    for feature in schema["categorical"]:
        feature["rows"] = 101


def multi_valued(schema: dict[str, Any]) -> None:
    schema["categorical"][2]["multi_valued"] = True


def no_number(schema: dict[str, Any]) -> None:
    schema["numeric"].remove("numeric_1")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (rename, "single_1 is missing (did you mean 'single_x'?), the model has it as a categorical feature"),
        (more_rows, "single_0.rows=101, the model's table has 100 rows, so expected at most that many"),
        (multi_valued, "single_2.multi_valued=true, the model was trained with false"),
        (no_number, "numeric_1 is missing (did you mean 'numeric_2'?), the model has it as a numeric feature"),
    ],
)
def test_data_that_do_not_fit_the_model_are_one_line(
    call: Call, run: Path, data: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], expected: str
) -> None:
    other = copied_data(data, tmp_path / "data", change)
    code, out, err = call("--run", run, "--data", other, "--predictions", tmp_path / "p.parquet")
    assert (code, out) == (2, "") and err.startswith(f"error: {other / 'schema.json'}: {expected}; ")
    assert err.count("\n") == 1 and list(tmp_path.iterdir()) == [other]


def test_fewer_rows_and_more_features_fit(call: Call, run: Path, data: Path, tmp_path: Path) -> None:
    def change(schema: dict[str, Any]) -> None:
        schema["numeric"].append("weight")
        del schema["rows"]["test"]

    other = copied_data(data, tmp_path / "data", change)
    assert (
        call("--run", run, "--data", other)[1].splitlines()[1:]
        == call("--run", run, "--data", data)[1].splitlines()[1:]
    )


def test_where_no_model_is(call: Call, data: Path, tmp_path: Path) -> None:
    for path, what in ((tmp_path, "holds no checkpoint"), (tmp_path / "typo", "is not a directory")):
        code, out, err = call("--run", path, "--data", data)
        assert (code, out) == (2, "") and err.startswith(f"error: --run {path}: {what}; ")
        assert err.count("\n") == 1


def test_a_damaged_checkpoint_is_refused(call: Call, run: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "checkpoints" / (run / "checkpoints/latest").read_text().strip(), tmp_path / "copy")
    file = tmp_path / "copy/rank-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    code, out, err = call("--run", tmp_path / "copy", "--data", data)
    assert (code, out) == (2, "") and err.startswith(f"error: {file}: checksum") and err.count("\n") == 1


def test_predictions_that_cannot_be_written_are_one_line(
    call: Call, run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path, what in ((tmp_path, "is a directory"), (tmp_path / "no/p.parquet", f"{tmp_path}/no is not")):
        code, out, err = call("--run", run, "--data", data, "--predictions", path)
        assert (code, out) == (2, "") and err.startswith(f"error: --predictions {path}: {what}")

    os.mkfifo(tmp_path / "fifo")  # as /dev/null is for root: the rename would put a file in its place
    code, out, err = call("--run", run, "--data", data, "--predictions", tmp_path / "fifo")
    assert (code, out) == (2, "") and "fifo: is not a regular file" in err and (tmp_path / "fifo").is_fifo()
    (tmp_path / "fifo").unlink()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    code, out, err = call("--run", run, "--data", data, "--predictions", tmp_path / "p.parquet")
    assert (code, out) == (2, "") and "cannot be written (No space left on device)" in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_tool_prints_json_alone(run: Path, data: Path) -> None:
    command = [sys.executable, str(TOOL), "--run", str(run), "--data", str(data), "--json"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["examples"] == 200 and ran.stdout.count("\n") == 1
