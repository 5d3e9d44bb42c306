"""A model of numeric features alone: no table, and everything else as usual."""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import megarec
from megarec.checkpoint.offline import export
from megarec.commands import flops, partition_towers, placement
from megarec.config.load import load_config
from megarec.data.loader import EvalLoader
from megarec.data.schema import load_schema
from megarec.data.store import open_split
from megarec.distributed.rank_pool import RankPool
from megarec.parity.cases import Case
from megarec.parity.reference import reference_losses
from megarec.parity.run import compare
from tests.checkpoint.runs import leg, write_run

STEPS = 10


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One numeric feature of two in use; the label follows it."""
    directory = tmp_path_factory.mktemp("numbers")
    random = np.random.default_rng(1)
    for split in ("train", "valid", "test"):
        x = random.normal(size=(1_000, 2)).astype(np.float32)
        labels = (random.random(1_000) < 1 / (1 + np.exp(-3 * x[:, 0]))).astype(np.int8)
        (directory / "data" / split).mkdir(parents=True)
        table = pa.table({"x": x[:, 0], "z": x[:, 1], "label": labels})
        pq.write_table(table, directory / "data" / split / "000.parquet")
    schema = {"name": "numbers", "categorical": [], "numeric": ["x", "z"], "rows": {}}
    (directory / "data/schema.json").write_text(json.dumps(schema))
    section = {"gradient_clipping": 1.0, "zero_optimization": {"stage": 2}}
    return write_run(
        directory, directory / "data", deepspeed=section, model={"name": "wukong"}, train={"verify_replicas_every": 2}
    )


@pytest.mark.parametrize(("ranks", "stages"), [(1, (2,)), (2, (0, 1, 2, 3))])
def test_it_trains_the_same_on_any_topology(
    ranks: int, stages: tuple[int, ...], run: Path, rank_pool: Callable[[int], RankPool]
) -> None:
    reference = reference_losses(load_config(run), STEPS)
    assert reference[0] - reference[-1] > 0.01
    for stage in stages:
        case = Case(ranks, (), (f"deepspeed.zero_optimization.stage={stage}",))
        assert compare(case, run, rank_pool(ranks), reference).relative_deviation <= 1e-6, stage


@pytest.mark.parametrize("name", ["dlrm", "dcn", "lr", "fm", "finalmlp", "masknet"])
def test_other_models(name: str, run: Path, rank_pool: Callable[[int], RankPool], tmp_path: Path) -> None:
    raw = json.loads(run.read_text())
    path = tmp_path / "run.json"
    path.write_text(json.dumps(raw | {"model": {"name": name, "dim": 4, "numeric_embeddings": 2}}))
    losses = rank_pool(2).run(partial(leg, load=False, save=False), path, [], 0, 3)[0].losses
    assert np.isfinite(losses).all()


def test_it_is_saved_resumed_and_exported(run: Path, rank_pool: Callable[[int], RankPool], tmp_path: Path) -> None:
    out = [f"train.output_dir={tmp_path}"]
    whole = rank_pool(2).run(partial(leg, load=False, save=False), run, out, 0, 6)[0].losses
    rank_pool(2).run(partial(leg, load=False, save=True), run, out, 0, 3)
    again = rank_pool(2).run(partial(leg, load=True, save=False), run, out, 3, 6)[0].losses
    assert again == whole[3:]
    one = rank_pool(1).run(partial(leg, load=True, save=False, logits=True), run, out, 3, 6)[0]
    assert one.losses == pytest.approx(whole[3:], rel=1e-6)
    export(tmp_path / "checkpoints/step-000000003", tmp_path / "model")
    schema = load_schema(run.parent / "data")
    rows = EvalLoader(open_split(run.parent / "data", "test", schema, "error"), schema, batch_size=80, rank=0,
                      world_size=1, seed=1, prefetch=1, pin_memory=False)  # fmt: skip
    logits = megarec.load_model(tmp_path / "model").predict(next(iter(rows.batches())))
    expected = rank_pool(1).run(partial(leg, load=True, save=False, logits=True), run, out, 3, 3)[0].logits[0]
    assert logits.tolist() == expected


def test_tools_count_it(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["flops", "--config", str(run), "--json"])
    flops.main()
    assert json.loads(capsys.readouterr().out)["parameters"]["sparse"] == 0
    words = ["--roofline", "H200", "--set", "parallel.ranks_per_host=2", "--json"]
    monkeypatch.setattr(sys, "argv", ["flops", "--config", str(run), *words])
    flops.main()
    assert json.loads(capsys.readouterr().out)["roofline"]["parts"]["exchange links"]["bytes"] == 0
    monkeypatch.setattr(sys, "argv", ["placement", "--config", str(run), "--hosts", "2", "--ranks-per-host", "2"])
    placement.main()
    capsys.readouterr()
    towers = "parallel.towers=2: a tower is a group of categorical features, and the model has none; leave"
    for main, words in (
        (flops.main, ["--set", "parallel.towers=2"]),
        (partition_towers.main, ["--towers", "2", "--output", str(run.parent / "towers.json")]),
    ):
        monkeypatch.setattr(sys, "argv", ["tool", "--config", str(run), *words])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2 and capsys.readouterr().err.startswith(f"error: {towers}")
