"""What a search found: a table with intervals and the budget of every row, the same as JSON, and the chosen configs."""

import json
import math
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from scipy import stats

from megarec.files import write_json, write_whole
from megarec.scaling.grid import Trial
from megarec.scaling.results import DIVERGED, DONE, FAILED, Rows
from megarec.scaling.search import Search

REPORT, TABLE, CHOSEN = "search.json", "search.md", "chosen"
METRICS = ("auc", "logloss", "calibrated_logloss", "ne")
_TITLES = {"auc": "AUC", "logloss": "LogLoss", "calibrated_logloss": "calibrated LogLoss", "ne": "NE"}
_CONFIDENCE = 0.95
Calibrated = Mapping[str, float]  # LogLoss of the test split with the temperature of validation, by trial name


def report(search: Search, rows: Rows, calibrated: Calibrated) -> dict[str, Any]:
    """The report of the families; `chosen` is null where nothing is chosen yet."""
    families = {family: _family(search, family, rows, calibrated) for family in search.settings}
    first, *others = families
    metric = rows.trials[0].config.train.best_by
    return {
        "study": str(search.path),
        "chosen_by": f"valid {metric}",
        "budget": search.file.budget.model_dump(exclude_none=True),
        "sampler": search.file.sampler,
        "seed": search.file.seed,
        "interval": f"t, {_CONFIDENCE:.0%}, over seeds",
        "families": families,
        "differences": {f"{first} - {other}": _differences(families[first], families[other]) for other in others},
    }


def _family(search: Search, family: str, rows: Rows, calibrated: Calibrated) -> dict[str, Any]:
    draws = [trial for trial in rows.trials if trial.model == family and trial.tuning]
    ended = [trial for trial in draws if trial.name in rows.of]
    status = [rows.status(trial) for trial in ended]
    tests = [trial for trial in tests_of(rows, family) if trial.name in rows.of]
    rate = chosen_draw(rows, family)
    winner = next((trial for trial in draws if trial.rate == rate), None)
    return {
        "trials": {"drawn": len(draws), **{name: status.count(name) for name in (DONE, DIVERGED, FAILED)}},
        "gflop": {"planned": sum(trial.gflop for trial in draws), "spent": sum(_spent(t, rows) for t in ended)},
        "steps": {"planned": sum(trial.steps for trial in draws), "spent": sum(_steps(t, rows) for t in ended)},
        "chosen": None if winner is None else _chosen(search, winner, rows),
        "seeds": [trial.seed for trial in tests],
        "test": {name: _summary(_values(tests, name, rows, calibrated)) for name in METRICS} if tests else None,
    }


def chosen_draw(rows: Rows, family: str) -> int | None:
    """The draw that a family's search chose; None: it has not ended, or must not choose."""
    own = [trial for trial in rows.trials if trial.model == family]
    if all(trial.tuning for trial in own) or any(trial.tuning and trial.name not in rows.of for trial in own):
        return None  # tests are only known once all draws are
    return rows.chosen_rate(family)


def tests_of(rows: Rows, family: str) -> list[Trial]:
    """The runs that test what a family chose, by seed."""
    draw = chosen_draw(rows, family)
    return [trial for trial in rows.trials if trial.model == family and not trial.tuning and trial.rate == draw]


def _chosen(search: Search, trial: Trial, rows: Rows) -> dict[str, Any]:
    row = rows.of[trial.name]
    sets = dict(word.split("=", 1) for word in trial.overrides)
    drawn = {key: json.loads(sets[key]) for key, setting in search.settings[trial.model].items() if setting.drawn}
    return {
        "draw": trial.rate,
        "settings": drawn,
        "config": str(rows.output / CHOSEN / f"{trial.model}.json"),
        "valid": {name: row[f"valid_{name}"] for name in ("auc", "logloss", "ne")},
        "parameters": trial.cost.parameters,
        "gflop_per_example": trial.cost.flop / 1e9,
    }


def _spent(trial: Trial, rows: Rows) -> float:
    return _steps(trial, rows) * trial.config.data.batch_size * trial.cost.flop / 1e9


def _steps(trial: Trial, rows: Rows) -> int:
    """The steps that it made; the planned ones if unknown."""
    steps = rows.of[trial.name]["steps"]
    return trial.steps if steps is None else int(steps)


def _values(tests: list[Trial], name: str, rows: Rows, calibrated: Calibrated) -> dict[int, float]:
    """A metric by seed, where it is known."""
    if name == "calibrated_logloss":
        found = {trial.seed: calibrated.get(trial.name) for trial in tests}
    else:
        found = {trial.seed: rows.of[trial.name][name] for trial in tests}
    return {seed: value for seed, value in found.items() if value is not None}


