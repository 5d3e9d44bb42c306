"""Data shared by the tests of this directory."""

from pathlib import Path

import pytest

from megarec.data.sources.synthetic import Shape, prepare_synthetic


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint-data") / "data"
    prepare_synthetic(Shape(examples=1_000, seed=2), path)  # 800 train, 100 valid, 100 test
    return path
