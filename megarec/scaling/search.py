"""A search at equal effort: families of models, each with the same budget of trials to choose its own configuration.

Trials are ordinary runs that leave the test split alone. A family's best by validation is trained with every seed and
tested; its other draws never are. A draw follows from the file alone, or from the rows of earlier rounds, never from
the order in which trials end: a killed search goes on, in any number of places, and ends with the same table.
"""

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from megarec.config.base import Above0, Section, Seed
from megarec.config.load import describe, load_config
from megarec.errors import UserError
from megarec.files import read_object
from megarec.scaling.grid import Trial, directory_names, make_trial, tested_with
from megarec.scaling.proposals import ROUND, Drawn, need_optuna, propose
from megarec.scaling.results import DONE, Rows, validation_loss
from megarec.scaling.space import Setting, draw, read_settings

MOST_TRIALS = 2_000  # of a family
_TRIES = 200  # draws in a row that were drawn before
_OWN = ("train.seed", "train.test", "train.best_by", "train.output_dir")


class SearchBudget(Section):
    """What every family may spend on choosing: one of these."""

    trials: int | None = Field(None, gt=0, le=MOST_TRIALS, description="runs")
    gflop: Above0 | None = Field(None, description="training GFLOP of all trials, as planned")
    steps: int | None = Field(None, gt=0, le=10**12, description="optimizer steps of all trials, as planned")

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if sum(value is not None for value in (self.trials, self.gflop, self.steps)) != 1:
            raise ValueError("expected one of trials, gflop and steps")
        return self

    def holds(self, trials: list[Trial]) -> bool:
        """Whether all of these can run."""
        if self.trials is not None:
            return len(trials) <= self.trials
        if self.gflop is not None:
            return sum(trial.gflop for trial in trials) <= self.gflop
        assert self.steps is not None
        return sum(trial.steps for trial in trials) <= self.steps

    def __str__(self) -> str:
        ((unit, value),) = self.model_dump(exclude_none=True).items()
        return f"{value:,g} GFLOP" if unit == "gflop" else f"{value:,} {unit}"


