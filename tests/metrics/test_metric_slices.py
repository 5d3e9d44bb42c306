import math

import numpy as np
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from megarec.metrics.slices import in_tenths, slices_of
from megarec.metrics.weighted import probabilities_of


def test_every_value_has_the_metrics_of_its_rows() -> None:
    draw = np.random.default_rng(0)
    codes, labels = draw.integers(-1, 4, 2000), draw.integers(0, 2, 2000)
    logits = draw.normal(size=2000).astype(np.float32).round(1)
    values = ["a", "b", "nobody", "d", "e"]
    codes[codes == 2] = 4
    found = slices_of("kind", logits, labels, codes, values)
    assert sum(own.examples for own in found.largest) == 2000 and (found.others, found.other_examples) == (0, 0)
    assert {own.value for own in found.largest} == {None, "a", "b", "d", "e"}
    assert [own.examples for own in found.largest] == sorted((own.examples for own in found.largest), reverse=True)
    for own in found.largest:
        rows = codes == (-1 if own.value is None else values.index(own.value))
        x, y = logits[rows], labels[rows]
        assert (own.examples, own.positives) == (rows.sum(), y.sum())
        assert own.auc == pytest.approx(roc_auc_score(y, x), abs=1e-12)
        assert own.logloss == pytest.approx(log_loss(y, probabilities_of(x)), abs=1e-12)
        assert own.calibration == pytest.approx(probabilities_of(x).sum() / y.sum(), abs=1e-12)
        assert own.ne == pytest.approx(own.logloss / log_loss(y, np.full(len(y), y.mean())), abs=1e-12)


def test_of_many_values_those_with_the_most_rows_are_shown_and_the_rest_is_counted() -> None:
    codes = np.repeat([5, 3, 1, 0], [4, 3, 2, 1])
    found = slices_of("kind", np.arange(10.0), np.ones(10), codes, list("abcdef"), most=2)
    assert [(own.value, own.examples) for own in found.largest] == [("f", 4), ("d", 3)]
    assert (found.others, found.other_examples) == (2, 3)
    described = found.described()
    assert described["left_out"] == {"values": 2, "examples": 3}
    assert described["values"][0]["auc"] is None and described["values"][0]["ne"] is None


def test_no_rows_have_no_slices() -> None:
    found = slices_of("kind", np.empty(0), np.empty(0), np.empty(0, np.int64), ["a"])
    assert (found.largest, found.others, found.other_examples) == ([], 0, 0)


def test_numbers_are_cut_into_tenths() -> None:
    codes, names = in_tenths(np.array([*range(100), math.nan, math.inf]))
    assert codes[-2:].tolist() == [-1, -1]
    assert np.bincount(codes[:-2]).tolist() == [10] * 10 and names[0] == "below 10" and names[-1] == "90 and more"
    assert in_tenths(np.zeros(5))[1] == ["all"] and in_tenths(np.full(3, math.nan))[1] == []
    assert in_tenths(np.array([0.0] * 85 + [1.0] * 15))[1] == ["below 1", "1 and more"]
