"""FuxiCTR's data set -> the spec of `prepare_data.py table`: one entry of a dataset_config.yaml."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megarec.recipes.keys import Keys, Line, chosen, read_yaml

UNUSED = ("data_root", "data_block_size", "rebuild_dataset", "num_workers", "dataset_id")
DTYPES = {"str": "string", "int": "integer", "float": "string"}  # float: FuxiCTR 1 reads ids as numbers
POOLING = {"layers.MaskedAveragePooling()": "mean", "layers.MaskedSumPooling()": "sum"}


@dataclass(frozen=True)
class DataSet:
    """A data set translated to this project.

    Attributes:
        spec: for `prepare_data.py table --schema`.
        fields: the features in their order.
        numbers: how many of them are numeric.
        files: by option of prepare_data.py table, the files.
        lines: the outcome of every key.
    """

    spec: dict[str, Any]
    fields: tuple[str, ...]
    numbers: int
    files: dict[str, str]
    lines: tuple[Line, ...]

    def prepare_command(self, spec: Path, output: str) -> str:
        """The command that prepares it."""
        files = " ".join(f"--{option} {shlex.quote(name)}" for option, name in self.files.items())
        whole = f"python tools/prepare_data.py table --schema {shlex.quote(str(spec))}"
        return f"{whole} {files} --output {shlex.quote(output)}"


def read_data_set(path: Path, name: str | None, group: str | None = None) -> DataSet:
    """One data set of a dataset_config.yaml.

    Args:
        name: which one; None: the only one.
        group: FuxiCTR's group_id.

    Raises:
        UserError: a key that has no equal here, or that is not known.
    """
    name, entry = chosen(path, read_yaml(path), name, "--dataset-id")
    keys = Keys(dict(entry), f"{path}: {name}")
    if "feature_cols" not in keys.values:
        keys.fail("feature_cols", None, "these files are encoded already and their columns are not named; describe the "
                  "raw ones, or have 'prepare_data.py table --infer' write a first spec")  # fmt: skip
    columns: dict[str, Any] = {}
    for label in _list(keys, "label_col"):
        own = Keys(dict(label), f"{keys.where}: label_col")
        columns[own.text("name")] = {"type": "label"}
        own.unused("dtype")
        own.finish("a label")
    least = keys.integer("min_categr_count", 1)
    keys.note("min_categr_count", least, "columns.*.min_count", remark="of features that share no table")
    fields, numbers = [], 0
    group = keys.take("group_id", None) or group
    for feature in _list(keys, "feature_cols"):
        names = feature.get("name")
        for one in names if isinstance(names, list) else [names]:
            if not isinstance(one, str) or not one or one in columns:
                keys.fail("feature_cols", one, "expected names without repetitions")
            own = Keys({**feature, "name": one}, f"{keys.where}: {one}")
            columns[one] = column = _column(own, least, group)
            keys.lines += own.lines
            if column["type"] not in ("ignored", "group"):
                fields.append(one)
                numbers += column["type"] == "numeric"
    spec: dict[str, Any] = {"name": name, "columns": columns}
    separator = keys.take("separator", keys.take("sep", None))
    if separator is not None:
        spec["delimiter"] = separator
        keys.note("separator", separator, "delimiter")
    files = _files(keys)
    keys.unused(*UNUSED)
    keys.finish("FuxiCTR's data set")
    return DataSet(spec, tuple(fields), numbers, files, tuple(_once(keys.lines)))


def _once(lines: Sequence[Line]) -> list[Line]:
    """Lines without repetitions: ten features of one kind give the same."""
    return list({(line.key, str(line.value), line.target, line.remark): line for line in lines}.values())


def _list(keys: Keys, key: str) -> list[dict[str, Any]]:
    value = keys.take(key)
    found = value if isinstance(value, list) else [value]
    if not found or not all(isinstance(part, dict) for part in found):
        keys.fail(key, value, "expected mappings with a name and a type")
    return found


def _files(keys: Keys) -> dict[str, str]:
    form = keys.take("data_format", "csv")
    if form not in ("csv", "parquet"):
        keys.fail("data_format", form, "expected csv or parquet: raw files, with their columns named")
    keys.note("data_format", form, "", remark="by the files' suffixes")
    found = {}
    for split in ("train", "valid", "test"):
        if name := keys.take(f"{split}_data", None):
            found[split] = str(name)
            keys.note(f"{split}_data", name, f"prepare_data.py table --{split}")
    for key in ("valid_size", "test_size", "split_type"):
        keys.must_be(key, None, "split the files beforehand, or with prepare_data.py table --data --split", None)
    return found


def _column(keys: Keys, least: int, group: str | None) -> dict[str, Any]:
    kind, name = keys.text("type"), keys.text("name")
    keys.unused("source", "remap", "vocab_size", "expr")
    for key in ("preprocess", "pretrained_emb", "embedding_dim", "emb_output_dim", "pretrain_dim"):
        keys.must_be(key, None, "has no equal here; do it to the files beforehand, or take the key out", None)
    if not keys.flag("active", True):
        keys.values.clear()
        return {"type": "ignored"}
    dtype = str(keys.take("dtype", "str"))
    if kind == "meta":
        return {"type": "group", "dtype": DTYPES.get(dtype, "string")} if name == group else {"type": "ignored"}
    makers = {"categorical": _categorical, "sequence": _sequence, "numeric": _numeric}
    if kind not in makers:
        keys.fail("type", kind, f"expected one of {', '.join(makers)}, meta")
    column = makers[kind](keys, dtype, least)
    keys.note("feature_cols", f"type {kind}", f"columns.*.type {column['type']}")
    keys.finish("a feature")
    return column


def _ids(keys: Keys, dtype: str, least: int) -> dict[str, Any]:
    """What features with a vocabulary share. Row 0 is of missing, rare and unknown values, as FuxiCTR's last one is."""
    if dtype not in DTYPES:
        keys.fail("dtype", dtype, "expected str, int or float of ids")
    found: dict[str, Any] = {"dtype": DTYPES[dtype]}
    count = keys.integer("min_categr_count", least)
    missing = keys.take("fill_na", keys.take("na_value", None))
    if missing not in (None, ""):
        keys.note("fill_na", missing, "", "differs", "a missing value has row 0 here, no row of its own")
    if owner := keys.take("share_embedding", None):
        keys.note("share_embedding", owner, "columns.*.table")
        return found | {"table": owner}
    return found | ({"min_count": count} if count > 1 else {})


