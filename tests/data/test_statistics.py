"""The figures against plain NumPy over all rows at once; the page as a reader and a hostile name find it."""

import json
import math
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megarec.data.preparation.prepare import prepare_as, prepare_table
from megarec.data.schema import Schema, made_up
from megarec.data.statistics import counts, report
from megarec.data.statistics.drift import CANDIDATES, drift_of_ids, drift_of_numbers
from megarec.data.statistics.report import statistics, write_statistics
from megarec.errors import UserError
from tests.processes import python

TOOL = Path(__file__).resolve().parents[2] / "tools" / "prepare_data.py"
ROWS = {"train": 6000, "valid": 1500, "test": 1500}
HOSTILE, QUOTED, WORLD = "<script>alert(1)</script>", "a\"b' onload='x & y", "имя 🎬"
SCHEMA = Schema.model_validate(
    {
        "name": "</title><script>x</script>",
        "label_rule": "clicked & <b>bought</b>",
        "categorical": [
            {"name": HOSTILE, "rows": 300},
            {"name": QUOTED, "rows": 64},
            {"name": "moved", "rows": 300},
            {"name": WORLD, "rows": 90, "multi_valued": True, "weighted": True, "mean_length": 2},
            {"name": "plain", "rows": 4},
        ],
        "numeric": ["price", "shifted", "one"],
        "rows": ROWS,
        "identity": {
            HOSTILE: "vocabulary 0 of 299 values",
            QUOTED: "BLAKE2b-64 of the text into 64 rows",
            "moved": "vocabulary 1 of 299 values",
            WORLD: "vocabulary 2 of 89 values",
        },
        "unknown": {split: {HOSTILE: 0.25, "moved": 0.0, WORLD: 0.0} for split in ROWS},
        "sharing": {QUOTED: 0.6},
        "bad_rows": {"<i>bad</i>": 3},
    }
)
Columns = dict[str, Any]


def columns_of(split: str) -> Columns:
    """Arrays by column; of the list the flat ids, their lengths and weights."""
    random = np.random.default_rng([7, list(ROWS).index(split)])
    rows = ROWS[split]

    def power(size: int, top: int) -> "np.ndarray[Any, np.dtype[np.int64]]":
        return (top * random.random(size) ** 3).astype(np.int64)

    lengths = random.poisson(2, rows)
    shift = 1 if split == "test" else 0
    return {
        HOSTILE: power(rows, 300),
        QUOTED: 1 + power(rows, 63),
        "moved": 1 + (power(rows, 299) + 40 * shift) % 299,
        WORLD: power(int(lengths.sum()), 90),
        "lengths": lengths,
        "weights": random.exponential(size=int(lengths.sum())).astype(np.float32),
        "plain": random.integers(0, 4, rows),
        "price": (random.standard_normal(rows) * 10).astype(np.float32),
        "shifted": (random.standard_normal(rows) + 0.5 * shift).astype(np.float32),
        "one": np.ones(rows, np.float32),
        "label": (random.random(rows) < 0.3).astype(np.int8),
    }


def table_of(columns: Columns) -> pa.Table:
    offsets = pa.array(np.append(0, np.cumsum(columns["lengths"])).astype(np.int32))
    found = {name: pa.array(values) for name, values in columns.items() if name not in ("lengths", "weights")}
    found[WORLD] = pa.ListArray.from_arrays(offsets, found[WORLD])
    found[f"{WORLD}:weights"] = pa.ListArray.from_arrays(offsets, pa.array(columns["weights"]))
    return pa.table(found)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    for split in ROWS:
        table = table_of(columns_of(split))
        (path / split).mkdir()
        for shard in range(3):  # shards and row groups of odd sizes
            part = table.slice(shard * 1900, 1900 if shard < 2 else None)
            if part.num_rows:
                pq.write_table(part, path / split / f"{shard:03d}.parquet", row_group_size=777)
    (path / "vocabulary").mkdir()
    values = pa.table({"value": [f"<img src=x onerror={i}>" for i in range(1, 300)], "row": range(1, 300)})
    pq.write_table(values, path / "vocabulary" / "moved.parquet")
    (path / "schema.json").write_text(SCHEMA.model_dump_json())
    write_statistics(path, path)
    return path


@pytest.fixture(scope="module")
def found(data: Path) -> dict[str, Any]:
    return json.loads((data / "statistics.json").read_text(encoding="utf-8"))


def feature(found: dict[str, Any], name: str) -> dict[str, Any]:
    return next(feature for feature in found["features"] if feature["name"] == name)


