"""Read the JSON of a run: sections that live in other files, `--set` overrides, validation with did-you-mean.

What pydantic finds wrong with a config becomes one line for people.
"""

import difflib
import json
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megarec.config.base import TasksConfig
from megarec.config.deepspeed import check_deepspeed_section
from megarec.config.models import MODELS, SCALED_SIZES, WukongConfig
from megarec.config.regularisation import L2Config, problem_of
from megarec.config.sections import EmbeddingConfig, RunConfig, Section
from megarec.config.towers import TOWER_MODULES, DlrmTowerConfig, IdentityTowerConfig, TowersFile
from megarec.errors import UserError, did_you_mean
from megarec.files import NotJson, parse_json, read_object

TAGGED: dict[str, Mapping[str, type[Section]]] = {"model": MODELS, "tower_module": TOWER_MODULES}  # by their name


def describe(error: ValidationError, root: type[Section]) -> str:
    """The first failure as one line: dotted key, value seen, what was expected, the nearest known key."""
    first = error.errors()[0]
    loc = [part for part in first["loc"] if not (isinstance(part, str) and "[" in part)]
    key = ".".join(str(part) for part in _without_tag(loc))
    if first["type"] == "extra_forbidden":
        return f"unknown key {key!r}; {_nearest(loc, root)}"
    if first["type"] == "missing":
        return f"{key} is missing"
    if first["type"] == "union_tag_invalid":
        name = first["input"]["name"]
        known = TAGGED[key]
        near = difflib.get_close_matches(str(name), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of: {', '.join(known)}"
        return f"{key}.name={json.dumps(name)}: {hint}"
    seen = json.dumps(first["input"], default=str)
    seen = seen if len(seen) <= 80 else seen[:77] + "..."
    if first["type"] == "union_tag_not_found":
        return f"{key}={seen}: expected an object, or the path of a JSON"
    return f"{key}={seen}: {first['msg'][0].lower() + first['msg'][1:]}"


def _is_tagged(loc: list[Any]) -> bool:
    return len(loc) > 1 and loc[0] in TAGGED


def _without_tag(loc: list[Any]) -> list[Any]:
    """pydantic puts the model's name behind `model`, where the JSON has no key."""
    return loc[:1] + loc[2:] if _is_tagged(loc) else loc


def _nearest(loc: list[Any], root: type[Section]) -> str:
    """Suggestions for an unknown key at a location."""
    section = _section_at(root, loc[:-1])
    known = sorted(field.alias or name for name, field in section.model_fields.items()) if section else []
    near = difflib.get_close_matches(str(loc[-1]), known, n=1)
    of_model = f" of {loc[0]} {loc[1]!r}" if _is_tagged(loc) else ""
    return f"did you mean {near[0]!r}?" if near else f"known keys{of_model}: {', '.join(known)}"


def _section_at(root: type[Section], loc: list[Any]) -> type[Section] | None:
    """The section class that lies at a location of the configuration, if it is one."""
    if _is_tagged(loc):
        return _section_at(TAGGED[loc[0]][loc[1]], loc[2:])
    current: Any = root
    for part in loc:
        if isinstance(current, type) and issubclass(current, Section):
            field = current.model_fields.get(str(part))
            current = field.annotation if field else None
        elif typing.get_origin(current) in (dict, list):
            current = typing.get_args(current)[-1]
        if not isinstance(current, type):
            kinds = [kind for kind in _members(current) if isinstance(kind, type) and issubclass(kind, Section)]
            current = kinds[0] if kinds else current
    return current if isinstance(current, type) and issubclass(current, Section) else None


def _members(kind: Any) -> list[Any]:
    """The types of a union and of its unions, without Annotated; for another type, itself."""
    bare = typing.get_args(kind)[0] if typing.get_origin(kind) is typing.Annotated else kind
    if isinstance(bare, types.UnionType) or typing.get_origin(bare) is typing.Union:
        return [member for part in typing.get_args(bare) for member in _members(part)]
    return [bare]


def load_config(path: Path, overrides: list[str] | None = None) -> RunConfig:
    """The resolved configuration of one run.

    Args:
        path: the run's JSON; a section may be the path of another JSON, relative to this file.
        overrides: `section.key=value` strings; a value is JSON (True, False and None are true, false and null), or
            else a plain string.

    Raises:
        UserError: one line that names the file, the key, the value seen and what was expected.
    """
    raw = read_object(path, "the JSON of a run")
    for name, value in raw.items():
        raw[name] = _include(value, path, name)
    if not any(override.startswith("parallel.towers=") for override in (overrides or [])[:1]):
        _read_towers(raw, path.parent)  # else they replace those of the file, which may not exist yet
    for override in overrides or []:
        _apply_override(raw, override, path)
        _read_towers(raw, Path() if override.startswith("parallel.towers=") else path.parent)
    _locate_schema(raw.get("data"), path)
    try:
        config = RunConfig.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{path}: {describe(error, RunConfig)}") from error
    check_deepspeed_section(config.deepspeed, path)
    _check_across_fields(config, path)
    return config


def _include(value: Any, path: Path, section: str) -> Any:
    """A section that is a string is the path of another JSON, relative to the run's file."""
    if not isinstance(value, str):
        return value
    included = path.parent / value
    if not _exists(included):
        raise UserError(f"{path}: {section}={value!r}: no file {included}; a section is an object or a JSON's path")
    return read_object(included, f"the section {section} of a run")


def _exists(path: Path) -> bool:
    """Whether there is something of this name, of any kind."""
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that is too long, or holds a NUL
        return False


def _locate_schema(data: Any, path: Path) -> None:
    """`data.schema` is relative to the run's file; from here on it is absolute."""
    if isinstance(data, dict) and isinstance(data.get("schema"), str):
        data["schema"] = str((path.parent / data["schema"]).resolve())


def _read_towers(raw: dict[str, Any], directory: Path) -> None:
    """`parallel.towers` that is the path of a towers.json becomes the lists in it."""
    parallel = raw.get("parallel")
    if not isinstance(parallel, dict) or not isinstance(parallel.get("towers"), str):
        return
    path = directory / parallel["towers"]
    if not _exists(path):
        raise UserError(
            f"parallel.towers={parallel['towers']!r}: no file {path}; it is a number of towers, lists of feature "
            "names, or the path of a towers.json (python tools/partition_towers.py writes one)"
        )
    try:
        parallel["towers"] = TowersFile.model_validate(read_object(path, "a towers.json")).towers
    except ValidationError as error:
        raise UserError(f"{path}: {describe(error, TowersFile)}") from error


def _apply_override(raw: dict[str, Any], override: str, path: Path) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"--set {override}: expected section.key=value")
    value = _value_of(text, override)
    *parents, last = key.split(".")
    node = raw
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise UserError(f"--set {override}: {parent} is not a section of {path}")
    node[last] = value if parents else _include(value, path, last)


