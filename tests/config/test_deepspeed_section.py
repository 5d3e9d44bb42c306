"""The deepspeed section: words in place of values, keys that do nothing, and one answer about precision and stage."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from megarec.config.deepspeed import KNOWN_KEYS, REPLACED_KEYS, monitor_sections
from megarec.config.load import load_config
from megarec.dense.settings import settings_of
from megarec.errors import UserError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"model": {"name": "lr"}, "data": {"path": "somewhere"}}))
    return path


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ('bf16.enabled="False"', "bf16.enabled='False': a string; write false without quotes"),
        ("bf16.enabled=on", "bf16.enabled='on': a string"),
        ('fp16={"enabled": "auto"}', 'fp16.enabled="auto": only Hugging Face\'s trainer'),
        ("bf16.enabled=1", "bf16.enabled=1: expected true or false"),
        ("bf16=true", 'bf16=True: expected an object, such as {"enabled": true}'),
        ("bf16=None", 'bf16=None: expected an object, such as {"enabled": true}'),
        ("zero_optimization=3", 'zero_optimization=3: expected an object, such as {"stage": 2}'),
        ("zero_optimization.stage=true", "zero_optimization.stage=True: expected 0, 1, 2 or 3"),
        ("zero_optimization.stage=2.0", "zero_optimization.stage=2.0: expected 0, 1, 2 or 3"),
        ('zero_optimization.stage="3"', "zero_optimization.stage='3': expected 0, 1, 2 or 3"),
        ("zero_optimization.stage=auto", 'zero_optimization.stage="auto": only Hugging Face'),
        ('zero_optimization={"stage3_prefetch_bucket_size": "auto"}', 'stage3_prefetch_bucket_size="auto": only'),
        ("gradient_clipping=auto", 'gradient_clipping="auto": only Hugging Face'),
        ("gradient_clipping=true", "gradient_clipping=True: expected a number from 0 to 1e+30"),
        ("gradient_clipping=-1", "gradient_clipping=-1: expected a number from 0"),
        ("zero_allow_untested_optimizer=yes", "zero_allow_untested_optimizer='yes': a string"),
        ("optimizer=AdamW", "optimizer='AdamW': expected an object"),
        ("optimizer.params.lr=0.1", "optimizer.type=None: expected the name of an optimizer"),
        ('optimizer={"type": "AdamW", "params": {"lr": "auto"}}', 'optimizer.params.lr="auto": only Hugging'),
        ('fp16={"enabled": true}', None),
        ('bf16={"enabled": true}', None),
        ('bfloat16={"enabled": false}', None),
        ("train_batch_size=auto", None),
        ("communication_data_type=fp64", "communication_data_type='fp64': expected one of fp32, fp16, bf16"),
        ("tensorboard=true", "tensorboard=True: expected an object"),
        ("tensorboard.enabled=auto", 'tensorboard.enabled="auto": only Hugging'),
        ("tensorboard.job_name=../../x", "tensorboard.job_name='../../x': leads out of the directory"),
        ("csv_monitor.job_name=/tmp/x", "csv_monitor.job_name='/tmp/x': leads out of the directory"),
        ('tensorboard.job_name=""', "tensorboard.job_name='': expected a name"),
        ("tensorboard.output_path=3", "tensorboard.output_path=3: expected a name"),
    ],
)
def test_words_in_place_of_values(run: Path, override: str, expected: str | None) -> None:
    if expected is None:
        load_config(run, [f"deepspeed.{override}"])
        return
    with pytest.raises(UserError) as error:
        load_config(run, [f"deepspeed.{override}"])
    assert f": deepspeed.{expected}" in str(error.value) or expected in str(error.value)
    assert "\n" not in str(error.value)


def test_two_precisions_are_refused(run: Path) -> None:
    both = ["deepspeed.bf16.enabled=true", "deepspeed.fp16.enabled=true"]
    with pytest.raises(UserError, match=r"deepspeed\.bf16\.enabled=true and deepspeed\.fp16\.enabled=true: keep one"):
        load_config(run, both)
    with pytest.raises(UserError, match=r"deepspeed\.bfloat16: the old name of bf16"):
        load_config(run, ["deepspeed.bf16.enabled=true", "deepspeed.bfloat16.enabled=true"])


@pytest.mark.parametrize(
    ("overrides", "dtype", "stage"),
    [
        (["bf16.enabled=False", "zero_optimization.stage=3"], torch.float32, 3),
        (["bf16.enabled=True", "zero_optimization.stage=0"], torch.bfloat16, 0),
        (["bfloat16.enabled=true"], torch.bfloat16, 0),
        (["fp16.enabled=true", "bf16.enabled=false", "zero_optimization.stage=1"], torch.float16, 1),
        ([], torch.float32, 0),
    ],
)
def test_precision_and_stage_are_what_deepspeed_reads(
    run: Path, overrides: list[str], dtype: torch.dtype, stage: int
) -> None:
    found = settings_of(load_config(run, [f"deepspeed.{override}" for override in overrides]).deepspeed)
    assert (found.dtype, found.stage) == (dtype, stage)


@pytest.mark.parametrize("section", [{"fp16": {"enabld": True}}, {"zero_optimization": {"stage": 2, "overlap_com": 1}}])
def test_what_deepspeed_refuses_is_one_line(section: dict[str, object]) -> None:
    with pytest.raises(UserError, match=r"DeepSpeed refused the deepspeed section: .*(enabld|overlap_com)") as error:
        settings_of(section)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", REPLACED_KEYS)
def test_a_key_that_does_nothing_is_refused_with_what_to_use(run: Path, key: str) -> None:
    for value in ("true", "{}", '{"enabled": true}', "7"):
        with pytest.raises(UserError, match=rf"deepspeed\.{key}: {REPLACED_KEYS[key][:10]}"):
            load_config(run, [f"deepspeed.{key}={value}"])
    assert key not in KNOWN_KEYS


def test_a_service_that_is_not_installed_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for key, module in (("wandb", "wandb"), ("comet", "comet_ml")):
        monkeypatch.delitem(sys.modules, module, raising=False)
        with pytest.raises(UserError, match=rf"deepspeed\.{key}\.enabled=true: {module} is not installed; pip install"):
            monitor_sections({key: {"enabled": True}}, tmp_path)
        assert monitor_sections({key: {"enabled": False}}, tmp_path)[key]["enabled"] is False
        monkeypatch.setitem(sys.modules, module, ModuleType(module))
        assert monitor_sections({key: {"enabled": True}}, tmp_path)[key]["enabled"] is True
