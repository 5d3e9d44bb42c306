"""The recipe as a whole: shared tables, balance and its refusals, baselines, costs, what is written."""

import json
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megarec.config.load import load_config
from megarec.config.sections import RunConfig
from megarec.data.schema import CategoricalFeature, Schema, save_schema
from megarec.data.sources.synthetic import Shape, prepare_synthetic
from megarec.distributed.rank_pool import RankPool
from megarec.errors import UserError
from megarec.files import check_json_output
from megarec.planning.partition import probe
from megarec.planning.partition.partition import Requested, all_pooled, check_requested, inside_and_across, partition
from megarec.planning.partition.probe import probe_config
from megarec.planning.partition.report import write_partition
from megarec.run.cost import count_towers
from megarec.run.spec import resolve
from megarec.sparse.towers.assignment import assign_towers
from megarec.sparse.towers.sizes import resolve_towers
from megarec.training.trainer import train
from tests.processes import python

ROOT = Path(__file__).parents[3]
MODEL = {"layers": 1, "num_fm": 2, "num_lcb": 2, "rank": 4, "mlp": [16], "dim": 8, "head": [8]}
DCN_TOWER = 'tower_module={"name": "dcn", "compression": 2}'


def write_config(directory: Path, data: Path, **parallel: Any) -> Path:
    path = directory / "run.json"
    run = {
        "model": MODEL,
        "data": {"path": str(data), "batch_size": 100},
        "embedding": {"learning_rate": 0.1},
        "parallel": parallel,
        "train": {"epochs": 2, "output_dir": str(directory / "out")},
        "deepspeed": {"zero_optimization": {"stage": 2}, "tensorboard": {"enabled": True}},
    }
    path.write_text(json.dumps(run))
    return path


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """Twelve features f0 .. f11 without data; f7 uses the table of f2, f11 has ten times the rows."""
    features = tuple(
        CategoricalFeature(name=f"f{i}", rows=500 if i == 11 else 50, table="f2" if i == 7 else None) for i in range(12)
    )
    save_schema(Schema(name="test", categorical=features, rows={}), tmp_path)
    return load_config(write_config(tmp_path, tmp_path / "no-data"), [f"data.schema={tmp_path / 'schema.json'}"])


def planted(tmp_path: Path) -> Path:
    """Interactions in which the features with odd numbers, and those with even ones, are groups."""
    odd = np.arange(12) % 2
    found = np.where(odd[:, None] == odd, 0.6, 0.2)
    np.fill_diagonal(found, 1)
    path = tmp_path / "found.npy"
    np.save(path, found)
    return path


def with_modules(config: RunConfig, tmp_path: Path) -> RunConfig:
    path = tmp_path / "run.json"
    return load_config(path, [f"data.schema={tmp_path / 'schema.json'}", "parallel.towers=2", DCN_TOWER])


def test_coherent_finds_the_groups_and_keeps_shared_tables_together(config: RunConfig, tmp_path: Path) -> None:
    found = partition(config, Requested(2, interactions=planted(tmp_path)))
    even, odd = found.towers.features
    assert "f2" in even and "f7" in even  # f7 would belong to the others
    assert set(even) == {"f0", "f2", "f4", "f6", "f7", "f8", "f10"} and "f11" in odd
    assert found.picture is not None and found.picture.stress < 0.5
    inside, across = inside_and_across(found.picture.interactions, found.tower_of_features())
    assert inside > 0.5 and across < 0.3


def test_diverse_mixes_the_groups(config: RunConfig, tmp_path: Path) -> None:
    found = partition(config, Requested(2, strategy="diverse", interactions=planted(tmp_path)))
    odd = [sum(int(name[1:]) % 2 for name in names) for names in found.towers.features]
    assert min(odd) >= 2


