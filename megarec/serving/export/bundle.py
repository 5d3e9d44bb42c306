"""From a checkpoint to a directory that scores raw rows (megarec/serving/scorer reads it)."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megarec.checkpoint.format import read_index
from megarec.checkpoint.offline import new_directory, said_of
from megarec.checkpoint.sparse import TABLES
from megarec.config.sections import RunConfig
from megarec.data.preparation.formats import is_utf8
from megarec.data.preparation.kept_spec import SPEC_FILE, load_prepared
from megarec.data.preparation.table_spec import TableSpec
from megarec.data.schema import Schema, identity_difference, load_schema
from megarec.distributed.topology import ONE_RANK
from megarec.errors import UserError
from megarec.files import file_name, write_json
from megarec.run.spec import ModelSpec
from megarec.serving import scorer
from megarec.serving.bundle_predictor import fitted_temperature, write_run
from megarec.serving.export.golden import golden_sample
from megarec.serving.export.graph import Golden, compile_program, export_onnx, export_program, scored_model
from megarec.serving.export.raw_values import write_raw_values
from megarec.serving.export.triton import write_triton
from megarec.serving.predictor import Weights, checked_spec, open_checkpoint
from megarec.serving.scorer.bundle import FORMAT, MANIFEST, VERSION, Bundle, checksum, sealed
from megarec.serving.scorer.tables import TableType, encode_rows
from megarec.sparse.layout import EmbeddingLayout, Table
from megarec.sparse.run_placement import layouts_by_host

WITH_MARK = "utf-8-sig"  # UTF-8, with or without a byte order mark
PIECE = 1 << 24  # bytes of float32 rows in memory at a time
SCORE = '''\
"""Predictions of a file's raw rows: python score.py rows.csv > predictions.csv (needs numpy and onnxruntime)."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from scorer.files import main  # noqa: E402

