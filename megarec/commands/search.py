"""What `scaling_law.py sweep` does only for a search: rounds of draws, the calibrated LogLoss of tests, the report."""

import argparse
from collections.abc import Callable

from megarec.errors import UserError
from megarec.evaluation.opened import open_model
from megarec.evaluation.report import Scored, is_finite
from megarec.files import read_object, write_json
from megarec.metrics.calibrated import fit_temperature
from megarec.scaling.grid import Trial
from megarec.scaling.results import Rows
from megarec.scaling.search import Search
from megarec.scaling.search_report import CHOSEN, REPORT, TABLE, markdown, tests_of, write_search
from megarec.scaling.sweep import Slot, folder_of, run_sweep


def check_options(search: Search, arguments: argparse.Namespace) -> None:
    """Raise a UserError for options that need all draws beforehand, if the sampler does not have them."""
    if search.file.sampler == "random":
        return
    for name in ("array", "budget_gflop", "hours", "plan"):
        if getattr(arguments, name) not in (None, False):
            raise UserError(
                f"--{name.replace('_', '-')} with sampler='optuna' of {search.path}: its draws follow from how earlier "
                "ones ended, so no share or plan is known beforehand; take sampler='random', or leave the option out"
            )


def run_rounds(search: Search, rows: Rows, slots: list[Slot], say: Callable[[str], None]) -> list[str]:
    """Run rounds of draws until no family has another, and the tests; the names of those that failed."""
    while True:
        trials, whole = search.trials(rows)
        draws = sum(trial.tuning for trial in trials)
        say(f"{draws} draws of {len(search.settings)} families are known{'' if whole else ', more will be'}")
        failed = run_sweep(trials, rows, slots, say)
        if whole:
            return failed


def tell_search(search: Search, rows: Rows) -> None:
    """Write the report and the chosen configs, and print the tables.

    Raises:
        UserError: a family has no trial to choose, or too few.
    """
    found = write_search(search, rows, calibrated_losses(search, rows))
    print(*markdown(found), sep="\n", flush=True)
    print(f"{rows.output}: {TABLE}, {REPORT}, {CHOSEN}/", flush=True)
    for family, of in found["families"].items():
        trials = of["trials"]
        ended = trials["drawn"] == trials["done"] + trials["diverged"] + trials["failed"]
        if ended and of["chosen"] is None and any(not t.tuning for t in rows.trials if t.model == family):
            raise UserError(
                f"{family}: nothing is chosen, as of its {trials['drawn']} trials {trials['diverged']} diverged and "
                f"{trials['failed']} failed; see output.txt in {rows.output / 'runs'}, then remove their rows in "
                f"{rows.output / 'rows'} to try them again, or change the space"
            )


def calibrated_losses(search: Search, rows: Rows) -> dict[str, float]:
    """LogLoss on the test split with the temperature that fits the validation split, by name of a tested run."""
    tests = [trial for family in search.settings for trial in tests_of(rows, family) if trial.name in rows.of]
    found = {trial.name: _calibrated(trial, rows) for trial in tests}
    return {name: loss for name, loss in found.items() if loss is not None}


def _calibrated(trial: Trial, rows: Rows) -> float | None:
    path = rows.output / "calibrated" / f"{trial.name}.json"
    path.parent.mkdir(exist_ok=True)
    if path.is_file():
        loss = read_object(path, "a calibrated LogLoss").get("logloss")
        return loss if isinstance(loss, float) else None
    folder = folder_of(rows.output, trial)
    try:
        valid, test = (Scored(*open_model(folder, None, split, None).score(None)) for split in ("valid", "test"))
    except UserError as error:
        print(f"no calibrated LogLoss of {trial.name}: {error}", flush=True)
        return None
    if not (is_finite(valid) and is_finite(test)):
        return None
    fitted = fit_temperature(valid.logits, valid.labels)
    loss = fitted.logloss(test.logits, test.labels)
    write_json(path, {"temperature": fitted.temperature, "logloss": loss})
    return loss