def _summary(values: dict[int, float]) -> dict[str, Any]:
    return {**_interval(list(values.values())), "by_seed": {str(seed): value for seed, value in values.items()}}


def _interval(values: list[float]) -> dict[str, Any]:
    """Mean and its interval by Student's t; with fewer than two values there is none."""
    if not values:
        return {"mean": None, "interval": None}
    mean = statistics.mean(values)
    if len(values) < 2:
        return {"mean": mean, "interval": None}
    half = (
        float(stats.t.ppf((1 + _CONFIDENCE) / 2, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    )
    return {"mean": mean, "interval": [mean - half, mean + half]}


def _differences(first: dict[str, Any], other: dict[str, Any]) -> dict[str, Any] | None:
    """Of each metric on the test split, seed by seed."""
    if not (first["test"] and other["test"]):
        return None
    found = {}
    for name in METRICS:
        mine, theirs = first["test"][name]["by_seed"], other["test"][name]["by_seed"]
        found[name] = _interval([mine[seed] - theirs[seed] for seed in mine if seed in theirs])
    return found


def markdown(found: dict[str, Any]) -> Iterator[str]:
    """The tables of a report."""
    ((unit, amount),) = found["budget"].items()
    yield (
        f"Each family: {amount:,} {unit} ({found['sampler']}, seed {found['seed']}), chosen by {found['chosen_by']}; "
        f"brackets: {found['interval']}."
    )
    yield ""
    yield (
        "| family | trials (diverged, failed) | GFLOP spent (planned) | steps | valid AUC, LogLoss | seeds "
        "| test AUC | LogLoss | calibrated LogLoss | NE | parameters | GFLOP/example |"
    )
    yield "|" + " --- |" * 12
    for name, family in found["families"].items():
        yield f"| {name} | {' | '.join(_cells(family))} |"
    yield ""
    for name, family in found["families"].items():
        if (chosen := family["chosen"]) is not None:
            words = ", ".join(f"{key} {json.dumps(value)}" for key, value in chosen["settings"].items())
            yield f"- **{name}**, draw {chosen['draw']}: {words}; `python launch/train.py --config {chosen['config']}`"
    if any(found["differences"].values()):
        yield ""
        yield "| difference, by seed | AUC | LogLoss | calibrated LogLoss | NE |"
        yield "|" + " --- |" * 5
        for name, difference in found["differences"].items():
            if difference is not None:
                yield f"| {name} | {' | '.join(_number(difference[metric], '+.4f') for metric in METRICS)} |"


def _cells(family: dict[str, Any]) -> Iterator[str]:
    trials, chosen, test = family["trials"], family["chosen"], family["test"]
    ended = sum(trials[name] for name in (DONE, DIVERGED, FAILED))
    of = "" if ended == trials["drawn"] else f" of {trials['drawn']}"
    yield f"{ended}{of} ({trials[DIVERGED]}, {trials[FAILED]})"
    yield f"{family['gflop']['spent']:,.3g} ({family['gflop']['planned']:,.3g})"
    yield f"{family['steps']['spent']:,}"
    yield "none yet" if chosen is None else f"{_word(chosen['valid']['auc'])}, {_word(chosen['valid']['logloss'])}"
    yield str(len(family["seeds"]))
    for name in METRICS:
        yield _number(test[name], ".4f") if test else ""
    yield "" if chosen is None else f"{chosen['parameters']:,}"
    yield "" if chosen is None else f"{chosen['gflop_per_example']:.6f}"


def _word(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


def _number(value: dict[str, Any], digits: str) -> str:
    if value["mean"] is None:
        return ""
    text = format(value["mean"], digits)
    if value["interval"] is None:
        return text
    low, high = (format(end, digits) for end in value["interval"])
    return f"{text} [{low}, {high}]"


def write_search(search: Search, rows: Rows, calibrated: Calibrated) -> dict[str, Any]:
    """Write search.json, search.md and the chosen configs, each whole; returns the report."""
    found = report(search, rows, calibrated)
    (rows.output / CHOSEN).mkdir(exist_ok=True)
    for family, of in found["families"].items():
        if of["chosen"] is not None:
            config = config_of(tests_of(rows, family)[0], f"runs/{search.path.stem}-{family}")
            write_whole(Path(of["chosen"]["config"]), config)
    write_json(rows.output / REPORT, found)
    write_whole(rows.output / TABLE, ("\n".join(markdown(found)) + "\n").encode())
    return found


def config_of(trial: Trial, output: str) -> bytes:
    """The run of a trial as a JSON of its own, a section a line, with nothing in it that was not set."""
    sections = trial.config.model_dump(mode="json", exclude_unset=True)
    sections["train"]["output_dir"] = output
    sections["train"].pop("test", None)
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(section)}" for name, section in sections.items())
    return f"{{\n{lines}\n}}\n".encode()
