"""The grid of a sweep: models x learning rates x seeds over one data set, each an ordinary run with its cost."""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator

from megarec.config.base import Rate, Section, Seed
from megarec.config.load import describe, load_config
from megarec.config.sections import RunConfig
from megarec.data.schema import Schema, schema_of
from megarec.errors import UserError
from megarec.files import file_name, read_object
from megarec.run.cost import Cost
from megarec.run.spec import resolve


class StudyFile(Section):
    """The JSON of a sweep. Keys of models and learning rates are those of `--set`."""

    base: str = Field(description="the run's JSON that all trials share, relative to this file")
    models: dict[str, dict[str, Any]] = Field(
        min_length=1, description="by name (the family, then the size: wukong-2x8), what its run sets"
    )
    learning_rates: list[dict[str, Rate]] = Field(
        [{}],
        min_length=1,
        description="what is tried for every model with the first seed; the best on validation gets all seeds",
    )
    seeds: list[Seed] = Field([1], min_length=1, max_length=1_000, description="of train.seed")

    @field_validator("models")
    @classmethod
    def _names_can_be_directories(cls, models: dict[str, Any]) -> dict[str, Any]:
        return directory_names(models)


def directory_names(models: dict[str, Any]) -> dict[str, Any]:
    """The same models, if their names can name directories; else a ValueError."""
    for name in models:
        if re.fullmatch(r"[A-Za-z0-9_+][A-Za-z0-9_.+-]*", name) is None:
            raise ValueError(f"{name!r} cannot name a directory; take letters, digits, '_', '.', '+' and '-'")
    return models


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
        rate: place in the study's learning rates, or in a search the number of its draw.
        tuning: whether it takes part in the choice of the learning rate, or of the draw.
        base, overrides: `megarec train --config base --set ...`.
        config_hash: of the resolved config and the data's schema, without where and on how many threads it runs.
        examples: it trains on, if it does not stop early.
    """

    model: str
    rate: int
    seed: int
    tuning: bool
    base: Path
    overrides: tuple[str, ...]
    config: RunConfig
    schema: Schema
    cost: Cost
    config_hash: str
    examples: int

    @property
    def name(self) -> str:
        """Of its directory; another config has another one."""
        return file_name(f"{self.model}-seed{self.seed}-{self.config_hash}")

    @property
    def gflop(self) -> float:
        """Of the whole training."""
        return self.cost.flop / 1e9 * self.examples

    @property
    def steps(self) -> int:
        """That it makes, if it does not stop early."""
        return self.examples // self.config.data.batch_size

    @property
    def searching(self) -> bool:
        """Whether it is a search's, which leaves the test split alone and may be lost."""
        return self.tuning and not self.config.train.test


def read_grid(path: Path) -> list[Trial]:
    """All trials of a study, model by model in its order: every learning rate with every seed.

    Raises:
        UserError: the study, its base or a trial's config is invalid; names the model if it is one's.
    """
    study = _read_study(path)
    base = path.parent / study.base
    trials: dict[str, Trial] = {}
    for model, sets in study.models.items():
        for rate, rates in enumerate(study.learning_rates):
            for seed in study.seeds:
                overrides = [f"{key}={json.dumps(value)}" for key, value in {**sets, **rates}.items()]
                try:
                    trial = make_trial(model, rate, seed, seed == study.seeds[0], base, overrides)
                except UserError as error:
                    raise UserError(f"{path}: models.{model}: {error}") from error
                if twin := trials.setdefault(trial.name, trial) if trial.name in trials else None:
                    raise UserError(f"{path}: models.{model} has the same run twice (rates {twin.rate} and {rate})")
                trials[trial.name] = trial
    return list(trials.values())


def make_trial(model: str, rate: int, seed: int, tuning: bool, base: Path, overrides: list[str]) -> Trial:
    """A trial of a run's JSON and what it sets.

    Raises:
        UserError: the config is invalid, or its data are missing.
    """
    overrides = [*overrides, f"train.seed={seed}", "deepspeed.tensorboard.enabled=true"]
    config = load_config(base, overrides)
    schema = schema_of(config.data)
    steps = config.train.epochs * (schema.rows["train"] // config.data.batch_size)
    return Trial(
        model,
        rate,
        seed,
        tuning,
        base,
        tuple(overrides),
        config,
        schema,
        resolve(config, schema).cost,
        _hash(config, schema),
        min(steps, config.train.max_steps or steps) * config.data.batch_size,
    )


def tested_with(trial: Trial, seed: int) -> Trial:
    """The same run with another seed and with its test, as what a search chose is tested."""
    overrides = [word for word in trial.overrides if not word.startswith(("train.seed=", "train.test="))]
    train = trial.config.train.model_copy(update={"seed": seed, "test": True})
    config = trial.config.model_copy(update={"train": train})
    return replace(
        trial,
        seed=seed,
        tuning=False,
        overrides=(*overrides, f"train.seed={seed}"),
        config=config,
        config_hash=_hash(config, trial.schema),
    )


def _hash(config: RunConfig, schema: Schema) -> str:
    data = schema.model_dump(exclude={"unknown"} if schema.identity else {"unknown", "identity"})
    content = [config.model_dump(mode="json", exclude={"train": {"output_dir", "threads"}, "data": {"cache"}}), data]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def of_models(trials: list[Trial]) -> Iterator[tuple[str, list[Trial]]]:
    """The trials of each model, in their order."""
    for model in dict.fromkeys(trial.model for trial in trials):
        yield model, [trial for trial in trials if trial.model == model]


def _read_study(path: Path) -> StudyFile:
    value = read_object(path, "the JSON of a study (sweep --study STUDY.json)")
    try:
        return StudyFile.model_validate(value)
    except ValidationError as error:
        raise UserError(f"{path}: {describe(error, StudyFile)}") from error
