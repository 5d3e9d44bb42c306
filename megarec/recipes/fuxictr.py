"""FuxiCTR's training keys -> a run's JSON: one model of a model_config.yaml, with its Base.

FuxiCTR's behaviour that has no key in its YAMLs is stated as well: tables start normal with deviation 1e-4, gradients
are clipped to a norm of 10, rates drop to a tenth at every validation without improvement, and Adam steps every row
of every table, with L2 in the gradient of all rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megarec.recipes.fuxictr_models import MODELS
from megarec.recipes.keys import Keys, Line, chosen, read_yaml

BASE = "Base"
INITIAL_STD = 1e-4
GRADIENT_NORM = 10.0
PLATEAU_FACTOR = 0.1
UNUSED = (
    "model_root",
    "num_workers",
    "verbose",
    "pickle_feature_encoder",
    "debug_mode",
    "metrics",
    "model_id",
    "gpu",
    "data_loader",
    "streaming",
    "debug",
    "use_hdf5",
    "version",
)
OLD_NAMES = {"patience": "early_stop_patience"}  # of FuxiCTR 1


@dataclass(frozen=True)
class Experiment:
    """One experiment of a model_config.yaml, its Base included."""

    name: str
    keys: Keys
    dataset_id: str


@dataclass(frozen=True)
class Recipe:
    """A run's JSON, and the outcome of every key."""

    run: dict[str, Any]
    lines: tuple[Line, ...]


def read_experiment(path: Path, name: str | None) -> Experiment:
    """One experiment; missing keys come from its Base.

    Raises:
        UserError: the file is not such a YAML, or has no such experiment.
    """
    found = read_yaml(path)
    base = found.pop(BASE, {})
    name, own = chosen(path, found, name, "--experiment")
    values = {OLD_NAMES.get(key, key): value for key, value in {**base, **own}.items()}
    keys = Keys(values, f"{path}: {name}")
    return Experiment(name, keys, str(keys.take("dataset_id", "TBD")))


def translate(experiment: Experiment, fields: Sequence[str] | None, numbers: int, data: str, output_dir: str) -> Recipe:
    """A run that trains as the experiment does.

    Args:
        fields: the features in their order; None: no data set was given.
        numbers: how many of them are numeric.
        data: directory of the prepared data.
        output_dir: where the run will write.

    Raises:
        UserError: a key that has no equal here, or that is not known; the message has its value and the remedy.
    """
    keys = experiment.keys
    kind = keys.text("model")
    if kind not in MODELS:
        keys.fail("model", kind, f"expected one of {', '.join(MODELS)}")
    dim = keys.integer("embedding_dim", 10)
    model: dict[str, Any] = {"name": "", "dim": dim}
    keys.note("model", kind, "model.name")
    keys.note("embedding_dim", dim, "model.dim")
    model |= MODELS[kind](keys, dim, fields)
    if numbers:
        model |= {"numeric_mlp": [], "numeric_bias": [False], "numeric_embeddings": numbers}
        remark = "a linear map of all numbers; FuxiCTR's embedding of a number sees that number alone"
        keys.note("feature_cols", f"{numbers} numeric", "model.numeric_embeddings", "differs", remark)
    run: dict[str, Any] = {"model": model, "data": {"path": data}}
    _data(keys, run)
    _optimizers(keys, run)
    _schedule(keys, run, output_dir)
    keys.unused(*UNUSED)
    keys.finish(f"FuxiCTR's {kind}")
    return Recipe(run, tuple(keys.lines))


def _data(keys: Keys, run: dict[str, Any]) -> None:
    run["data"]["batch_size"] = batch = keys.integer("batch_size")
    keys.note("batch_size", batch, "data.batch_size", "differs", "an epoch's last, smaller batch is left out here")
    keys.must_be("shuffle", True, "examples are shuffled every epoch here; expected true", True)
    keys.must_be("task", "binary_classification", "expected binary_classification", "binary_classification")
    loss = keys.take("loss", "binary_crossentropy")
    if loss not in ("bce", "binary_crossentropy", "binary_cross_entropy"):
        keys.fail("loss", loss, "expected binary_crossentropy, which is minimised here")
    keys.note("loss", loss, "", remark="what is done here")
    for key in ("feature_specs", "feature_config"):
        keys.must_be(key, None, "has no equal here; expected null", None)
    if features := keys.take("use_features", None):
        if not isinstance(features, list) or not all(isinstance(name, str) for name in features):
            keys.fail("use_features", features, "expected null or a list of names")
        run["data"]["features"] = features
        keys.note("use_features", features, "data.features")
    else:
        keys.note("use_features", None, "data.features", remark="all")
    keys.take("group_id", None)  # of the data set


