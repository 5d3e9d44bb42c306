"""Every example runs in a fresh copy of the checkout, and ends with what it promises."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megarec.data.sources.synthetic import Shape, prepare_synthetic
from tests.docs.blocks import ROOT, copy_checkout

EXAMPLES = sorted(path.name for path in (ROOT / "docs/examples").glob("*.[ps][yh]"))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("examples") / "checkout"
    copy_checkout(directory)
    return directory


def run(checkout: Path, *command: str, venv: Path = Path(sys.prefix)) -> str:
    # DeepSpeed asks for an accelerator at every start; MEGAREC_VENV keeps a script from making an environment.
    environment = {**os.environ, "DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu"), "MEGAREC_VENV": str(venv)}
    done = subprocess.run(
        command, cwd=checkout, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_own_csv_becomes_a_prediction(checkout: Path, warm_venv: Path) -> None:
    run(checkout, "bash", "docs/examples/own_csv.sh", venv=warm_venv)
    with (checkout / "runs/shop/predictions.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    labels = [line.rsplit(",", 1)[1] for line in (ROOT / "docs/examples/shop/test.csv").read_text().split()[1:]]
    assert [row["label"] for row in rows] == labels
    assert all(0 < float(row["probability"]) < 1 for row in rows)


def test_a_dense_model_is_added_from_outside(checkout: Path, warm_venv: Path) -> None:
    prepare_synthetic(Shape(examples=2_000), checkout / "data/synthetic")
    small = ["data.path=data/synthetic", "data.batch_size=100", "train.threads=1", "train.peak_tflops=1.0"]
    output = run(checkout, str(warm_venv / "bin/python"), "docs/examples/add_a_model.py", *small)
    assert "model: gdcn" in output and "step 40/40" in output and "test  at step " in output


@pytest.mark.slow  # two jobs over two hosts; tests/hosts launches one
def test_two_hosts_on_a_laptop(checkout: Path) -> None:
    output = run(checkout, "bash", "docs/examples/two_hosts_on_a_laptop.sh")
    reason = next((line for line in output.splitlines() if line.startswith("skipped: ")), None)
    if reason:
        pytest.skip(reason)
    assert "2 ranks = 2 hosts x 1 local ranks" in output
    sent = {
        name: float(rest.split()[2])
        for name, rest in (
            line.split(":", 1) for line in output.splitlines() if line.startswith(("flat: ", "towers: "))
        )
    }
    assert 0 < sent["towers"] < sent["flat"]


def test_every_example_has_a_test() -> None:
    assert EXAMPLES == ["add_a_model.py", "own_csv.sh", "predict.py", "two_hosts_on_a_laptop.sh"]