main(HERE)
'''
DENSE_FILE, PROGRAM_FILE, COMPILED_FILE = "dense.onnx", "dense.pt2", "dense_compiled.pt2"
GOLDEN_FILE, SCORER = "golden.json", "scorer"


def export_bundle(
    checkpoint: Path,
    target: Path,
    data: Path | None = None,
    tables: TableType = "fp32",
    program: bool = False,
    calibrate: bool = False,
) -> dict[str, Any]:
    """Write the scoring bundle of a checkpoint; the directory is there whole or not at all.

    Args:
        checkpoint: its directory.
        data: the prepared data set that the run was trained on; None: where the run's config says.
        tables: the type in which embedding tables are written.
        program: whether the dense model is written as a `torch.export` program as well, and compiled where that works.
        calibrate: whether logits are divided by a temperature that is fitted on the split valid.

    Returns:
        How many files and bytes, the compiled program or why there is none, and the summary of the checkpoint.

    Raises:
        UserError: the checkpoint is damaged, the data set is another one, or the target exists.
    """
    config, schema, weights = open_checkpoint(checkpoint)
    spec = checked_spec(config, schema, weights)
    prepared = data or Path(config.data.path)
    _check_data(schema, prepared, checkpoint)
    layout = _looked_up(spec)
    with new_directory(target) as directory:
        manifest = _manifest(config, schema, spec, layout, weights, prepared, tables, directory)
        model = scored_model(config, spec, weights, layout.width)
        export_onnx(model, directory / DENSE_FILE)
        exported = export_program(model, directory / PROGRAM_FILE) if program else None
        manifest |= {"dense": DENSE_FILE, "golden": GOLDEN_FILE, "width": model.width, "temperature": 1.0}
        shutil.copytree(Path(scorer.__file__).parent, directory / SCORER, ignore=shutil.ignore_patterns("__pycache__"))
        (directory / "score.py").write_text(SCORE)
        write_run(directory, config, schema)
        write_triton(directory, len(schema.predicted))
        _write_manifest(directory, manifest)
        sample, golden = golden_sample(Bundle(directory), model, prepared)
        write_json(directory / GOLDEN_FILE, sample)
        compiled = {} if exported is None else _compiled(exported, directory, golden)
        files = _write_manifest(directory, manifest | compiled)
        if calibrate:
            manifest["temperature"] = fitted_temperature(directory, prepared)
            _write_manifest(directory, manifest | compiled)
    size = sum(about["bytes"] for about in files.values())
    return {"files": len(files), "bytes": size, **compiled, **said_of(checkpoint, read_index(checkpoint))}


def _compiled(program: torch.export.ExportedProgram, directory: Path, golden: Golden) -> dict[str, Any]:
    """The manifest's entry for the compiled program, after an attempt to write it."""
    why = compile_program(program, directory / COMPILED_FILE, golden)
    return {"compiled": COMPILED_FILE} if why is None else {"not_compiled": why}


def _text_files(spec: TableSpec | None) -> dict[str, Any]:
    """The format of the text files that the model was trained on."""
    if spec is None:
        return {"encoding": WITH_MARK, "delimiter": None, "header": True, "columns": None, "labels": []}
    return {
        "encoding": WITH_MARK if is_utf8(spec.encoding) else spec.encoding,
        "delimiter": spec.delimiter,
        "header": spec.header,
        "columns": list(spec.columns),
        "labels": list(spec.labels),
    }


def _write_manifest(directory: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Write it with the size and checksum of every other file, which are returned by name."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != MANIFEST)
    files = {
        str(path.relative_to(directory)): {"bytes": path.stat().st_size, "sha256": checksum(path)} for path in paths
    }
    (directory / MANIFEST).write_bytes(sealed(manifest | {"files": files}))
    return files


def _looked_up(spec: ModelSpec) -> EmbeddingLayout:
    """The features whose pooled rows lie side by side in front of the tower modules, or of the dense model."""
    (layout,) = layouts_by_host(spec.layout, ONE_RANK, "flat", spec.towers)
    return layout


def _check_data(schema: Schema, data: Path, checkpoint: Path) -> None:
    remedy = "name the data set that the run was trained on by --data DIR"
    try:
        found = load_schema(data)
    except UserError as error:
        raise UserError(f"{checkpoint}: an export needs the vocabularies of its data: {error}; {remedy}") from error
    if difference := identity_difference(schema.identity, found.identity):
        raise UserError(f"--data {data}: {difference}")


def _manifest(
    config: RunConfig,
    schema: Schema,
    spec: ModelSpec,
    layout: EmbeddingLayout,
    weights: Weights,
    data: Path,
    tables: TableType,
    directory: Path,
) -> dict[str, Any]:
    kept = load_prepared(data).kept if (data / SPEC_FILE).is_file() else None
    ids, numbers = write_raw_values(schema, data, kept, directory)
    # A target may be looked up row by row as well: then it is one of the pooled features, with its place there.
    looked_up = {feature.name: feature for feature in (*layout.unpooled, *layout.features)}.values()
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": config.model.name,
        "label": schema.label_rule or schema.label,
        "labels": list(schema.tasks),
        "null_words": [] if kept is None else kept.spec.null_words,
        "text": _text_files(None if kept is None else kept.spec),
        "tables": _write_tables(layout.tables, weights, tables, directory),
        "features": [
            {
                "name": feature.name,
                "table": feature.table,
                "start": feature.start if feature in layout.features else None,
                "columns": feature.columns,
                "multi_valued": feature.multi_valued,
                "pooling": feature.pooling,
                "newest": "first" if feature.newest_first else "last",
                "raw": ids[feature.name],
            }
            for feature in looked_up
        ],
        "sequences": [
            {
                "features": list(own.features),
                "positions": own.positions,
                "start": layout.width + own.start,
                "mask": layout.width + own.mask if own.masked else None,
            }
            for own in spec.layout.sequences
        ],
        "numeric": [{"name": name, "raw": numbers[name]} for name in schema.numeric],
    }


def _write_tables(tables: tuple[Table, ...], weights: Weights, kind: TableType, target: Path) -> dict[str, Any]:
    """Write tables/<name>.bin of every table below `target`.

    Returns:
        By table, its entry in the manifest.
    """
    (target / "tables").mkdir()
    found = {}
    for table in tables:
        file = f"tables/{file_name(table.name, '.bin')}"
        at_once = max(1, PIECE // (4 * table.columns))
        with (target / file).open("wb") as output:
            for first in range(0, table.rows, at_once):
                rows = torch.empty(min(at_once, table.rows - first), table.columns)
                weights.fill(f"{TABLES}{table.name}/weight", rows, first)
                output.write(np.ascontiguousarray(encode_rows(rows.numpy(), kind)).data)
        found[table.name] = {"file": file, "type": kind, "rows": table.rows, "columns": table.columns}
    return found
