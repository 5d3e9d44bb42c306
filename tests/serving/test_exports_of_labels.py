"""An export of a run of several labels predicts them all, by the scorer, as a file and over HTTP."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from starlette.testclient import TestClient

from megarec.checkpoint.offline import locate
from megarec.config.load import load_config
from megarec.data.sources.synthetic import Shape, prepare_synthetic
from megarec.serving.bundle_predictor import BundlePredictor
from megarec.serving.export.bundle import export_bundle
from megarec.serving.scorer.scorer import Scorer
from megarec.serving.server import application
from megarec.training import trainer
from tests.checkpoint.runs import write_run
from tests.serving.trained_runs import trainer_logits

LABELS = ["label", "label_1"]


def test_every_label_leaves_the_trainer(tmp_path: Path) -> None:
    data = tmp_path / "data"
    prepare_synthetic(Shape(examples=400, multi=0, seed=3, labels=2), data)
    config = write_run(
        tmp_path, data, model={"tasks": {"name": "esmm"}}, data={"label": LABELS}, train={"max_steps": 2}
    )
    trainer.train(load_config(config), resume=False, started=time.time())
    export = tmp_path / "export"
    checkpoint = locate(tmp_path / "out")
    export_bundle(checkpoint, export, calibrate=True)
    expected, scorer = trainer_logits(checkpoint, data, labels=LABELS), Scorer(export)
    rows = pq.read_table(data / "test").drop_columns(["label", "label_1", "weight"]).to_pylist()
    found = scorer.score([*rows, {"single_0": "x"}])
    assert scorer.labels == LABELS and expected.shape == (len(rows), 2)
    assert np.abs(found.logits[:-1] - expected).max() <= 1e-5
    assert list(found.errors) == [len(rows)] and np.isnan(found.probabilities[-1]).all()
    temperature = np.array(scorer.bundle.manifest["temperature"])
    assert temperature.shape == (2,)
    assert np.allclose(found.probabilities[:-1], 1 / (1 + np.exp(-expected / temperature)), atol=1e-5)
    assert BundlePredictor(export).schema.tasks == ("label", "label_1")

    table = pq.read_table(data / "test").drop_columns(["label", "label_1", "weight"])
    pa_csv.write_csv(table, tmp_path / "rows.csv")
    command = [sys.executable, str(export / "score.py"), str(tmp_path / "rows.csv")]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[0] == "label:prediction,label_1:prediction,error" and len(lines) == 1 + len(rows)
    assert np.allclose([float(value) for value in lines[1].split(",")[:2]], found.probabilities[0], atol=1e-5)

    with TestClient(application(scorer)) as client:
        answer = client.post("/score", json={"rows": [rows[0], {"single_0": "x"}]}).json()
    assert list(answer["predictions"][0]) == LABELS and answer["predictions"][1] is None
    assert np.allclose(list(answer["predictions"][0].values()), found.probabilities[0])
    assert "dims: [ 2 ]" in (export / "config.pbtxt").read_text()
