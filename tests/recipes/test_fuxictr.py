"""FuxiCTR's YAMLs become runs: key by key, and never silently another one."""

import copy
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megarec.commands import import_recipe
from megarec.config.load import load_config
from megarec.config.regularisation import L2Config
from megarec.data.preparation.table_spec import load_table_spec
from megarec.errors import UserError
from megarec.recipes.fuxictr_models import MODELS

BASE = {"model_root": "./checkpoints/", "num_workers": 3, "verbose": 1, "early_stop_patience": 2, "eval_steps": None}
COMMON: dict[str, Any] = {
    "dataset_id": "shop",
    "loss": "binary_crossentropy",
    "metrics": ["logloss", "AUC"],
    "task": "binary_classification",
    "optimizer": "adam",
    "learning_rate": 1e-3,
    "embedding_regularizer": 0.05,
    "net_regularizer": 0,
    "batch_size": 128,
    "embedding_dim": 4,
    "epochs": 3,
    "shuffle": True,
    "seed": 2021,
    "monitor": "AUC",
    "monitor_mode": "max",
}
OWN: dict[str, dict[str, Any]] = {
    "DNN": {"hidden_units": [64, 32], "hidden_activations": "relu", "net_dropout": 0.2, "batch_norm": True},
    "DeepFM": {"hidden_units": [64, 32], "hidden_activations": "relu", "net_dropout": 0, "batch_norm": False},
    "DCNv2": {
        "model_structure": "parallel",
        "use_low_rank_mixture": False,
        "low_rank": 32,
        "num_experts": 4,
        "stacked_dnn_hidden_units": [64],
        "parallel_dnn_hidden_units": [64, 32],
        "dnn_activations": "relu",
        "num_cross_layers": 3,
        "net_dropout": 0,
        "batch_norm": False,
    },
    "FinalMLP": {
        "mlp1_hidden_units": [64, 32],
        "mlp1_hidden_activations": "relu",
        "mlp1_dropout": 0,
        "mlp1_batch_norm": False,
        "mlp2_hidden_units": [64, 64],
        "mlp2_hidden_activations": "relu",
        "mlp2_dropout": 0,
        "mlp2_batch_norm": False,
        "use_fs": True,
        "fs_hidden_units": [64],
        "fs1_context": ["user"],
        "fs2_context": [],
        "num_heads": 2,
    },
    "AutoInt": {
        "dnn_hidden_units": [64, 32],
        "dnn_activations": "relu",
        "net_dropout": 0,
        "num_heads": 2,
        "attention_layers": 3,
        "attention_dim": 8,
        "use_residual": True,
        "batch_norm": False,
        "layer_norm": False,
        "use_scale": False,
        "use_wide": False,
    },
    "MaskNet": {
        "dnn_hidden_units": [64, 32],
        "dnn_hidden_activations": "relu",
        "model_type": "ParallelMaskNet",
        "parallel_num_blocks": 2,
        "parallel_block_dim": 16,
        "reduction_ratio": 0.5,
        "emb_layernorm": True,
        "net_layernorm": True,
        "net_dropout": 0,
    },
    "WuKong": {
        "num_wukong_layers": 3,
        "lcb_features": 8,
        "fmb_features": 8,
        "fmb_mlp_units": [32, 32],
        "fmb_mlp_activations": "relu",
        "fmp_rank_k": 8,
        "mlp_hidden_units": [32, 32],
        "mlp_hidden_activations": "relu",
        "mlp_batch_norm": True,
        "layer_norm": True,
        "net_dropout": 0,
    },
}
DATA: dict[str, Any] = {
    "data_root": "../data/",
    "data_format": "csv",
    "train_data": "train.csv",
    "valid_data": "valid.csv",
    "test_data": "test.csv",
    "min_categr_count": 2,
    "feature_cols": [
        {"name": ["user", "item"], "active": True, "dtype": "str", "type": "categorical"},
        {"name": "old", "active": False, "dtype": "str", "type": "categorical"},
        {
            "name": "seen",
            "active": True,
            "dtype": "str",
            "type": "sequence",
            "splitter": "|",
            "share_embedding": "item",
        },
        {"name": "recent", "active": True, "dtype": "str", "type": "sequence", "max_len": 5, "padding": "pre"},
        {"name": "price", "active": True, "dtype": "float", "type": "numeric", "normalizer": "StandardScaler"},
        {"name": "request", "active": True, "dtype": "int", "type": "meta"},
    ],
    "label_col": {"name": "clicked", "dtype": "float"},
}