MOST_TRACED = 1_000  # steps
WORDS = {"True": True, "False": False, "None": None}  # Python's, which mean JSON's true, false and null


def _value_of(text: str, override: str) -> Any:
    """The value of an override: JSON, True, False or None, or else a plain string."""
    if text in WORDS:
        return WORDS[text]
    try:
        return parse_json(text, f"--set {override if len(override) <= 80 else override[:77] + '...'}")
    except NotJson:
        return text


def _check_across_fields(config: RunConfig, path: Path) -> None:
    def fail(message: str) -> typing.NoReturn:
        raise UserError(f"{path}: {message}")

    if config.embedding.optimizer == "adam" and (backend := config.embedding.backend) in ("fbgemm", "triton"):
        fail(f"embedding.optimizer='adam' needs embedding.backend='torch' (or 'auto'): {backend} has no lazy Adam")
    _check_tables(config.embedding, fail)
    _check_clipping(config, fail)
    if "optimizer" in config.deepspeed and config.dense.model_fields_set:
        given = ", ".join(f"dense.{name}" for name in sorted(config.dense.model_fields_set))
        fail(f"deepspeed.optimizer and {given} both describe the dense optimizer; keep one of them")
    first, last = config.train.trace or (1, 1)
    if not 0 <= last - first < MOST_TRACED:
        fail(
            f"train.trace=[{first}, {last}]: {last} - {first} + 1 = {last - first + 1:,} steps, expected 1 to "
            f"{MOST_TRACED:,}: a trace is kept in memory until its last step"
        )
    layers = len(config.model.numeric_mlp) + 1
    if config.model.numeric_bias is not None and len(config.model.numeric_bias) != layers:
        fail(
            f"model.numeric_bias lists {len(config.model.numeric_bias)} layers, but model.numeric_mlp with "
            f"{layers - 1} hidden widths has {layers}"
        )
    if config.model.norm == "batch" and (count := config.deepspeed.get("gradient_accumulation_steps", 1)) != 1:
        fail(
            f"model.norm='batch' with deepspeed.gradient_accumulation_steps={count}: its statistics are those of the "
            "whole global batch, which no micro-batch sees; leave the latter out, or take model.norm='layer'"
        )
    if isinstance(config.model, WukongConfig):
        _check_layers(config.model, fail)
    _check_labels(config, fail)
    _check_towers(config, fail)


def _check_clipping(config: RunConfig, fail: Callable[[str], typing.NoReturn]) -> None:
    """The norm over all tables is summed where each row lies once, over one group of ranks."""
    if config.embedding.gradient_clipping is None:
        return
    if config.parallel.exchange == "tower":
        fail("embedding.gradient_clipping needs parallel.exchange='flat': under SPTT no group holds all tables")
    stated = {"embedding.placement": config.embedding.placement}
    stated |= {f"embedding.tables.{name}.placement": own for name, own in config.embedding.table_placements.items()}
    for where, placement in stated.items():
        if placement in ("auto", "replicated"):
            fail(
                f"{where}={placement!r} with embedding.gradient_clipping: copies on every rank are not in its sum; "
                "take 'table', 'column' or 'row'"
            )


_OF_HEADS = {"shared": (), "esmm": (), "mmoe": ("experts", "expert")}  # keys of model.tasks; ple has them all