def _optimizers(keys: Keys, run: dict[str, Any]) -> None:
    optimizer = keys.text("optimizer", "adam")
    if optimizer.lower() != "adam":
        keys.fail("optimizer", optimizer, "expected adam")
    rate = keys.number("learning_rate", 1e-3)
    embedding: dict[str, Any] = {"optimizer": "adam", "learning_rate": rate, "initial_std": INITIAL_STD}
    dense: dict[str, Any] = {"optimizer": "adam", "learning_rate": rate}
    keys.note("optimizer", optimizer, "dense.optimizer, embedding.optimizer, embedding.update_rows")
    keys.note("learning_rate", rate, "dense.learning_rate, embedding.learning_rate")
    l2 = _l2(keys, "embedding_regularizer")
    if l2:
        embedding["l2"] = {"weight": l2, "rows": "all", "coupled": True}
    embedding["update_rows"] = "all"
    keys.note("embedding_regularizer", l2, "embedding.l2", remark="of all rows at every step, in the gradient")
    if decay := _l2(keys, "net_regularizer"):
        dense["weight_decay"] = decay
    keys.note("net_regularizer", decay, "dense.weight_decay", remark="coupled: dense.optimizer is adam")
    initial = keys.take("embedding_initializer", None)
    if initial not in (None, "partial(nn.init.normal_, std=1e-4)"):
        keys.fail("embedding_initializer", initial, "expected FuxiCTR's default; set embedding.initial_std by hand")
    keys.note("(embedding_initializer)", "normal, 1e-4", "embedding.initial_std")
    keys.note("(initial weights)", "Xavier", "", "differs", "He's here: normal with variance 2 / inputs")
    if dropout := keys.number("embedding_dropout", 0):
        embedding["dropout"] = dropout
        keys.note("embedding_dropout", dropout, "embedding.dropout")
    norm = keys.number("max_gradient_norm", GRADIENT_NORM)
    embedding["gradient_clipping"] = norm
    run |= {"embedding": embedding, "dense": dense, "deepspeed": {"gradient_clipping": norm}}
    remark = "each side by its own norm; FuxiCTR's is one norm of both"
    keys.note(
        "(max_gradient_norm)", norm, "embedding.gradient_clipping, deepspeed.gradient_clipping", "differs", remark
    )


def _l2(keys: Keys, key: str) -> float:
    """lambda of (lambda / 2) |w|^2, whose gradient is lambda w."""
    value = keys.take(key, None)
    text = str(value).strip() if value is not None else "0"
    inner = text.removeprefix("l2(").removesuffix(")") if text.startswith("l2(") else text
    try:
        number = float(inner) if not isinstance(value, bool) else -1.0
    except ValueError:
        number = -1.0
    if not 0 <= number < 1e6:
        keys.fail(key, value, "expected a number or l2(number); L1 has no equal here")
    return number


def _schedule(keys: Keys, run: dict[str, Any], output_dir: str) -> None:
    train: dict[str, Any] = {"output_dir": output_dir}
    for key, own, default in (("epochs", "epochs", 1), ("seed", "seed", 2019)):
        train[own] = keys.integer(key, default)
        keys.note(key, train[own], f"train.{own}")
    monitor, mode = keys.take("monitor", "AUC"), keys.take("monitor_mode", "max")
    train["best_by"] = _best_by(keys, monitor, mode)
    keys.note("monitor", monitor, "train.best_by")
    keys.note("monitor_mode", mode, "train.best_by")
    patience = keys.integer("early_stop_patience", 2)
    train["early_stopping"] = patience
    keys.note("early_stop_patience", patience, "train.early_stopping")
    if steps := keys.take("eval_steps", None):
        keys.values["eval_steps"] = steps
        train["evaluate_every"] = keys.integer("eval_steps")
    keys.note("eval_steps", steps, "train.evaluate_every", remark="" if steps else "every epoch")
    keys.must_be("every_x_epochs", 1, "a validation is due every epoch or every N steps; expected 1", 1)
    keys.must_be("save_best_only", True, "the best is kept and tested here; expected true", True)
    run["train"] = train
    drops = keys.flag("reduce_lr_on_plateau", True)
    if drops:
        run["schedule"] = {"plateau_patience": 1, "plateau_factor": PLATEAU_FACTOR}
    remark = (
        "x 0.1 at every validation without improvement; FuxiCTR's least rate of 1e-6 has no equal here" if drops else ""
    )
    keys.note("(reduce_lr_on_plateau)", drops, "schedule.plateau_patience, schedule.plateau_factor", remark=remark)


def _best_by(keys: Keys, monitor: Any, mode: Any) -> str:
    weights = {monitor: 1} if isinstance(monitor, str) else monitor
    named = (
        {str(name).lower(): weight for name, weight in weights.items() if weight} if isinstance(weights, dict) else {}
    )
    for best_by, wanted_mode, wanted in (
        ("auc", "max", {"auc": 1}),
        ("logloss", "min", {"logloss": 1}),
        ("logloss", "max", {"logloss": -1}),
        ("auc_minus_logloss", "max", {"auc": 1, "logloss": -1}),
    ):
        if (mode, named) == (wanted_mode, wanted):
            return best_by
    return keys.fail(
        "monitor", monitor, f"with monitor_mode={mode!r}; expected AUC, logloss, or {{'AUC': 1, 'logloss': -1}}"
    )
