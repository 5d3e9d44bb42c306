"""Avazu's click logs (Kaggle, 2014): CSV with a click, the hour, and 21 categories of site, app, device and banner."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv

from megarec.data.preparation.table_spec import Calendar, Categorical, Column, Ignored, Label, TableSpec
from megarec.data.sources.criteo import hexadecimal

HOUR = "hour"
INTEGERS = ("C1", "banner_pos", "device_type", "device_conn_type", *(f"C{i}" for i in range(14, 22)))
TEXTS = ("site_id", "site_domain", "site_category", "app_id", "app_domain", "app_category")
DEVICES = ("device_id", "device_ip", "device_model")
NAMES = (
    *("id", "click", HOUR, "C1", "banner_pos", *TEXTS, *DEVICES, "device_type", "device_conn_type"),
    *(f"C{i}" for i in range(14, 22)),
)
# Distinct values of the made-up columns, about as in the real files.
_VALUES = {
    "C1": 7,
    "banner_pos": 7,
    "site_id": 4_737,
    "site_domain": 7_745,
    "site_category": 26,
    "app_id": 8_552,
    "app_domain": 559,
    "app_category": 36,
    "device_id": 2_686_408,
    "device_ip": 6_729_486,
    "device_model": 8_251,
    "device_type": 5,
    "device_conn_type": 4,
    "C14": 2_626,
    "C15": 8,
    "C16": 9,
    "C17": 435,
    "C18": 4,
    "C19": 68,
    "C20": 172,
    "C21": 60,
}
_CHUNK = 1 << 17


def avazu_spec(name: str, min_count: int = 1, rows: int | None = None) -> TableSpec:
    """What the columns are: the hour is hour of day and weekday, the id of a row is not used.

    Args:
        min_count: values of a category that are rarer share row 0.
        rows: rows that every category is hashed to; None: vocabularies.
    """
    ids = {"min_count": min_count} if rows is None else {"hash": rows}
    columns: dict[str, Column] = {}
    for column in NAMES:
        dtype = "hexadecimal" if column in TEXTS + DEVICES else "integer"
        columns[column] = Categorical(type="categorical", dtype=dtype, **ids)  # type: ignore[arg-type]
    columns |= {
        "id": Ignored(type="ignored"),
        "click": Label(type="label"),
        HOUR: Calendar(type="calendar", format="%y%m%d%H"),
    }
    return TableSpec(name=name, label_rule="clicked", delimiter=",", columns=columns)


def write_made_up(path: Path, rows: int, seed: int = 1, most_values: int = 1 << 40) -> None:
    """Write a file of Avazu's format whose content is made up: for tests and benchmarks, no quality.

    Ids follow a power law, hours ascend over ten days, and the click follows banner and site a little.

    Args:
        most_values: no column has more distinct values.
    """
    with path.open("wb") as file:
        file.write((",".join(NAMES) + "\n").encode())
        for start in range(0, rows, _CHUNK):
            random = np.random.default_rng([seed, start])
            count = min(_CHUNK, rows - start)
            hours = (np.arange(start, start + count) * 240 // rows).astype(np.int64)
            columns: dict[str, pa.Array] = {
                "id": pa.array(random.integers(10**15, 10**18, count)),
                HOUR: pa.array(14102100 + hours // 24 * 100 + hours % 24),
            }
            logit = np.full(count, -1.6)
            for place, (name, values) in enumerate(_VALUES.items()):
                ids = (min(values, most_values) * random.random(count) ** 4).astype(np.uint64)
                if name in ("banner_pos", "site_id"):
                    logit += np.cos(ids % np.uint64(97))
                text = (ids + np.uint64(place << 24)) * np.uint64(2654435761) & np.uint64(0xFFFFFFFF)
                is_text = name in TEXTS + DEVICES
                columns[name] = hexadecimal(text) if is_text else pa.array(ids.astype(np.int64) - (name == "C20"))
            columns["click"] = pa.array((random.random(count) < 1 / (1 + np.exp(-logit))).astype(np.int8))
            table = pa.table({name: columns[name] for name in NAMES})
            options = pyarrow.csv.WriteOptions(include_header=False, quoting_style="none")
            pyarrow.csv.write_csv(table, file, options)