class Files:
    """The two YAMLs of one experiment, to be changed and translated."""

    def __init__(self, directory: Path, model: str) -> None:
        self.directory = directory
        self.model: dict[str, Any] = copy.deepcopy(COMMON | {"model": model} | OWN[model])
        self.data = copy.deepcopy(DATA)

    def translate(self, monkeypatch: pytest.MonkeyPatch, *options: str, data: bool = True) -> tuple[Path, Path]:
        model, dataset = self.directory / "model_config.yaml", self.directory / "dataset_config.yaml"
        model.write_text(yaml.safe_dump({"Base": BASE, "mine": self.model}))
        dataset.write_text(yaml.safe_dump({"shop": self.data}))
        run, spec = self.directory / "run.json", self.directory / "spec.json"
        words = [str(model), "--output", str(run), "--data", "data/shop", *options]
        words += ["--dataset", str(dataset), "--spec", str(spec)] if data else []
        monkeypatch.setattr(sys, "argv", ["import_recipe.py", *words])
        import_recipe.main()
        return run, spec

    def refusal(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], data: bool = True) -> str:
        with pytest.raises(SystemExit) as ended:
            self.translate(monkeypatch, data=data)
        assert ended.value.code == 2
        assert not (self.directory / "run.json").exists() and not (self.directory / "spec.json").exists()
        return capsys.readouterr().err


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path, "DNN")


