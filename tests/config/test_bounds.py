"""Every number of a config has a range; what a run needs is compared with the machine; outputs are looked at first."""

import json
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import annotated_types
import pytest
import torch
from pydantic import BaseModel

from megarec.config.base import Section
from megarec.config.load import load_config
from megarec.config.sections import RunConfig
from megarec.data.schema import CategoricalFeature, Schema
from megarec.distributed.topology import ONE_RANK
from megarec.errors import UserError
from megarec.run import fits
from megarec.run.spec import resolve
from megarec.training.run_directory import check_outputs

SCHEMA = Schema(name="x", categorical=(CategoricalFeature(name="a", rows=1_000),), numeric=("n",), rows={})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"model": {"name": "wukong"}, "data": {"path": "somewhere"}}))
    return path


def numbers(annotation: Any, constraints: tuple[Any, ...] = ()) -> Iterator[tuple[type, tuple[Any, ...]]]:
    """Every int and float of a type, with the constraints that stand at it."""
    if typing.get_origin(annotation) is typing.Annotated:
        inner, *metadata = typing.get_args(annotation)
        flat = [part for entry in metadata for part in getattr(entry, "metadata", [entry])]
        yield from numbers(inner, (*constraints, *flat))
    elif annotation in (int, float):
        yield annotation, constraints
    elif not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        for part in typing.get_args(annotation):
            yield from numbers(part, constraints if type(None) in typing.get_args(annotation) else ())


def sections(kind: type[Section]) -> Iterator[type[Section]]:
    for child in kind.__subclasses__():
        yield child
        yield from sections(child)


FREE = {"TowersFile": {"seed", "cost"}, "FinalMlpConfig": {"gates"}}  # for people; places in X_0, which are looked up


@pytest.mark.parametrize("section", [s for s in sections(Section) if s.__module__.startswith("megarec.config")])
def test_every_number_of_the_config_has_both_bounds(section: type[Section]) -> None:
    for name, field in section.model_fields.items():
        for kind, constraints in numbers(field.annotation, tuple(field.metadata)):
            if name in FREE.get(section.__name__, ()):
                continue
            below = [c for c in constraints if isinstance(c, annotated_types.Ge | annotated_types.Gt)]
            above = [c for c in constraints if isinstance(c, annotated_types.Le | annotated_types.Lt)]
            assert below and above, f"{section.__name__}.{name}: {kind.__name__} without both bounds"


@pytest.mark.parametrize(
    "override",
    [
        "parallel.timeout_seconds=1e308",
        "parallel.timeout_seconds=0",
        "dense.eps=1e308",
        "dense.eps=1e-300",
        "dense.eps=-0",
        "dense.betas=[1, 2]",
        "dense.betas=[-0.1, 0.9]",
        "dense.learning_rate=1e30",
        "embedding.learning_rate=-1",
        "embedding.initial_std=1e10",
        "train.threads=100000",
        "train.seed=1000000000000000000000000000000",
        "train.epochs=1000000000000",
        "train.max_steps=10000000000000000000",
        "train.trace=[1, 100000000000000000000]",
        "model.layers=1000000000",
        "model.dim=1000000000000",
        "model.mlp=[1000000000000]",
        "model.rank=[2, 9999999999]",
        "data.batch_size=1000000000000",
        "data.prefetch=1000000000000",
        "parallel.tensor=1000000000000",
        "parallel.towers=1000000000000",
        "schedule.step_every=1e-300",
        "train.faults.spike_window=1000000000000000",
        'tower_module={"name": "dlrm", "compression": 1e300}',
        "deepspeed.gradient_clipping=1e308",
        "deepspeed.gradient_accumulation_steps=1000000000000",
    ],
)
def test_a_number_out_of_range_is_one_line_with_its_key(run: Path, override: str) -> None:
    with pytest.raises(UserError) as error:
        config = load_config(run, [override])
        from megarec.config.deepspeed import micro_batch_size

        micro_batch_size(config, 1)  # looks at the accumulation
    key = override.partition("=")[0]
    assert key in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400


def config_of(**sections: Any) -> RunConfig:
    model = {"name": "wukong", "dim": 16, "layers": 1}
    return RunConfig.model_validate({"model": model, "data": {"path": "x", "batch_size": 64}, **sections})


