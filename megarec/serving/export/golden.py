"""A golden sample: raw rows made of known values, with the logits that torch computes for them here."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray

from megarec.serving.export.graph import TOLERANCE, Golden, ScoredModel
from megarec.serving.scorer.bundle import Bundle
from megarec.serving.scorer.rows import RowEncoder
from megarec.serving.scorer.scorer import pooled_embeddings
from megarec.serving.scorer.tables import open_tables

ROWS = 16
MOST_IN_A_LIST = 3


def golden_sample(bundle: Bundle, model: ScoredModel) -> tuple[dict[str, Any], Golden]:
    """Rows with known, unknown and missing values, and their logits by the exported tables and torch.

    Args:
        bundle: whole but for this sample.

    Returns:
        What golden.json holds, and the same as the dense model reads it.
    """
    random = np.random.default_rng(1)
    manifest = bundle.manifest
    values = {about["name"]: _values(bundle, about) for about in manifest["features"]}
    rows = []
    for place in range(ROWS):
        row: dict[str, Any] = {}
        for about in manifest["features"]:
            _add(row, about, values[about["name"]], random, missing=place == 1)
        for about in manifest["numeric"]:
            raw = about["raw"]
            missing = place == 1 and raw["missing"] is not None
            row[raw["column"]] = None if missing else round(float(random.normal()) * 10, 3)
        rows.append(row)
    encoded = RowEncoder(bundle).encode(rows)
    assert not encoded.errors, encoded.errors
    inputs = {"embedded": pooled_embeddings(manifest, open_tables(bundle), encoded), "numeric": encoded.numeric}
    given = tuple(torch.from_numpy(inputs[name]) for name in model.inputs)
    with torch.no_grad():
        golden = Golden(given, model(*given))
    return {"tolerance": TOLERANCE, "rows": rows, "logits": golden.logits.tolist()}, golden


def _add(
    row: dict[str, Any], about: dict[str, Any], draw: Callable[[Generator], Any], random: Generator, missing: bool
) -> None:
    raw = about["raw"]
    if not about["multi_valued"]:
        row[raw["column"]] = None if missing else draw(random)
        return
    count = 0 if missing else int(random.integers(MOST_IN_A_LIST + 1))
    row[raw["column"]] = [draw(random) for _ in range(count)]
    if "weights" in raw:
        row[raw["weights"]] = [round(float(random.random()), 3) for _ in range(count)]


def _values(bundle: Bundle, about: dict[str, Any]) -> Callable[[Generator], Any]:
    """Draws a raw value of a feature: one of its vocabulary, now and then one that is unknown."""
    raw = about["raw"]
    if raw["kind"] == "row":
        rows = bundle.manifest["tables"][about["table"]]["rows"]
        return lambda random: int(random.integers(rows))
    written: Callable[[int], Any] = {"string": lambda n: f"value {n}", "hexadecimal": lambda n: f"{n:x}"}.get(
        raw["dtype"], int
    )
    if raw["kind"] == "hash":
        return lambda random: written(int(random.integers(1 << 31)))
    known: NDArray[Any]
    if raw["dtype"] == "string":
        ends, text = np.asarray(bundle.array(raw["ends"], "<i8")), np.asarray(bundle.array(raw["text"], "u1"))

        def of_place(place: int) -> Any:
            return text[ends[place - 1] if place else 0 : ends[place]].tobytes().decode()

        count = len(ends)
    else:
        known = np.asarray(bundle.array(raw["keys"], "<i8"))
        count = len(known)

        def of_place(place: int) -> Any:
            return written(int(known[place]))

    def drawn(random: Generator) -> Any:
        place = int(random.integers(count + 1 + count // 8))
        return of_place(place) if place < count else written((1 << 31) + place)

    return drawn
