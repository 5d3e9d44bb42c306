"""A golden sample: raw rows like those of the data, with the logits that torch computes for them here."""

import copy
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.random import Generator
from numpy.typing import NDArray

from megarec.data.cache import shards_of
from megarec.errors import UserError
from megarec.serving.export.graph import TOLERANCE, Golden, ScoredModel
from megarec.serving.scorer.bundle import Bundle
from megarec.serving.scorer.rows import RowEncoder
from megarec.serving.scorer.scorer import embeddings
from megarec.serving.scorer.tables import open_tables

ROWS = 16
MOST_IN_A_LIST = 3
NOISE = 8  # how much further off another machine may be than float32 is here


def golden_sample(bundle: Bundle, model: ScoredModel, data: Path) -> tuple[dict[str, Any], Golden]:
    """Rows with known, unknown and missing values, and their logits by the exported tables and torch.

    Numbers are from the data: far outside, float32 is too coarse for two machines to agree.

    Args:
        bundle: complete except this sample.
        data: the prepared data set.

    Returns:
        What golden.json holds, and the same as the dense model reads it.

    Raises:
        UserError: the data set cannot be read.
    """
    random, manifest = np.random.default_rng(1), bundle.manifest
    numbers = _raw_numbers(manifest["numeric"], data)
    values = {about["name"]: _values(bundle, about) for about in manifest["features"]}
    rows = []
    for place in range(ROWS):
        row: dict[str, Any] = {}
        lengths = _lengths(manifest, random)
        for about in manifest["features"]:
            name = about["name"]
            _add(row, about, values[name], random, lengths.get(name, 1), missing=place == 1)
        for about, drawn in zip(manifest["numeric"], numbers, strict=True):
            _add_number(row, about["raw"], drawn[place], missing=place == 1)
        rows.append(row)
    encoded = RowEncoder(bundle).encode(rows)
    assert not encoded.errors, encoded.errors
    inputs = {"embedded": embeddings(manifest, open_tables(bundle), encoded), "numeric": encoded.numeric}
    given = tuple(torch.from_numpy(inputs[name]) for name in model.inputs)
    with torch.no_grad():
        logits = model(*given)
        exact = copy.deepcopy(model).double()(*(values.double() for values in given))
    noise = float(((logits - exact).abs() / exact.abs().clamp(min=1)).max())
    golden = Golden(given, logits, max(TOLERANCE, NOISE * noise))
    return {"tolerance": golden.tolerance, "rows": rows, "logits": logits.tolist()}, golden


def _raw_numbers(numeric: list[dict[str, Any]], data: Path) -> list[list[float]]:
    """Raw values of every numeric feature in the first rows of the split train, ROWS of them."""
    if not numeric:
        return []
    shard = next(iter(shards_of(data, "train")), data / "train")
    try:
        with pq.ParquetFile(shard) as file:
            names = [about["name"] for about in numeric]
            batch = next(file.iter_batches(ROWS, columns=names))
            columns = [batch.column(name).to_numpy(zero_copy_only=False).astype(np.float64) for name in names]
    except (pa.ArrowException, OSError, StopIteration) as error:
        raise UserError(f"{shard}: its first rows cannot be read ({error}); prepare the data again") from error
    return [_untransformed(values, about["raw"]).tolist() for values, about in zip(columns, numeric, strict=True)]


def _untransformed(values: NDArray[np.float64], raw: dict[str, Any]) -> NDArray[np.float64]:
    """Approximately the value in the file."""
    values = np.resize(values, ROWS)
    values = np.where(np.isfinite(values), values, 0)
    if raw["moments"] is not None:
        values = values * raw["moments"][1] + raw["moments"][0]
    if raw["log"]:
        values = np.sign(values) * np.expm1(np.minimum(np.abs(values), 60))
    return values.round(6)


def _add_number(row: dict[str, Any], raw: dict[str, Any], value: float, missing: bool) -> None:
    missing = missing and raw["missing"] is not None
    if raw.get("place") is None:
        row[raw["column"]] = None if missing else value
    elif missing:
        row[raw["column"]] = None
    else:
        row.setdefault(raw["column"], [0.0] * raw["length"])[raw["place"]] = value


def _lengths(manifest: dict[str, Any], random: Generator) -> dict[str, int]:
    """How many values each list of a row has; lists that share positions have as many, also once they are cut."""
    lists = {
        about["name"]: about["raw"].get("max_length", MOST_IN_A_LIST)
        for about in manifest["features"]
        if about["multi_valued"]
    }
    found = {name: int(random.integers(MOST_IN_A_LIST + 1)) for name in lists}
    for sequence in manifest["sequences"]:
        names = [name for name in sequence["features"] if name in lists]  # targets have one value
        found |= dict.fromkeys(names, min((found[names[0]], *(lists[name] for name in names))) if names else 0)
    return found


def _add(
    row: dict[str, Any],
    about: dict[str, Any],
    draw: Callable[[Generator], Any],
    random: Generator,
    count: int,
    missing: bool,
) -> None:
    """Put a feature's values into a row, of a list `count`."""
    raw = about["raw"]
    if not about["multi_valued"]:
        row[raw["column"]] = None if missing else draw(random)
        return
    if missing:
        count = 0
    row[raw["column"]] = [draw(random) for _ in range(count)]
    if "weights" in raw:
        row[raw["weights"]] = [round(float(random.random()), 3) for _ in range(count)]


def _values(bundle: Bundle, about: dict[str, Any]) -> Callable[[Generator], Any]:
    """Draws a raw value of a feature: one of its vocabulary, now and then one that is unknown."""
    raw = about["raw"]
    if "moment" in raw:
        return lambda random: _moment(random).strftime(raw["format"])
    match raw["kind"]:
        case "row":
            rows = bundle.manifest["tables"][about["table"]]["rows"]
            return lambda random: int(random.integers(rows))
        case "buckets":
            ends = [0.0, *raw["boundaries"]]
            return lambda random: round(float(random.choice(ends) + random.normal()), 3)
        case "hash":
            return lambda random: _written(raw["dtype"], int(random.integers(1 << 31)))
    known, count = _vocabulary(bundle, raw)

    def drawn(random: Generator) -> Any:
        place = int(random.integers(count + 1 + count // 8))
        return known(place) if place < count else _written(raw["dtype"], (1 << 31) + place)

    return drawn


def _moment(random: Generator) -> datetime:
    return datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=int(random.integers(1 << 19)))


def _written(dtype: str, number: int) -> Any:
    """A value of that type which most vocabularies do not have."""
    match dtype:
        case "string":
            return f"value {number}"
        case "hexadecimal":
            return f"{number:x}"
    return number


def _vocabulary(bundle: Bundle, raw: dict[str, Any]) -> tuple[Callable[[int], Any], int]:
    """What gives the raw value of a place, and how many there are."""
    if raw["dtype"] != "string":
        keys: NDArray[Any] = np.asarray(bundle.array(raw["keys"], "<i8"))
        return lambda place: f"{keys[place]:x}" if raw["dtype"] == "hexadecimal" else int(keys[place]), len(keys)
    ends, text = np.asarray(bundle.array(raw["ends"], "<i8")), np.asarray(bundle.array(raw["text"], "u1"))
    return lambda place: text[ends[place - 1] if place else 0 : ends[place]].tobytes().decode(), len(ends)