@pytest.mark.parametrize("model", MODELS)
def test_every_model_becomes_a_run_that_loads(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, spec = Files(tmp_path, model).translate(monkeypatch)
    config = load_config(run)
    assert config.embedding.l2 == L2Config(weight=0.05, rows="all", coupled=True)
    assert (config.embedding.optimizer, config.embedding.update_rows) == ("adam", "all")
    assert config.embedding.initial_std == 1e-4
    assert config.embedding.gradient_clipping == config.deepspeed["gradient_clipping"] == 10.0
    assert (config.dense.optimizer, config.dense.learning_rate) == ("adam", 1e-3)
    assert (config.schedule.plateau_patience, config.schedule.plateau_factor) == (1, 0.1)
    assert (config.train.early_stopping, config.train.best_by, config.train.seed) == (2, "auc", 2021)
    assert config.model.numeric_embeddings == 1 and load_table_spec(spec).labels == ["clicked"]


def test_sizes_are_those_of_the_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {
        "DNN": {"head": [64, 32], "dropout": 0.2, "norm": "batch"},
        "DCNv2": {"head": [64, 32], "structure": "parallel", "layers": 3, "rank": None},
        "FinalMLP": {"gates": [[0], []], "gate_mlp": [64], "fusion_heads": 2},
        "AutoInt": {"heads": 2, "attention_dim": 4, "layers": 3},
        "MaskNet": {"mask": 10, "blocks": 2, "width": 16},  # 5 features x 4 / 2
        "WuKong": {"num_lcb": 8, "num_fm": 8, "rank": 8, "mlp": [32, 32], "norm": "batch"},
    }
    for model, sizes in expected.items():
        (tmp_path / model).mkdir()
        run, _ = Files(tmp_path / model, model).translate(monkeypatch)
        section = json.loads(run.read_text())["model"]
        assert {key: section[key] for key in sizes} == sizes


def test_the_spec_has_the_columns(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    files.model["group_id"] = "request"
    _, spec = files.translate(monkeypatch)
    assert json.loads(spec.read_text())["columns"] == {
        "clicked": {"type": "label"},
        "user": {"type": "categorical", "dtype": "string", "min_count": 2},
        "item": {"type": "categorical", "dtype": "string", "min_count": 2},
        "old": {"type": "ignored"},
        "seen": {"type": "multi_valued", "dtype": "string", "table": "item", "separator": "|", "pooling": "mean"},
        "recent": {
            "type": "sequence",
            "dtype": "string",
            "min_count": 2,
            "separator": "^",
            "pooling": "mean",
            "max_length": 5,
            "newest": "last",
        },
        "price": {"type": "numeric", "missing": 0.0, "standardise": True},
        "request": {"type": "group", "dtype": "integer"},
    }


def test_every_key_has_its_note(
    files: Files, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files.translate(monkeypatch, "--json")
    printed = json.loads(capsys.readouterr().out)
    lines = {line["key"]: line for line in printed["keys"]}
    assert set(files.model) - {"dataset_id", "monitor_mode"} | set(BASE) <= set(lines)
    assert lines["embedding_regularizer"]["target"] == "embedding.l2"
    assert lines["num_workers"]["kind"] == "unused" and lines["batch_size"]["kind"] == "differs"
    assert printed["commands"][0].startswith("python tools/prepare_data.py table --schema ")
    assert "--train train.csv --valid valid.csv --test test.csv" in printed["commands"][0]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("hidden_unitz", [64], "hidden_unitz=[64]: FuxiCTR's DNN has no such key here; did you mean 'hidden_units'?"),
        ("embedding_regularizer", "l1(0.1)", "embedding_regularizer='l1(0.1)': expected a number or l2(number)"),
        ("learning_rate", [1e-3, 1e-4], "learning_rate=[0.001, 0.0001]: expected one number"),
        ("hidden_activations", "Dice", "hidden_activations='Dice': expected one of relu"),
        ("optimizer", "adagrad", "optimizer='adagrad': expected adam"),
        ("monitor", "gAUC", "monitor='gAUC': with monitor_mode='max'"),
        ("shuffle", False, "shuffle=False: examples are shuffled"),
        ("net_dropout", True, "net_dropout=True: expected one number"),
        ("hidden_units", [[64], [32]], "hidden_units=[[64], [32]]: expected a list of widths"),
        ("model", "xDeepFM2", "model='xDeepFM2': expected one of DNN"),
        ("task", "regression", "task='regression': expected binary_classification"),
    ],
)
def test_what_cannot_be_translated_is_named(
    key: str,
    value: Any,
    message: str,
    files: Files,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files.model[key] = value
    assert message in files.refusal(monkeypatch, capsys)


@pytest.mark.parametrize(
    ("model", "key", "value", "message"),
    [
        ("MaskNet", "model_type", "SerialMaskNet", "expected ParallelMaskNet"),
        ("DCNv2", "use_low_rank_mixture", True, "the mixture of low-rank experts is not supported"),
        ("DCNv2", "model_structure", "stacked_parallel", "expected parallel, stacked or crossnet_only"),
        ("FinalMLP", "mlp2_dropout", 0.3, "mlp1_dropout is 0.0; one rate is of all MLPs here"),
        ("FinalMLP", "fs1_context", ["nobody"], "'nobody' is not a feature of the data set"),
        ("AutoInt", "use_wide", True, "there is no wide part here"),
        ("WuKong", "layer_norm", False, "LayerNorm is a part of a layer here"),
    ],
)
def test_another_model_is_never_made_silently(
    model: str,
    key: str,
    value: Any,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = Files(tmp_path, model)
    files.model[key] = value
    assert message in files.refusal(monkeypatch, capsys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preprocess": "convert_hour"}, "user: preprocess='convert_hour': has no equal here"),
        ({"pretrained_emb": "e.npz"}, "user: pretrained_emb='e.npz': has no equal here"),
        ({"type": "embedding"}, "user: type='embedding': expected one of categorical, sequence, numeric, meta"),
        ({"kind": "new"}, "user: kind='new': a feature has no such key here"),
    ],
)
def test_what_a_feature_cannot_be_is_named(
    change: dict[str, Any],
    message: str,
    files: Files,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files.data["feature_cols"][0] |= change
    assert message in files.refusal(monkeypatch, capsys)


def test_encoded_files_are_refused(
    files: Files, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    del files.data["feature_cols"]
    assert "these files are encoded already" in files.refusal(monkeypatch, capsys)


def test_keys_that_depend_on_the_features_ask_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "name them with --dataset" in Files(tmp_path, "MaskNet").refusal(monkeypatch, capsys, data=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mine: {model: DNN, model: DCNv2}", "line 1: not readable as YAML ('model' appears twice)"),
        ("mine: !!python/object/apply:os.system [ls]", "not readable as YAML"),
        ("- 1", "expected a mapping from names to mappings"),
        ("a: {}\nb: {}", "there are 2; name one with --experiment: a, b"),
        ("a: [", "not readable as YAML"),
    ],
)
def test_a_file_that_is_something_else_is_refused(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(text)
    monkeypatch.setattr(sys, "argv", ["import_recipe.py", str(path), "--output", str(tmp_path / "run.json")])
    with pytest.raises(SystemExit) as ended:
        import_recipe.main()
    assert ended.value.code == 2 and message in capsys.readouterr().err


SHIPPED = sorted((Path(__file__).parents[2] / "ds_configs/recipes").glob("*.json"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_recipes_load(path: Path) -> None:
    config = load_config(path)
    assert config.embedding.rule_of("user").all_rows and config.model.norm == "batch"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("embedding.placement=auto", "embedding.placement='auto' with embedding.gradient_clipping: copies"),
        ('embedding.tables={"user": {"placement": "replicated"}}', "embedding.tables.user.placement='replicated' with"),
        ("parallel.exchange=tower", "needs parallel.exchange='flat'"),
        ("embedding.backend=fbgemm", "embedding.backend='torch'"),
    ],
)
def test_a_norm_that_nobody_can_sum_is_refused(override: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        load_config(SHIPPED[0], ["embedding.gradient_clipping=1.0", "parallel.towers=2", override])