def test_labels(found: dict[str, Any]) -> None:
    for split, own in found["labels"]["label"].items():
        labels = columns_of(split)["label"]
        assert own["rows"] == len(labels) and own["rate"] == labels.mean() and own["invalid"] == 0
        n, p, z = len(labels), labels.mean(), 1.959964  # Wilson's interval solves (rate - p)^2 = z^2 p (1 - p) / n
        for end in own["interval"]:
            assert math.isclose((end - p) ** 2, z * z * end * (1 - end) / n, rel_tol=1e-9)


@pytest.mark.parametrize("name", [HOSTILE, QUOTED, "moved", WORLD, "plain"])
def test_ids(found: dict[str, Any], name: str) -> None:
    own = feature(found, name)
    zero = name != "plain"  # row 0 stands for no value
    for split in ROWS:
        ids, here = columns_of(split)[name], own["splits"][split]
        assert (here["values"], here["distinct"]) == (len(ids), len(np.unique(ids[ids > 0] if zero else ids)))
        assert here["row_0"] == np.mean(ids == 0) and here["invalid"] == 0
    ids = columns_of("train")[name]
    values, times = np.unique(ids[ids > 0] if zero else ids, return_counts=True)
    order = np.lexsort((values, -times))
    for top in (1, 10, 100):
        assert math.isclose(own["top"][str(top)], times[order][:top].sum() / len(ids), rel_tol=1e-12)
    assert [one["row"] for one in own["frequent"]] == values[order][:10].tolist()
    assert all(times[order][rank - 1] == count for rank, count in own["curve"])
    assert own["curve"][0][0] == 1 and own["curve"][-1][0] == len(values)


def test_missing_and_unknown(found: dict[str, Any]) -> None:
    """Row 0 holds both; the share of unknown ones among those that are there distinguishes them."""
    for split in ROWS:
        columns = columns_of(split)
        vocabulary, hashed = feature(found, HOSTILE)["splits"][split], feature(found, QUOTED)["splits"][split]
        row_0 = np.mean(columns[HOSTILE] == 0)
        assert vocabulary["unknown"] == 0.25
        assert math.isclose(vocabulary["missing"], max(0, 1 - (1 - row_0) / 0.75), abs_tol=1e-6)
        assert hashed["unknown"] is None and hashed["missing"] == np.mean(columns[QUOTED] == 0)
        assert feature(found, WORLD)["splits"][split]["missing"] == np.mean(columns["lengths"] == 0)
        plain = feature(found, "plain")["splits"][split]
        assert plain["unknown"] is None and plain["missing"] is None
    assert feature(found, QUOTED)["sharing"] == 0.6


def test_lists(found: dict[str, Any]) -> None:
    for split in ROWS:
        columns, own = columns_of(split), feature(found, WORLD)["splits"][split]
        lengths = own["lengths"]
        assert lengths["histogram"] == np.bincount(columns["lengths"]).tolist()
        assert math.isclose(lengths["mean"], columns["lengths"].mean(), rel_tol=1e-12)
        assert lengths["longest"] == columns["lengths"].max()
        check_numbers(own["weights"], columns["weights"], feature(found, WORLD)["weight_edges"])


@pytest.mark.parametrize("name", ["price", "shifted", "one"])
def test_numbers(found: dict[str, Any], name: str) -> None:
    own = feature(found, name)
    for split in ROWS:
        check_numbers(own["splits"][split], columns_of(split)[name], own["edges"])


def check_numbers(own: dict[str, Any], numbers: "np.ndarray[Any, np.dtype[np.float32]]", edges: list[float]) -> None:
    exact = numbers.astype(np.float64)
    assert (own["count"], own["invalid"]) == (len(exact), 0)
    assert math.isclose(own["mean"], exact.mean(), rel_tol=1e-9, abs_tol=1e-12)
    assert math.isclose(own["deviation"], exact.std(), rel_tol=1e-9, abs_tol=1e-12)
    assert (own["least"], own["most"]) == (exact.min(), exact.max())
    for share, value in own["quantiles"].items():
        wanted = np.quantile(exact, float(share), method="inverted_cdf")
        assert abs(value - wanted) <= 0.004 * abs(wanted), (share, value, wanted)
    inside = np.histogram(np.clip(exact, edges[0], edges[-1]), edges)[0]
    assert sum(own["histogram"]) == len(exact)
    assert np.abs(np.cumsum(own["histogram"]) - np.cumsum(inside)).max() <= 0.02 * len(exact)  # numbers are rounded