def _check_labels(config: RunConfig, fail: Callable[[str], typing.NoReturn]) -> None:
    label, train, heads = config.data.label, config.train, config.model.tasks
    labels = label if isinstance(label, list) else []
    if len(labels) < 2:
        keys = ("model.tasks", heads != TasksConfig()), ("train.label_weights", train.label_weights)
        for key in [key for key, given in (*keys, ("train.best_label", train.best_label)) if given]:
            fail(
                f"{key} is for several labels, and data.label={json.dumps(label)} names none or one; name several there"
            )
        return
    for key, names in (("train.label_weights", train.label_weights), ("train.best_label", [train.best_label])):
        for name in names:
            if name is not None and name not in labels:
                fail(f"{key} names {name!r}, which data.label does not; {did_you_mean(name, labels)}")
    known = _OF_HEADS.get(heads.name, tuple(type(heads).model_fields))
    for key, default in TasksConfig():
        if key not in ("name", *known) and getattr(heads, key) != default:
            fail(f"model.tasks.{key} does not apply to model.tasks.name={heads.name!r}; drop it, or take other heads")


def _check_tables(embedding: EmbeddingConfig, fail: Callable[[str], typing.NoReturn]) -> None:
    stated = {"embedding": (embedding.l2, embedding.update_rows)}
    for name, own in embedding.tables.items():
        l2 = embedding.l2 if own.l2 is None else own.l2
        stated[f"embedding.tables.{name}"] = (l2, own.update_rows or embedding.update_rows)
    for where, (l2, update_rows) in stated.items():
        if problem := problem_of(where, l2, update_rows, embedding.learning_rate):
            fail(problem)
    if embedding.rounding == "stochastic" and embedding.weights != "fp16":
        fail(
            f"embedding.rounding='stochastic' has nothing to round at embedding.weights={embedding.weights!r}; take "
            "embedding.weights='fp16', or leave rounding out"
        )
    if embedding.weights == "fp16" and embedding.rounding == "nearest":
        for where, (l2, _) in stated.items():
            if isinstance(l2, L2Config) and l2.rows == "all" and l2.weight:
                fail(
                    f"{where}.l2 on all rows and embedding.weights='fp16' need embedding.rounding='stochastic': a "
                    "step's decay is far less than half the spacing of fp16 numbers, and would always be rounded off"
                )


def _check_layers(model: WukongConfig, fail: Callable[[str], typing.NoReturn]) -> None:
    stated = [f"model.{name}" for name in SCALED_SIZES if name in model.model_fields_set]
    if model.scale is not None and stated:
        fail(f"model.scale derives {', '.join(stated)}: leave out either model.scale or {' and '.join(stated)}")
    for name in ("num_fm", "num_lcb", "rank"):
        value = getattr(model, name)
        if isinstance(value, list) and len(value) != model.layers:
            fail(f"model.{name} lists {len(value)} sizes for model.layers={model.layers} layers")
    per_layer = [widths for widths in model.mlp if isinstance(widths, list)]
    if per_layer and len(per_layer) != model.layers:
        fail(f"model.mlp lists {len(per_layer)} MLPs for model.layers={model.layers} layers")


def _check_towers(config: RunConfig, fail: Callable[[str], typing.NoReturn]) -> None:
    module = config.tower_module
    remedy = "give a number of towers, lists of feature names, or the path of a towers.json"
    if config.parallel.exchange == "tower" and config.parallel.towers is None:
        fail(f"parallel.exchange='tower' needs parallel.towers: {remedy}")
    if isinstance(module, IdentityTowerConfig):
        return
    if config.parallel.towers is None:
        fail(f"tower_module.name={module.name!r} needs parallel.towers: {remedy}")
    keys = [f"tower_module.{name}" for name in module.EMITTED]
    stated = [key for key, name in zip(keys, module.EMITTED, strict=True) if getattr(module, name) is not None]
    if module.compression is not None and stated:
        fail(f"tower_module.compression derives {' and '.join(keys)}: leave out either it or {' and '.join(stated)}")
    if module.compression is None and stated != keys:
        fail(f"tower_module needs {' and '.join(keys)}, or tower_module.compression (2, 4, 8, ...) in their place")
    if isinstance(module, DlrmTowerConfig) and module.c == module.p == 0:
        fail("tower_module.c=0 and tower_module.p=0: nothing would leave the towers; raise one of them")
    if "optimizer" in config.deepspeed and (module.optimizer is None or module.learning_rate is None):
        fail(
            "deepspeed.optimizer is the dense model's alone: state tower_module.optimizer and "
            "tower_module.learning_rate for the tower modules"
        )


def json_schema() -> dict[str, Any]:
    """JSON schema of a run's file for editors; every section, and parallel.towers, may also be a JSON's path."""
    schema = RunConfig.model_json_schema()
    schema["$defs"]["ParallelConfig"]["properties"]["towers"]["anyOf"].append({"type": "string"})
    schema["title"] = "megarec run"
    schema["properties"] = {
        name: {"anyOf": [section, {"type": "string", "description": "path of another JSON, relative to this file"}]}
        for name, section in schema["properties"].items()
    }
    return schema
