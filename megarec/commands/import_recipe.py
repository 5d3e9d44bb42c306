"""A FuxiCTR recipe -> a run's JSON and the spec of its data, key by key; docs/recipes.md walks through one.

python tools/import_recipe.py model_config.yaml --experiment DNN_frappe --dataset dataset_config.yaml \
    --output recipe.json --spec spec.json --data data/frappe
"""

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from megarec.config.load import load_config
from megarec.data.preparation.table_spec import load_table_spec
from megarec.errors import ArgumentParser, UserError, exits_cleanly, one_line
from megarec.files import write_whole
from megarec.recipes.fuxictr import Recipe, read_experiment, translate
from megarec.recipes.fuxictr_data import DataSet, read_data_set
from megarec.recipes.keys import Line

HEADINGS = {
    "same": "means the same here",
    "differs": "DIFFERS here",
    "unused": "changes no numbers",
}


@exits_cleanly
def main() -> None:
    arguments = _parser().parse_args()
    if (arguments.dataset is None) != (arguments.spec is None):
        raise UserError("--dataset and --spec go together: a data set's YAML, and where to write its spec")
    for path in (arguments.output, arguments.spec):
        if path is not None and path.exists():
            raise UserError(f"{path} exists already: name a file that does not")
    experiment = read_experiment(arguments.model_yaml, arguments.experiment)
    data_set: DataSet | None = None
    if arguments.dataset is not None:
        known = arguments.dataset_id or (experiment.dataset_id if experiment.dataset_id != "TBD" else None)
        group = experiment.keys.values.get("group_id")
        data_set = read_data_set(arguments.dataset, known, group)
    fields, numbers = (None, 0) if data_set is None else (data_set.fields, data_set.numbers)
    output_dir = f"runs/{arguments.output.stem}"
    recipe = translate(experiment, fields, numbers, str(arguments.data), output_dir)
    _write(arguments, recipe, data_set)
    lines = [*recipe.lines, *(data_set.lines if data_set else ())]
    commands = _commands(arguments, data_set)
    if arguments.json:
        print(json.dumps(_as_json(arguments, experiment.name, lines, commands), default=str))
        return
    print(f"{experiment.name} of {arguments.model_yaml} -> {arguments.output}")
    for kind, heading in HEADINGS.items():
        print("\n".join(_shown(lines, kind, heading)))
    print("\n" + "\n".join(commands))


def _write(arguments: argparse.Namespace, recipe: Recipe, data_set: DataSet | None) -> None:
    """Both files, each checked by its reader; neither stays if one is refused."""
    written: list[Path] = []
    with contextlib.ExitStack() as undo:
        for path, value, check in (
            (arguments.output, recipe.run, load_config),
            (arguments.spec, data_set.spec if data_set else None, load_table_spec),
        ):
            if path is None or value is None:
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, (json.dumps(value, indent=2) + "\n").encode())
            written.append(path)
            undo.callback(path.unlink, missing_ok=True)
            check(path)
        undo.pop_all()


def _commands(arguments: argparse.Namespace, data_set: DataSet | None) -> list[str]:
    train = f"python launch/train.py --config {arguments.output}"
    return [train] if data_set is None else [data_set.prepare_command(arguments.spec, str(arguments.data)), train]


def _shown(lines: list[Line], kind: str, heading: str) -> list[str]:
    mine = [line for line in lines if line.kind == kind]
    if not mine:
        return []
    rows = [[line.key, one_line(str(line.value), 40), line.target or "-", line.remark] for line in mine]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    shown = [
        "  " + "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]).rstrip()
        for row in rows
    ]
    return [f"\n{heading}:", *shown]


def _as_json(arguments: argparse.Namespace, name: str, lines: list[Line], commands: list[str]) -> dict[str, Any]:
    return {
        "experiment": name,
        "output": str(arguments.output),
        "spec": None if arguments.spec is None else str(arguments.spec),
        "commands": commands,
        "keys": [vars(line) for line in lines],
    }


def _parser() -> ArgumentParser:
    parser = ArgumentParser(description="Translate a FuxiCTR model YAML, and its data set's, into a run and a spec.")
    add = parser.add_argument
    add("model_yaml", type=Path, metavar="MODEL_YAML", help="FuxiCTR's model_config.yaml, or one experiment of it")
    add("--experiment", metavar="NAME", help="which of its experiments (default: the only one)")
    add("--dataset", type=Path, metavar="YAML", help="FuxiCTR's dataset_config.yaml, with feature_cols")
    add("--dataset-id", metavar="NAME", help="which of its data sets (default: the experiment's dataset_id)")
    add("--output", type=Path, required=True, metavar="FILE", help="where to write the run's JSON")
    add("--spec", type=Path, metavar="FILE", help="where to write the spec for prepare_data.py table")
    add("--data", type=Path, default=Path("data/recipe"), metavar="DIR", help="directory of the prepared data")
    add("--json", action="store_true", help="one JSON object on standard output")
    return parser


if __name__ == "__main__":
    sys.exit(main())