def test_drift_is_seen_where_it_was_planted(found: dict[str, Any]) -> None:
    drifted = {(f["name"], split) for f in found["features"] for split, d in f["drift"].items() if d["drifted"]}
    assert drifted == {("moved", "test"), ("shifted", "test")}
    train, test = (np.bincount(columns_of(split)["moved"], minlength=300)[1:] for split in ("train", "test"))
    own = feature(found, "moved")["drift"]["test"]
    groups: list[list[int]] = [[]]  # by frequency, until ten rows of the smaller sample are expected
    left = dict(enumerate((train + test).tolist()))
    for place in sorted(left, key=lambda place: (-left[place], (place + 1) * 0x9E3779B97F4A7C15 % 2**64)):
        if left[place] < 4 * 5:
            break
        groups[-1].append(place)
        if sum(left[other] for other in groups[-1]) >= 10 * 5:
            groups.append([])
    groups[-1] += set(left) - {place for group in groups for place in group}
    p, q = (np.array([c[group].sum() for group in groups]) / c.sum() for c in (train, test))
    with np.errstate(divide="ignore", invalid="ignore"):
        divergence = sum(np.nansum(one * np.log2(2 * one / (p + q))) for one in (p, q)) / 2
    assert math.isclose(own["divergence"], divergence, rel_tol=1e-9) and divergence > 2 * own["noise"]
    assert own["buckets"] == len(groups)


def test_chance_is_no_drift() -> None:
    """Samples of one distribution stay below the noise, as often as it promises; sizes are as unlike as splits are."""
    random = np.random.default_rng(1)
    alarms = np.zeros(2)
    for trial in range(400):
        first, second, size = [(4000, 500, 500), (9000, 9000, 9000), (50_000, 200, 500), (300, 9000, 500)][trial % 4]
        shares = np.arange(1, size + 1) ** -0.8
        ids = np.stack([random.multinomial(n, shares / shares.sum()) for n in (first, second)])
        ids = ids[:, np.argsort(-ids[0], kind="stable")]  # as a vocabulary has them; what training lacks is row 0
        ids = ids[:, ids[0] > 0]
        rows = np.argsort(-ids.sum(axis=0), kind="stable")[:CANDIDATES]
        alarms[0] += drift_of_ids(rows + 1, ids[:, rows], (first, second), (first, second), 0.01).excess > 0
        numbers = [np.unique(random.standard_normal(n).round(1), return_counts=True) for n in (first, second)]
        alarms[1] += drift_of_numbers(numbers[0], numbers[1], 0.01).excess > 0
    assert (alarms <= 14).all(), alarms  # 4 expected; 15 has a probability of 2e-5
    none = np.zeros(0)
    assert drift_of_numbers((none, none.astype(np.int64)), numbers[1], 0.01).excess == 0


def test_a_split_does_not_depend_on_another(data: Path, tmp_path: Path) -> None:
    """A test split that repeats training chooses no buckets for validation."""
    for split, of in (("train", "train"), ("valid", "valid"), ("test", "train")):
        shutil.copytree(data / of, tmp_path / split)
    shutil.copy(data / "schema.json", tmp_path)
    for own, other in zip(statistics(data).features, statistics(tmp_path).features, strict=True):
        assert own.drift["valid"] == other.drift["valid"] and other.drift["test"].divergence == 0


def test_the_bytes_do_not_depend_on_workers_or_ranges(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "_FEW", 0)
    monkeypatch.setattr(report, "RANGE_ROWS", 70)  # tables of 300 rows need five passes
    write_statistics(data, tmp_path, workers=2)
    for name in ("statistics.json", "statistics.html"):
        assert (tmp_path / name).read_bytes() == (data / name).read_bytes()