def test_costs_are_counted_by_tower(config: RunConfig, tmp_path: Path) -> None:
    config = with_modules(config, tmp_path)
    found = partition(config, Requested(3, strategy="strided"))
    rows = {f"f{i}": 500 if i == 11 else 50 for i in range(12) if i != 7}
    per_row = 8 * 4 + 4 + 1  # weights, row-wise Adagrad, the flag of touched rows
    expected = [sum(rows.get(name, 0) for name in names) * per_row for names in found.towers.features]
    assert found.cost["bytes"] == expected
    assert found.cost["lookups"] == [len(names) for names in found.towers.features]
    lists = config.parallel.model_copy(update={"towers": [list(names) for names in found.towers.features]})
    modules = resolve_towers(config.model_copy(update={"parallel": lists}), found.layout).modules
    assert modules is not None
    counted = count_towers(modules)
    assert found.cost["flop"] == [counted[f"towers.{t}"].flop for t in range(3)]


def test_balance_holds_for_every_kind_of_cost(config: RunConfig, tmp_path: Path) -> None:
    config = with_modules(config, tmp_path)
    for towers, balance in ((2, 1.3), (3, 2.0), (4, 2.3)):
        cost = partition(config, Requested(towers, balance=balance, interactions=planted(tmp_path))).cost
        for costs in cost.values():
            assert max(costs) <= balance * sum(costs) / towers * (1 + 1e-9)


def test_too_tight_a_balance_names_the_feature_and_a_balance_that_works(config: RunConfig, tmp_path: Path) -> None:
    path = planted(tmp_path)
    with pytest.raises(UserError) as caught:
        partition(config, Requested(4, balance=1.1, interactions=path))
    assert "f11 alone has 18,500 of 37,000 bytes, 2 x the mean of 4 towers (37,000 / 4 = 9,250)" in str(caught.value)
    assert "give --balance 2 or more" in str(caught.value)
    with pytest.raises(UserError, match="no assignment of 11 tables to 2 towers was found") as caught:
        partition(config, Requested(2, balance=1.0001, interactions=path))
    balance = float(str(caught.value).split("give --balance ")[1].split(" or more")[0])
    costs = partition(config, Requested(2, balance=balance, interactions=path)).cost
    assert all(max(of) <= balance * sum(of) / 2 * (1 + 1e-9) for of in costs.values())


def test_without_a_balance_coarse_features_get_the_room_they_need(config: RunConfig, tmp_path: Path) -> None:
    found = partition(config, Requested(4, interactions=planted(tmp_path)))
    reason = next(line for line in found.reasons if line.startswith("balance"))
    assert "bytes 2.42 (the most even assignment reaches 2.2), lookups 1.1" in reason
    assert max(found.cost["bytes"]) <= 2.42 * 37_000 / 4 + 1
    assert max(found.cost["lookups"]) <= 1.1 * 12 / 4


@pytest.mark.parametrize(
    ("towers", "strategy", "room", "expected"),
    [
        (4, "coherent", 18_000, "table 'f11' alone takes"),
        (2, "coherent", 18_499, "table 'f11' alone takes"),
        (2, "greedy", 18_500 - 1, "table 'f11' alone takes"),
        (1, "coherent", 30_000, "all tables take"),
        (2, "strided", 19_000, "the tables of tower"),
    ],
)
def test_tables_must_fit_into_a_host(
    config: RunConfig, tmp_path: Path, towers: int, strategy: str, room: float, expected: str
) -> None:
    requested = Requested(towers, strategy, host_memory_gib=room / 2**30, interactions=planted(tmp_path))
    with pytest.raises(UserError, match="--host-memory-gib") as caught:
        partition(config, requested)
    assert expected in str(caught.value)


def test_memory_limits_the_towers(config: RunConfig, tmp_path: Path) -> None:
    found = partition(config, Requested(2, host_memory_gib=18_600 / 2**30, interactions=planted(tmp_path)))
    assert max(found.cost["bytes"]) <= 18_600