def test_a_run_larger_than_the_machine_is_one_line_with_the_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fits, "memory_of", lambda device: 2**30)
    config, device = config_of(), torch.device("cpu")
    fits.check_fits(config, resolve(config, SCHEMA), ONE_RANK, device)
    # 2^26 rows x (16 columns x 4 bytes + 4 of the optimizer's row state + a flag)
    huge = SCHEMA.model_copy(update={"categorical": (CategoricalFeature(name="a", rows=2**26),)})
    with pytest.raises(
        UserError, match=r"need at least 4\.\d GiB = 4\.3 \(tables 67,108,864 rows\) \+ .* there are 1\.0 GiB"
    ):
        fits.check_fits(config, resolve(config, huge), ONE_RANK, device)
    wide = config_of(model={"name": "dnn", "dim": 16, "head": [2**20, 2**10]})
    with pytest.raises(UserError, match=r"\(dense 1,\d+,\d+,\d+ parameters\) .* there are 1\.0 GiB"):
        fits.check_fits(wide, resolve(wide, SCHEMA), ONE_RANK, device)
    many = config_of(data={"path": "x", "batch_size": 2**30})
    with pytest.raises(UserError, match=r"\(step 1,073,741,824 examples\)"):
        fits.check_fits(many, resolve(many, SCHEMA), ONE_RANK, device)


def test_the_bound_is_no_more_than_what_a_run_holds() -> None:
    """In fp32 at ZeRO 0 with Adam: weights and two moments."""
    config = config_of()
    spec = resolve(config, SCHEMA)
    assert fits.least_dense_bytes(config, spec, ONE_RANK, True) == 3 * 4 * spec.cost.dense_parameters
    assert fits.memory_of(torch.device("cpu")) > 2**28


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ({"train": {"output_dir": "FILE"}}, "train.output_dir"),
        ({"train": {"output_dir": "FILE/below/it"}}, "train.output_dir"),
        ({"train": {"output_dir": "/proc/megarec"}}, "train.output_dir"),
        ({"train": {"output_dir": "x" * 300}}, "train.output_dir"),
        ({"deepspeed": {"tensorboard": {"output_path": "FILE"}}}, "deepspeed.tensorboard.output_path"),
        ({"deepspeed": {"tensorboard": {"output_path": "/proc/a"}}}, "deepspeed.tensorboard.output_path"),
        (
            {"deepspeed": {"csv_monitor": {"enabled": True, "output_path": "/proc"}}},
            "deepspeed.csv_monitor.output_path",
        ),
        ({"deepspeed": {"csv_monitor": {"enabled": False, "output_path": "/proc"}}}, None),
        ({"deepspeed": {"tensorboard": {"enabled": False, "output_path": "/proc"}}}, None),
        ({"train": {"output_dir": "new/and/deep"}}, None),
    ],
)
def test_where_nothing_can_be_written_is_one_line(
    section: dict[str, Any], key: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("")
    config = config_of(**section)
    if key is None:
        check_outputs(config)
    else:
        with pytest.raises(UserError) as error:
            check_outputs(config)
        assert str(error.value).startswith(f"{key}=") and "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["FILE"]


def test_an_empty_output_dir_is_no_directory(run: Path) -> None:
    with pytest.raises(UserError, match=r"train\.output_dir=\"\": string should have at least 1 character"):
        load_config(run, ['train.output_dir=""'])


def test_a_model_of_a_million_layers_is_refused_before_any_is_made(run: Path) -> None:
    for words in (["model.layers=1000000"], ["model.layers=1000", f"model.mlp={[8] * 1_000}"]):
        with pytest.raises(UserError, match=r"run.json: model.*(less than or equal to 1000|1,000,000 linear layers)"):
            load_config(run, words)
    schema = Schema(name="x", categorical=tuple(CategoricalFeature(name=f"f{i}", rows=2) for i in range(200)), rows={})
    towers = ["parallel.towers=200", "tower_module.name=wukong", "tower_module.compression=2"]
    config = load_config(run, [*towers, f"tower_module.mlp={[8] * 1_000}"])
    with pytest.raises(UserError, match="tower_module: 1,000 layers in each of 200 towers; expected at most 100,000"):
        resolve(config, schema)