class SearchFile(Section):
    """The JSON of a search. Keys of `shared` and of families are those of `--set`."""

    base: str = Field(description="the run's JSON that all trials share, relative to this file")
    budget: SearchBudget = Field(description="the same for every family")
    sampler: Literal["random", "optuna"] = Field("random", description="optuna: its TPE, the extra megarec[search]")
    seed: Seed = Field(1, description="of the draws")
    seeds: list[Seed] = Field(
        [1, 2, 3], min_length=1, max_length=1_000, description="of train.seed; the first one searches, all are tested"
    )
    shared: dict[str, Any] = Field({}, description="what trials of every family set")
    families: dict[str, dict[str, Any]] = Field(
        min_length=1, description="by name, what its trials set; it replaces a key of `shared`"
    )

    @field_validator("families")
    @classmethod
    def _names_can_be_directories(cls, families: dict[str, Any]) -> dict[str, Any]:
        return directory_names(families)

    @field_validator("seeds")
    @classmethod
    def _are_different(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("the same seed twice")
        return seeds


@dataclass(frozen=True)
class Search:
    """A search.

    Attributes:
        base: the run's JSON.
        settings: of each family, by key.
    """

    path: Path
    file: SearchFile
    base: Path
    settings: dict[str, dict[str, Setting]]

    def trials(self, rows: Rows | None = None) -> tuple[list[Trial], bool]:
        """All trials known so far, a family's tests behind its draws, and whether these are all.

        Args:
            rows: which read the rows of these trials; None: what is known without any.

        Raises:
            UserError: a draw is not a valid config; names the family and the draw.
        """
        known: list[Trial] = []
        whole = True
        for family in self.settings:
            draws, complete = self._random(family) if self.file.sampler == "random" else self._proposed(family, rows)
            known += draws
            if complete:
                known += [tested_with(trial, seed) for trial in draws for seed in self.file.seeds]
            whole &= complete
        if rows is not None:
            rows.take(known)
        return known, whole

    def _random(self, family: str) -> tuple[list[Trial], bool]:
        draws = (draw(self.settings[family], self.file.seed, number) for number in itertools.count())
        found, _ = self._within_budget(family, [], draws, MOST_TRIALS)
        return [trial for trial, _ in found], True

    def _proposed(self, family: str, rows: Rows | None) -> tuple[list[Trial], bool]:
        """Rounds of draws, each by what came of those before, and whether all of them are there."""
        trials, history, complete = list[Trial](), list[tuple[Drawn, float | None]](), False
        while not complete:
            draws = propose(self.settings[family], history, self.file.seed)
            found, complete = self._within_budget(family, trials, draws, ROUND)
            trials += [trial for trial, _ in found]
            if rows is None:
                return trials, False
            rows.take(trials)
            if any(trial.name not in rows.of for trial in trials):
                return trials, False
            history += [(drawn, _loss(trial, rows)) for trial, drawn in found]
        return trials, True

    def _within_budget(
        self, family: str, before: list[Trial], draws: Iterator[Drawn], most: int
    ) -> tuple[list[tuple[Trial, Drawn]], bool]:
        """The next new draws, at most that many, and whether the budget or the space ends with them."""
        found: list[tuple[Trial, Drawn]] = []
        names = {trial.name for trial in before}
        repeats = 0
        for drawn in draws:
            trial = self._trial(family, len(before) + len(found), drawn)
            if trial.name in names:
                repeats += 1
                if repeats == _TRIES:  # the space has hardly another one
                    break
                continue
            if not self.file.budget.holds([*before, *(other for other, _ in found), trial]):
                break
            if len(found) == most:
                return found, False
            repeats = 0
            names.add(trial.name)
            found.append((trial, drawn))
        if not names:
            raise UserError(
                f"{self.path}: families.{family}: budget {self.file.budget} does not cover even its first trial, of "
                f"{trial.gflop:,.3g} GFLOP in {trial.steps:,} steps; raise it"
            )
        return found, True

    def _trial(self, family: str, number: int, drawn: Drawn) -> Trial:
        settings, seed = self.settings[family], self.file.seeds[0]
        sets = {key: setting.value(drawn[key]) for key, setting in settings.items()}
        try:
            return make_trial(family, number, seed, True, self.base, [*in_words(sets), "train.test=false"])
        except UserError as error:
            words = ", ".join(f"{key}={json.dumps(sets[key])}" for key in settings if settings[key].drawn)
            raise UserError(f"{self.path}: families.{family}: draw {number} ({words}): {error}") from error


def _loss(trial: Trial, rows: Rows) -> float | None:
    """On validation; None: it diverged, failed or has none."""
    loss = validation_loss(trial, rows.of[trial.name]) if rows.status(trial) == DONE else math.inf
    return loss if math.isfinite(loss) else None


def in_words(sets: dict[str, Any]) -> list[str]:
    """As `--set` takes them."""
    return [f"{key}={json.dumps(value)}" for key, value in sets.items()]


def is_search(path: Path) -> bool:
    """Whether a study's JSON is a search's.

    Raises:
        UserError: it cannot be read.
    """
    return "families" in read_object(path, "the JSON of a study (sweep --study STUDY.json)")


def read_search(path: Path) -> Search:
    """A search, with each of its values checked one at a time.

    Raises:
        UserError: names the file, the family, the key and the invalid value.
    """
    try:
        file = SearchFile.model_validate(read_object(path, "the JSON of a search"))
    except ValidationError as error:
        raise UserError(f"{path}: {describe(error, SearchFile)}") from error
    if file.sampler == "optuna":
        need_optuna(str(path))
    base = path.parent / file.base
    load_config(base)
    shared = read_settings(file.shared, f"{path}: shared")
    settings: dict[str, dict[str, Setting]] = {}
    for family, raw in file.families.items():
        own = read_settings(raw, f"{path}: families.{family}")
        where = {key: f"families.{family}" if key in own else "shared" for key in {**shared, **own}}
        settings[family] = _in_order({**shared, **own})
        _check(settings[family], path, base, where)
    return Search(path, file, base, settings)


def _in_order(settings: dict[str, Setting]) -> dict[str, Setting]:
    """Whole sections first, as a key inside one changes it."""
    return dict(sorted(settings.items(), key=lambda item: item[0].count(".")))


def _check(settings: dict[str, Setting], path: Path, base: Path, where: dict[str, str]) -> None:
    """Raise a UserError for the first key or value of a family that no config can have."""
    for key in settings:
        if key in _OWN:
            raise UserError(f"{path}: {where[key]}.{key}: the search decides this itself; leave it out")
        if not all(key.split(".")):
            raise UserError(f"{path}: {where[key]}.{key}: expected section.key, as for --set")
    middle = {key: setting.value(setting.number(0.5)) for key, setting in settings.items()}

    def load(sets: dict[str, Any], key: str) -> None:
        try:
            load_config(base, in_words(sets))
        except UserError as error:
            raise UserError(f"{path}: {where[key]}.{key}={json.dumps(sets[key])[:80]}: {error}") from error

    try:
        load_config(base, in_words(middle))
    except UserError:
        for count, key in enumerate(middle, start=1):  # the first that is invalid together with those before it
            load(dict(list(middle.items())[:count]), key)
        raise
    for key, setting in settings.items():
        for value in setting.ends:
            load({**middle, key: value}, key)