def test_values_that_do_not_count(tmp_path: Path) -> None:
    """Nulls, ids outside the table, numbers that are not finite and invalid labels are reported, and nothing else."""
    schema = Schema.model_validate(
        {
            "name": "odd",
            "categorical": [{"name": "id", "rows": 3}, {"name": "list", "rows": 3, "multi_valued": True}],
            "numeric": ["x"],
            "rows": {"train": 6, "test": 0},
        }
    )
    (tmp_path / "train").mkdir()
    columns = {
        "id": pa.array([0, 1, None, 3, -1, 2**40]),
        "list": pa.array([[0, 7], None, [], [1], [None], [2, 2]], pa.list_(pa.int64())),
        "x": pa.array([1.0, math.nan, math.inf, None, 3.0, 1e300]),
        "label": pa.array([0.0, 1.0, 2.0, None, math.nan, 1.0]),
    }
    pq.write_table(pa.table(columns), tmp_path / "train" / "000.parquet")
    (tmp_path / "schema.json").write_text(schema.model_dump_json())
    found = write_statistics(tmp_path, tmp_path / "out").as_json()
    labels = found["labels"]["label"]["train"]
    assert (labels["rows"], labels["rate"], labels["invalid"]) == (6, 2 / 3, 3)
    one, many, number = (feature(found, name)["splits"]["train"] for name in ("id", "list", "x"))
    assert (one["values"], one["distinct"], one["invalid"]) == (2, 2, 4)
    assert (many["values"], many["distinct"], many["invalid"]) == (4, 3, 3)
    assert many["lengths"]["histogram"] == [1, 2, 2]
    assert (number["count"], number["invalid"], number["mean"]) == (2, 4, 2.0)
    text = (tmp_path / "out" / "statistics.html").read_text(encoding="utf-8")
    assert "3 of &#x27;label&#x27; are neither 0 nor 1" in text and "3 features with nulls" in text


def test_numbers_far_apart_and_equal_ones() -> None:
    own = counts.NumberCounts()
    for values in ([-0.0, 0.0, 3.4e38], [-3.4e38, 256.0], [257.0, 1e-42]):
        own.add(pa.array(values, pa.float32()))
    numbers, times = own.tally()
    assert times.sum() == 7 and (np.diff(numbers) > 0).all() and times[numbers == 0] == 3
    assert numbers[0] == own.least and numbers[-1] == own.most and 256.0 in numbers


class Page(HTMLParser):
    """Notes what a browser would make of a page: open elements, references, text."""

    VOID = ("meta", "br", "circle", "path", "rect", "polyline")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in self.VOID, f"<{tag}/> is not empty in HTML"
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def parsed(data: Path) -> Iterator[Page]:
    page = Page()
    page.feed((data / "statistics.html").read_text(encoding="utf-8"))
    page.close()
    yield page


def test_the_page_is_whole_and_refers_to_nothing_outside(parsed: Page) -> None:
    assert not parsed.open and parsed.seen.count("html") == 1
    assert not set(parsed.seen) & {"script", "link", "img", "iframe", "object", "image", "use", "b"}
    references = {value for _, name, value in parsed.attributes if name in ("href", "src", "xlink:href", "action")}
    ids = {f"#{value}" for _, name, value in parsed.attributes if name == "id"}
    assert references and references <= ids
    assert not [name for _, name, _ in parsed.attributes if name.startswith("on")]
    style = "".join(parsed.text)
    assert "url(" not in style and "@import" not in style and "://" not in style
    assert "prefers-color-scheme: dark" in style


def test_hostile_names_are_text(parsed: Page, data: Path) -> None:
    text = "".join(parsed.text)
    for name in (HOSTILE, QUOTED, WORLD, "</title><script>x</script>", "clicked & <b>bought</b>", "<i>bad</i>"):
        assert name in text
    assert "<img src=x onerror=" in text  # a value of a vocabulary
    first = text[text.index("Feature by feature") :]
    assert first.index("moved") < first.index(HOSTILE) < first.index("plain"), "the most drifted, then the most unknown"


def test_what_a_page_of_many_features_weighs(tmp_path: Path) -> None:
    """691 features: the page stays readable by a browser; details are folded."""
    features = [{"name": f"f{i}", "rows": 50} for i in range(676)]
    schema = Schema.model_validate(
        {"name": "wide", "categorical": features, "numeric": [f"n{i}" for i in range(15)], "rows": {"train": 90}}
    )
    schema = schema.model_copy(update={"identity": made_up(schema.categorical, schema.numeric, 1, "nothing")})
    (tmp_path / "train").mkdir()
    random = np.random.default_rng(0)
    columns = {f["name"]: random.integers(0, 50, 90) for f in features}
    columns |= {name: random.standard_normal(90).astype(np.float32) for name in schema.numeric}
    pq.write_table(pa.table(columns | {"label": random.integers(0, 2, 90)}), tmp_path / "train" / "000.parquet")
    (tmp_path / "schema.json").write_text(schema.model_dump_json())
    write_statistics(tmp_path, tmp_path)
    text = (tmp_path / "statistics.html").read_text(encoding="utf-8")
    assert len(text) < 5 << 20 and text.count("<details>") == 691 and "<details open>" not in text


