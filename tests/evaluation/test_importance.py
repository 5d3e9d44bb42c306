"""What permuting a feature costs: of a model whose needs are known."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score
from torch import Tensor

from megarec.commands.importance import as_json
from megarec.data.batch import Batch
from megarec.data.schema import Schema, load_schema
from megarec.data.sources.synthetic import Shape, prepare_synthetic
from megarec.data.store import open_split
from megarec.evaluation.importance import Importances, importances
from tests.data.prepared import SCHEMA, write_prepared


class Model:
    """Needs the price most, the number of tags a little, and nothing else."""

    schema = SCHEMA
    seen: list[Batch]

    def __init__(self) -> None:
        self.seen = []

    def predict(self, batch: Batch) -> Tensor:
        self.seen.append(batch)
        lengths = batch.ids["tags"].lengths
        assert lengths is not None and int(lengths.sum()) == len(batch.ids["tags"].values)
        return torch.sin(batch.numeric[:, 0] * 7) * 3 + 0.3 * lengths


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("importance")
    write_prepared(path, 300)
    return path


def found_of(data: Path, **options: int) -> Importances:
    settings = {"repeats": 4, "most": 1000, "batch_size": 128, "seed": 3} | options
    store = open_split(data, "test", SCHEMA, "error")
    (found,) = importances(Model(), store, torch.device("cpu"), **settings).values()  # type: ignore[arg-type]
    return found


def test_what_a_model_does_not_read_costs_nothing_and_what_it_reads_does(data: Path) -> None:
    found = found_of(data)
    assert (found.examples, found.repeats) == (300, 4)
    store = open_split(data, "test", SCHEMA, "error")
    batch = store.read(np.arange(300), np.arange(300), 300, False)
    logits, labels = Model().predict(batch).numpy(), batch.labels.numpy()
    assert found.auc == pytest.approx(roc_auc_score(labels, logits), abs=1e-12)
    assert found.logloss == pytest.approx(log_loss(labels, 1 / (1 + np.exp(-logits.astype(float)))), abs=1e-9)
    by_name = {own.feature: own for own in found.features}
    assert set(by_name) == {"user", "tags", "item", "history", "price", "age"}
    for name in ("user", "item", "history", "age"):
        own = by_name[name]
        assert (own.auc.mean, own.logloss.mean, own.auc.interval.low, own.logloss.interval.high) == (0, 0, 0, 0)
    assert all(by_name[name].logloss.mean != 0 for name in ("price", "tags"))
    means = [own.logloss.mean for own in found.features]
    assert means == sorted(means, reverse=True)


def test_it_is_seeded_and_does_not_depend_on_the_batches(data: Path) -> None:
    assert found_of(data) == found_of(data, batch_size=77)
    assert found_of(data) != found_of(data, seed=4)


def test_of_many_rows_some_are_drawn_and_one_repeat_has_no_interval(data: Path) -> None:
    found = found_of(data, most=50, repeats=1)
    assert found.examples == 50 and np.isnan(found.features[0].auc.interval.low)
    assert found.features[0].auc.described()["interval"] == [None, None]


class TwoLabels:
    """The first label's logit is of numeric_0 alone, the second one's, which rows may lack, of numeric_1 alone."""

    def __init__(self, schema: Schema) -> None:
        self.schema = schema

    def predict(self, batch: Batch) -> Tensor:
        columns = [self.schema.numeric.index(f"numeric_{int(label != 'label')}") for label in self.schema.predicted]
        found = 3 * torch.sin(batch.numeric[:, columns])
        return found if len(columns) > 1 else found[:, 0]


def test_every_label_has_its_own_over_the_rows_that_have_it(tmp_path: Path) -> None:
    prepare_synthetic(Shape(examples=2_000, seed=2, labels=2), tmp_path)
    there = load_schema(tmp_path)
    both = there.model_copy(update={"tasks": ("label", "label_1")})
    store = open_split(tmp_path, "test", both, "error")
    options = {"repeats": 3, "most": 150, "batch_size": 64, "seed": 1}
    found = importances(TwoLabels(both), store, torch.device("cpu"), **options)  # type: ignore[arg-type]
    assert list(found) == ["label", "label_1"]

    rows = np.sort(np.random.default_rng([1, 17]).choice(len(store), 150, replace=False))
    batch = store.read(rows, rows, len(rows), False)
    for number, (label, own) in enumerate(found.items()):
        alone = there.model_copy(update={"label": label})
        one = importances(
            TwoLabels(alone), open_split(tmp_path, "test", alone, "error"), torch.device("cpu"), **options
        )  # type: ignore[arg-type]
        assert one == {label: own}, "as of a model of this label alone"
        has = batch.labels[:, number].isfinite()
        logits, labels = (values[has, number].numpy() for values in (TwoLabels(both).predict(batch), batch.labels))
        assert own.auc == pytest.approx(roc_auc_score(labels, logits), abs=1e-12)
        assert own.logloss == pytest.approx(log_loss(labels, 1 / (1 + np.exp(-logits.astype(float)))), abs=1e-9)
        assert own.examples == int(has.sum()) and (own.examples < 150) == (label == "label_1")
        assert {one.feature for one in own.features if one.logloss.mean} == {f"numeric_{number}"}
    printed = as_json(found, "label_1")
    assert printed["auc"] == found["label_1"].auc and list(printed["labels"]) == list(found)  # type: ignore[call-overload]
