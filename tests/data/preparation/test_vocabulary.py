from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megarec.data.preparation import vocabulary
from megarec.data.preparation.vocabulary import Hashing, VocabularyCounter

values = st.lists(st.none() | st.sampled_from(["", "a", "b", "ä", "Z", "zz"]), max_size=30)


@given(parts=st.lists(values, max_size=5), probe=values, min_count=st.integers(1, 3))
def test_like_counting_by_hand(parts: list[list[str | None]], probe: list[str | None], min_count: int) -> None:
    counter = VocabularyCounter(pa.string())
    for part in parts:
        counter.add(pa.array(part, pa.string()))
    words = counter.vocabulary(min_count)
    counts = Counter(value for part in parts for value in part if value is not None)
    known = sorted((v for v, n in counts.items() if n >= min_count), key=lambda v: (-counts[v], v.encode()))
    assert words.rows == len(known) + 1
    expected = [known.index(value) + 1 if value in known else 0 for value in probe]
    assert words.encode(pa.array(probe, pa.string())).tolist() == expected


def test_merging_counts_on_the_way_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "_PENDING_LIMIT", 3)
    counter = VocabularyCounter(pa.int64())
    for part in ([5, 5, 7], [7, 7, 8], [9], [5, 5]):
        counter.add(pa.array(part, pa.int64()))
    assert counter.vocabulary().values.to_pylist() == [5, 7, 8, 9]
    assert counter.vocabulary(3).values.to_pylist() == [5, 7]


def test_saved_for_people(tmp_path: Path) -> None:
    counter = VocabularyCounter(pa.string())
    counter.add(pa.array(["b", "a", "b"]))
    counter.vocabulary().save(tmp_path, "letters")
    assert pq.read_table(tmp_path / "vocabulary" / "letters.parquet").to_pydict() == {
        "value": ["b", "a"],
        "row": [1, 2],
    }


def test_hashes_never_change() -> None:
    # From coreutils: printf %s VALUE | b2sum -l 64, read as a little-endian number, modulo 999, plus 1.
    assert Hashing(1000).encode(pa.array(["", "apple", "äpfel", None, "apple"])).tolist() == [520, 28, 926, 0, 28]
    assert Hashing(1000).encode(pa.array([42, -1])).tolist() == Hashing(1000).encode(pa.array(["42", "-1"])).tolist()


def test_hashes_fill_the_table() -> None:
    rows = Hashing(11).encode(pa.array([str(i) for i in range(5000)]))
    counts = Counter(rows.tolist())
    assert sorted(counts) == list(range(1, 11))
    assert all(abs(n - 500) < 5 * 500**0.5 for n in counts.values())