def _categorical(keys: Keys, dtype: str, least: int) -> dict[str, Any]:
    processor = keys.take("category_processor", None)
    if processor == "quantile_bucket":
        buckets = keys.integer("num_buckets", 10)
        keys.note("category_processor", processor, "columns.*.buckets")
        keys.take("fill_na", None)
        return {"type": "bucketised", "buckets": buckets}
    if processor is not None:
        keys.fail("category_processor", processor, "expected quantile_bucket or nothing")
    keys.must_be("feature_encoder", None, "has no equal here; take it out", None)
    return {"type": "categorical"} | _ids(keys, dtype, least)


def _sequence(keys: Keys, dtype: str, least: int) -> dict[str, Any]:
    encoder = keys.take("feature_encoder", "layers.MaskedAveragePooling()")
    if encoder not in POOLING:
        keys.fail("feature_encoder", encoder, f"expected one of {', '.join(POOLING)}")
    keys.note("feature_encoder", encoder, "columns.*.pooling")
    common = _ids(keys, dtype, least) | {"separator": keys.text("splitter", "^"), "pooling": POOLING[encoder]}
    longest, padding = keys.integer("max_len", 0), keys.text("padding", "post")
    if not longest:
        return {"type": "multi_valued"} | common
    keys.note("max_len", longest, "columns.*.max_length")
    return {"type": "sequence", **common, "max_length": longest, "newest": "first" if padding == "post" else "last"}


def _numeric(keys: Keys, dtype: str, least: int) -> dict[str, Any]:
    normalizer = keys.take("normalizer", None)
    if normalizer not in (None, "StandardScaler"):
        keys.fail("normalizer", normalizer, "expected StandardScaler or nothing")
    keys.note("normalizer", normalizer, "columns.*.standardise")
    keys.must_be("feature_encoder", None, "has no equal here; take it out", None)
    missing = keys.take("fill_na", 0.0)
    column: dict[str, Any] = {"type": "numeric", "missing": float(missing)}
    return column | ({"standardise": True} if normalizer else {})
