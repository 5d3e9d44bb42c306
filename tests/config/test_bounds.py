"""Every number of a config has a range; what a run needs is compared with the machine; outputs are looked at first."""

import json
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import annotated_types
import pytest
import torch
from pydantic import BaseModel

from megarec.config.base import Section
from megarec.config.load import load_config
from megarec.config.sections import RunConfig
from megarec.data.schema import CategoricalFeature, Schema, Split
from megarec.distributed.topology import ONE_RANK, Topology
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
        "train.trace=[1, 1000000000]",
        "train.trace=[5, 4]",
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


CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
EVERYWHERE = {"placement": "replicated"}  # any number of ranks has a part of one table
EXAMPLES: dict[Split, int] = {"train": 10**6, "valid": 1_000, "test": 1_000}


def refused(
    config: RunConfig, schema: Schema = SCHEMA, topology: Topology = ONE_RANK, device: torch.device = CPU, **more: int
) -> str | None:
    """What check_fits says; None: it fits."""
    examples = EXAMPLES | more
    try:
        fits.check_fits(config, resolve(config, schema), topology, device, examples)  # type: ignore[arg-type]
    except UserError as error:
        return str(error)
    return None


LARGER = [  # what a machine of 1 GiB lacks
    # 2^26 rows x (16 columns x 4 bytes + 4 of the optimizer's row state + a flag)
    ({}, {"rows": 2**26}, r"at least 4\.\d GiB = 4\.3 \(tables 67,108,864 rows\) \+ .* there are 1\.0 GiB"),
    ({"model": {"name": "dnn", "dim": 16, "head": [2**20, 2**10]}}, {}, r"\(dense 1,\d+,\d+,\d+ parameters\)"),
    ({"data": {"path": "x", "batch_size": 2**29}}, {"train": 2**30}, r"\(step 536,870,912 examples\)"),
    # 2^18 examples x 3 x 4 KiB of hidden units, though the embeddings are few
    (
        {"model": {"name": "dnn", "dim": 4, "head": [2**10] * 3}, "data": {"path": "x", "batch_size": 2**18}},
        {},
        r" [3-9]\.\d \(step 262,144 examples\)",
    ),
    # 2 x 4 bytes a prediction, and all of them once more where they are gathered
    (
        {"train": {"log_every": 10**12, "epochs": 10_000}},
        {},
        r"149\.0 \(predictions of train\.log_every 156,250,000 steps",
    ),
    ({}, {"valid": 10**9}, r"14\.9 \(predictions of valid split\)"),
    # 65,536 rows x 20 bytes a batch
    (
        {"data": {"path": "x", "batch_size": 2**16, "prefetch": 10_000}},
        {"train": 2**32},
        r"12\.2 \(data\.prefetch 10,000 batches\)",
    ),
    (
        {"deepspeed": {"zero_optimization": {"stage": 2, "reduce_bucket_size": 10**12}}},
        {},
        r"3,725\.3 \(reduce_bucket_size\)",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("sections", "larger", "message"), LARGER)
def test_a_run_larger_than_the_machine_is_one_line_with_the_arithmetic(
    sections: dict[str, Any], larger: dict[str, int], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fits, "memory_of", lambda device: 2**30)
    assert refused(config_of()) is None
    rows = larger.pop("rows", 1_000) if "rows" in larger else 1_000
    schema = SCHEMA.model_copy(update={"categorical": (CategoricalFeature(name="a", rows=rows),)})
    line = refused(config_of(**sections), schema, **larger)
    assert line is not None and line.startswith("this machine must have at least ") and "\n" not in line
    assert re.search(message, line), line


def test_the_bound_is_no_more_than_what_a_run_holds() -> None:
    """In fp32 at ZeRO 0 with Adam: weights and two moments."""
    config = config_of()
    spec = resolve(config, SCHEMA)
    assert fits.least_dense_bytes(config, spec, ONE_RANK, True) == 3 * 4 * spec.cost.dense_parameters
    assert fits.memory_of(CPU) > 2**28


def test_a_rank_has_the_tower_modules_of_its_host_alone() -> None:
    schema = Schema(name="x", categorical=tuple(CategoricalFeature(name=n, rows=9) for n in "abcd"), rows={})
    towers = {"parallel": {"towers": 2, "exchange": "tower"}, "tower_module": {"name": "dcn", "compression": 1}}
    config = config_of(model={"name": "dlrm", "dim": 64}, **towers)
    spec = resolve(config, schema)
    modules = sum(part.parameters for part in spec.cost.layers["towers"].values())
    assert modules > 1_000
    assert fits.least_dense_bytes(config, spec, ONE_RANK, True) == 12 * (spec.cost.dense_parameters - modules)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs of 1 and 4 GiB in a machine of 2 GiB, on which 2 of 4 ranks run."""
    sizes = {0: 2**30, 1: 2**32}
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=sizes[device.index])
    )
    of_gpu = fits.memory_of
    monkeypatch.setattr(fits, "memory_of", lambda device: 2**31 if device.type == "cpu" else of_gpu(device))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")


@pytest.mark.usefixtures("gpus")
def test_a_gpu_holds_what_its_own_rank_needs() -> None:
    """Tables of 16 columns are 68 bytes a row; rank 0 has one of two tables."""
    two = Schema(name="x", categorical=tuple(CategoricalFeature(name=n, rows=2**24) for n in "ab"), rows={})
    config, small, large = config_of(), GPU, torch.device("cuda", 1)
    alone = refused(config, two, ONE_RANK, small)
    assert alone is not None and alone.startswith("this rank's GPU must have at least 2.") and "are 1.0 GiB" in alone
    assert refused(config, two, ONE_RANK, large) is None
    ranks = [Topology(rank, 4, 2, 1) for rank in range(2)]
    placed = config_of(embedding={"placement": "auto"})
    assert [refused(placed, two, topology, GPU) for topology in ranks] == [None, None]
    one_each = config_of(embedding={"tables": {"a": {"placement": "table"}, "b": {"placement": "replicated"}}})
    assert refused(one_each, two, ranks[0], small) is not None
    assert refused(one_each, two, ranks[0], large) is None


@pytest.mark.usefixtures("gpus")
def test_what_gpu_ranks_hold_in_the_machines_memory_is_that_of_all_of_them() -> None:
    """2^26 dense parameters: 256 MiB of weights on the GPU; two moments of 512 MiB a rank at ZeRO 0, or a share."""
    offload = {"stage": 2, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 1_000_000}
    wide = {"model": {"name": "dnn", "dim": 16, "head": [2**13, 2**13]}, "data": {"path": "x", "batch_size": 64}}
    wide["embedding"] = EVERYWHERE
    config = config_of(**wide, deepspeed={"zero_optimization": offload})
    assert refused(config, topology=Topology(1, 4, 2, 1), device=GPU) is None  # 2 x 128 MiB of states
    assert refused(config, topology=Topology(1, 2, 2, 1), device=GPU) is None  # 2 x 256 MiB
    fourfold = config_of(**wide | {"model": {"name": "dnn", "dim": 16, "head": [2**14, 2**14]}},
                         deepspeed={"zero_optimization": offload, "bf16": {"enabled": True}})  # fmt: skip
    line = refused(fourfold, topology=Topology(1, 2, 2, 1), device=torch.device("cuda", 1))
    assert line is not None and line.startswith("this machine, for its 2 ranks, must have at least 3.0 GiB = 0.0 (data")
    assert "3.0 (offloaded optimizer states)" in line and "there are 2.0 GiB" in line
    bucket = config_of(embedding=EVERYWHERE, deepspeed={"zero_optimization": {"stage": 2, "reduce_bucket_size": 5e8}})
    line = refused(bucket, topology=Topology(1, 4, 2, 1), device=GPU)
    assert line is not None and "1.9 (reduce_bucket_size)" in line and "there are 1.0 GiB" in line


def test_more_threads_than_the_machine_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "pids.max"
    monkeypatch.setattr(fits, "_THREAD_LIMITS", (str(limit), str(tmp_path / "none")))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    config = config_of(train={"threads": 1_024}, embedding=EVERYWHERE)
    for text, expected in [("max", None), ("9000", None), ("4096", f"8,192 threads, and {limit} allows 4,096; leave")]:
        limit.write_text(f"{text}\n")
        line = refused(config, topology=Topology(0, 8, 8, 1))
        assert (line is None) if expected is None else (line is not None and expected in line)
    assert refused(config_of(embedding=EVERYWHERE), topology=Topology(0, 8, 8, 1)) is None


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