def test_the_command(data: Path, tmp_path: Path) -> None:
    done = python(TOOL, "statistics", str(data), "--output", str(tmp_path / "new"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "statistics.html" in done.stdout and "'moved'" in done.stdout
    assert (tmp_path / "new" / "statistics.html").read_bytes() == (data / "statistics.html").read_bytes()


SPEC = {
    "name": "own",
    "columns": {
        "paid": {"type": "label"},
        "id": {"type": "categorical"},
        "hex": {"type": "categorical", "dtype": "hexadecimal"},
        "age": {"type": "bucketised", "boundaries": [18, 65.5]},
        "price": {"type": "numeric", "missing": 0, "log": True},
        "label": {"type": "label"},
    },
}


def test_what_a_preparation_knows(tmp_path: Path) -> None:
    """What is missing, beside what is unknown; values as people wrote them; later files without a label."""
    (tmp_path / "spec.json").write_text(json.dumps(SPEC))
    train = "id,hex,age,price,label,paid\na,0a,17,,1,0\na,ff,,2,0,0\n,ff,70,,0,0\nb,,18,0,1,0\n"
    test = "id,hex,age,price\nnew,,,\n,ff,3,1\n"
    for name, text in (("train", train), ("valid", train), ("test", test)):
        (tmp_path / f"{name}.csv").write_text(text)
    files = {split: [tmp_path / "train.csv"] for split in ROWS}
    prepare_table(tmp_path / "spec.json", files, tmp_path / "data")
    found = write_statistics(tmp_path / "data", tmp_path / "data").as_json()
    missing = {name: feature(found, name)["splits"]["train"]["missing"] for name in ("id", "hex", "age", "price")}
    assert missing == {"id": 0.25, "hex": 0.25, "age": 0.25, "price": 0.5}
    assert {label: own["train"]["rate"] for label, own in found["labels"].items()} == {"paid": 0.0, "label": 0.5}
    assert "all &#x27;paid&#x27; of train are 0" in (tmp_path / "data" / "statistics.html").read_text()
    values = {name: [one["value"] for one in feature(found, name)["frequent"]] for name in ("id", "hex", "age")}
    assert values == {"id": ["a", "b"], "hex": ["ff", "a"], "age": ["below 18", "18 to 65.5", "from 65.5"]}

    prepare_as(tmp_path / "data", {"test": [tmp_path / "test.csv"]}, tmp_path / "later")
    found = write_statistics(tmp_path / "later", tmp_path / "later").as_json()
    assert found["labels"]["label"] == {
        "test": {"rows": 2, "rate": None, "interval": (0.0, 1.0), "invalid": 0, "missing": 0}
    }
    own = {name: feature(found, name)["splits"]["test"] for name in missing}
    assert {name: figures["missing"] for name, figures in own.items()} == dict.fromkeys(missing, 0.5)
    assert (own["id"]["unknown"], own["hex"]["unknown"], own["age"]["unknown"]) == (1.0, 0.0, None)
    assert all(feature(found, name)["drift"] == {} for name in missing)  # there is no training to drift from
    for name, what in (("spec.json", "columns.id.type='x'"), ("vocabulary/id.parquet", "cannot be read")):
        path = tmp_path / "data" / name
        path.write_text(path.read_text().replace("categorical", "x") if name == "spec.json" else "no parquet")
        with pytest.raises(UserError, match=rf"{name}: .*{what}"):
            write_statistics(tmp_path / "data", tmp_path / "out")
        (tmp_path / "data" / "spec.json").unlink(missing_ok=True)


def test_mistakes_are_one_line(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="prepare the data first"):
        write_statistics(tmp_path, tmp_path)
    (tmp_path / "schema.json").write_text((data / "schema.json").read_text())
    with pytest.raises(UserError, match=r"holds no \*.parquet shard of train, valid, test"):
        write_statistics(tmp_path, tmp_path)
    (tmp_path / "train").mkdir()
    whole = (data / "train" / "000.parquet").read_bytes()
    (tmp_path / "train" / "000.parquet").write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"000\.parquet: cannot be read"):
        write_statistics(tmp_path, tmp_path)
    pq.write_table(pa.table({"label": [1]}), tmp_path / "train" / "000.parquet")
    with pytest.raises(UserError, match=r"000\.parquet: column .* is missing"):
        write_statistics(tmp_path, tmp_path)
    (tmp_path / "train" / "000.parquet").write_bytes(whole)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: cannot be written"):
        write_statistics(tmp_path, tmp_path / "file")
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith("statistics")]
