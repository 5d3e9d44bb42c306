"""Draws of a search by Optuna's TPE, in rounds.

A round follows from the search's seed and from how the trials of earlier rounds ended, in the order of their numbers.
Nothing of Optuna's is kept on disk: its trials are replayed to it.
"""

import importlib.util
import itertools
from collections.abc import Iterator
from typing import Any

from megarec.errors import UserError
from megarec.scaling.space import Setting, draw

REQUIREMENT = "optuna==5.0.0"
ROUND = 8  # draws from the same trials, which may run at once; the first round is random

Drawn = dict[str, float]


def need_optuna(where: str) -> None:
    """Raise a UserError where Optuna is not installed."""
    if importlib.util.find_spec("optuna") is None:
        raise UserError(
            f"{where}: sampler='optuna' needs Optuna; pip install \"megarec[search]\" (which is {REQUIREMENT}), or "
            "take sampler='random'"
        )


def propose(settings: dict[str, Setting], history: list[tuple[Drawn, float | None]], seed: int) -> Iterator[Drawn]:
    """Draws of the next round, endlessly: some may repeat earlier ones.

    Args:
        history: every earlier draw with its loss on validation; None: it has none, which is worse than any.
    """
    if len(history) < ROUND:
        yield from (draw(settings, seed, number) for number in itertools.count())
        return
    import optuna  # an extra, and slow to load

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    distributions = {key: _distribution(setting) for key, setting in settings.items() if setting.drawn}
    sampler = optuna.samplers.TPESampler(
        seed=(seed * 10_007 + len(history)) % 2**32, n_startup_trials=0, constant_liar=True
    )
    study = optuna.create_study(sampler=sampler, direction="minimize")
    for drawn, loss in history:
        params = {key: drawn[key] for key in distributions}
        if loss is None:
            state, values = optuna.trial.TrialState.PRUNED, None
        else:
            state, values = optuna.trial.TrialState.COMPLETE, [loss]
        study.add_trial(
            optuna.trial.create_trial(params=params, distributions=distributions, values=values, state=state)
        )
    fixed = {key: 0.0 for key, setting in settings.items() if not setting.drawn}
    while True:
        params = study.ask(distributions).params
        yield fixed | {key: _number(settings[key], value) for key, value in params.items()}


def _distribution(setting: Setting) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if setting.kind == "choice":
        return CategoricalDistribution(range(len(setting.values)))
    low, high = setting.values
    if setting.kind == "int":
        return IntDistribution(low, high)
    return FloatDistribution(low, high, log=setting.kind == "log_uniform")


def _number(setting: Setting, value: float) -> float:
    return setting.tidy(value) if setting.kind in ("uniform", "log_uniform") else value