@pytest.mark.parametrize("strategy", ["strided", "greedy", "random"])
def test_baselines_need_neither_probe_nor_data(config: RunConfig, strategy: str) -> None:
    found = partition(config, Requested(3, strategy))
    assert sorted(name for names in found.towers.features for name in names) == sorted(f"f{i}" for i in range(12))
    assert next("f7" in names for names in found.towers.features if "f2" in names)
    assert found.picture is None and len(found.towers) == 3
    again = partition(config, Requested(3, strategy))
    assert again.towers == found.towers


@pytest.mark.parametrize(
    ("requested", "expected"),
    [
        (Requested(2, "coherant"), "--strategy coherant: no such strategy; did you mean 'coherent'?"),
        (Requested(0), "--towers 0: expected at least 1"),
        (Requested(2, balance=0.9), "--balance 0.9: expected at least 1"),
        (Requested(2, balance=float("nan")), "--balance nan: expected at least 1"),
        (Requested(2, "greedy", balance=1.1), "--balance goes with coherent and diverse"),
        (Requested(2, host_memory_gib=0), "--host-memory-gib 0: expected more than 0"),
        (Requested(2, probe_steps=0), "--probe-steps 0: expected at least 1"),
        (Requested(2, probe_steps=5, interactions=Path("x.npy")), "there is no probe with --interactions"),
        (Requested(2, "random", probe_steps=5), "there is no probe with --strategy random"),
        (Requested(2, "random", measure="cosine"), "--measure: there is no probe with --strategy random"),
        (Requested(2, measure="cosin"), "--measure cosin: no such measure"),
    ],
)
def test_wishes_that_mean_nothing(requested: Requested, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        check_requested(requested)
    assert expected in str(caught.value)


def test_more_towers_than_tables_and_missing_data(config: RunConfig) -> None:
    with pytest.raises(UserError, match="12 categorical features with 11 tables fill at most 11 towers"):
        partition(config, Requested(12, "greedy"))
    with pytest.raises(UserError, match=r"no-data.*does not exist: prepare the data first"):
        partition(config, Requested(2))


@pytest.mark.parametrize(
    ("loss", "found", "said"),
    [
        (
            float("nan"),
            np.eye(2),
            "probe: the loss of its last step is nan (step 9, dcn): it diverged; take lower rates",
        ),
        (0.5, np.full((2, 2), np.inf), "probe: interactions are not finite numbers: the model, whose last loss is 0.5"),
    ],
)
def test_a_probe_that_diverges_is_told(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, loss: float, found: np.ndarray, said: str
) -> None:
    monkeypatch.setattr(probe, "load_schema", lambda path: None)
    monkeypatch.setattr(probe, "start_process", lambda config: None)
    monkeypatch.setattr(probe, "build_run", lambda *arguments: SimpleNamespace(schedule=SimpleNamespace(total_steps=9)))
    monkeypatch.setattr(probe, "_train", lambda *arguments: loss)
    monkeypatch.setattr(probe, "_differences", lambda run: (found, 10))
    with pytest.raises(UserError, match=re.escape(said)):
        probe.probe(config, 9, "difference", lambda line: None)


def test_a_probe_is_of_the_flat_model_on_one_rank(config: RunConfig, tmp_path: Path) -> None:
    config = with_modules(config, tmp_path)
    parallel = config.parallel.model_copy(update={"tensor": 4, "ranks_per_host": 8, "exchange": "tower"})
    section = {**config.deepspeed, "train_micro_batch_size_per_gpu": 3}
    asked = config.model_copy(update={"parallel": parallel, "deepspeed": section})
    small = probe_config(asked, 7, "difference")
    assert (small.model.name, small.model.dim, small.deepspeed) == ("dcn", config.model.dim, {})
    found = probe_config(asked, 7, "cosine")
    assert found.model == config.model
    assert (found.parallel.tensor, found.parallel.exchange, found.parallel.towers) == (1, "flat", None)
    assert found.tower_module.name == "identity"
    assert (found.train.epochs, found.train.max_steps) == (1, 7)
    assert set(found.deepspeed) == {"zero_optimization"}


def test_outputs_are_whole_or_not_there(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, expected in (("towers.txt", "expected the name of a JSON file"), ("dir.json", "is a directory")):
        (tmp_path / "dir.json").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=expected):
            check_json_output("--output", tmp_path / name, "towers.json")
    output = tmp_path / "new" / "towers.json"
    check_json_output("--output", output, "towers.json")
    found = partition(config, Requested(2, "greedy"))
    assert write_partition(found, output, tmp_path / "board") == [output]
    before = output.read_text()

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(UserError, match="cannot be written"):
        write_partition(found, output, tmp_path / "board")
    assert output.read_text() == before and [path.name for path in output.parent.iterdir()] == ["towers.json"]


def train_briefly(path: Path, overrides: list[str]) -> dict[str, Any]:
    return train(load_config(path, overrides), resume=False, started=time.time())


def tool(*arguments: str | Path, real: bool = False) -> "subprocess.CompletedProcess[str]":
    return python(ROOT / "tools/partition_towers.py", *arguments, real=real)


def test_the_tool_from_training_data_to_a_run(tmp_path: Path, rank_pool: Callable[[int], RankPool]) -> None:
    prepare_synthetic(Shape(examples=1_000, single=5, multi=2), tmp_path / "data")
    # Both files name a towers.json that does not exist yet.
    run = write_config(tmp_path, tmp_path / "data", exchange="tower", towers="towers.json", ranks_per_host=1)
    output = tmp_path / "towers.json"
    done = tool("--config", run, "--towers", "2", "--output", output, "--probe-steps", "5", "--json")
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    written = json.loads(output.read_text())
    assert printed["towers"] == written["towers"] and printed["cost"] == written["cost"]
    assert "5 steps of 100 training examples" in printed["choices"][0]
    assert sum(written["cost"]["lookups"]) == pytest.approx(5 + 2 * 2.5, abs=0.3)  # lists of 0 to 5 ids
    together = next(names for names in written["towers"] if "single_0" in names)
    assert "multi_0" in together  # they share a table
    assert {path.name for path in tmp_path.iterdir()} == {
        "data", "run.json", "out", "towers.json", "towers.png", "towers-matrix.png", "towers-interactions.npy",
    }  # fmt: skip
    assert (tmp_path / "towers.png").read_bytes().startswith(b"\x89PNG")
    assert np.load(tmp_path / "towers-interactions.npy").shape == (7, 7)
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    assert events.Tags()["images"] == ["towers/coherent/plane", "towers/coherent/interactions"]

    metrics = rank_pool(2).run(train_briefly, run, ["train.max_steps=2"])
    assert metrics[0]["train"]["steps"] == 2
    assert load_config(tmp_path / "out/config.json").parallel.towers == written["towers"]


def test_mistakes_exit_with_one_line(tmp_path: Path) -> None:
    run = write_config(tmp_path, tmp_path / "nowhere")
    done = tool("--config", run, "--towers", "2", "--output", tmp_path / "towers.json", "--json", real=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "nowhere" in done.stderr
    assert not (tmp_path / "towers.json").exists()


def test_sequences_lie_with_the_table_of_their_target() -> None:
    features = [CategoricalFeature(name=name, rows=9) for name in ("item", "user", "hour")]
    features.append(CategoricalFeature(name="seen", rows=9, multi_valued=True, newest="last"))
    schema = Schema(name="s", label_rule="", categorical=tuple(features), rows={}, source="made up")
    entry = {"features": ["seen"], "target": ["item"], "block": "din", "tables": "target"}
    config = RunConfig.model_validate({"model": {"name": "dnn", "dim": 4, "sequences": [entry]}, "data": {"path": "-"}})
    pooled, shared = all_pooled(config, schema)
    assert not pooled.model.sequences and [f.table for f in shared.categorical] == [None, None, None, "item"]
    towers = assign_towers(resolve(pooled, shared).layout, 3).features
    assert (
        towers == assign_towers(resolve(config, schema).layout, 3).features == (("item", "seen"), ("user",), ("hour",))
    )
