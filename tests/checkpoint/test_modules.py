"""Tower modules of a checkpoint: loaded where they fit, refused where they do not, reset on request."""

import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megarec.checkpoint.format import sealed
from megarec.distributed.rank_pool import RankPool
from megarec.errors import UserError
from megarec.run.build import Run
from megarec.run.state import TrainState
from tests.checkpoint.runs import TOWER_MODULE, TOWERS, build, leg, store, train_steps, write_run
from tests.logged import logged_lines

Pools = Callable[[int], RankPool]

SWAPPED = [[TOWERS[0][0], TOWERS[1][0], TOWERS[0][2]], [TOWERS[0][1], *TOWERS[1][1:]]]
RESET = ["train.reset_towers=true"]
FLAT: list[str] = []
TOWER = ["parallel.exchange=tower", "parallel.ranks_per_host=1"]


def run_of(directory: Path, data: Path, towers: list[list[str]], **module: Any) -> Path:
    tower_module = {**TOWER_MODULE, "optimizer": "adamw", "learning_rate": 0.01, **module}
    return write_run(directory, data, parallel={"towers": towers}, tower_module=tower_module)


def copies(run: Run) -> dict[str, Tensor]:
    assert run.sparse.modules is not None
    return {name: tensor.clone() for name, tensor in run.sparse.modules.state_dict().items()}


def same(run: Run, state: dict[str, Tensor]) -> bool:
    now = copies(run)
    return now.keys() == state.keys() and all(torch.equal(now[name], tensor) for name, tensor in state.items())


def reset_once(path: Path, overrides: list[str]) -> tuple[dict[str, bool], list[str]]:
    """A run that has set its modules from scratch meets the checkpoint of the old ones again, then its own."""
    run, logged, found = build(path, overrides), logged_lines(), dict[str, bool]()
    checkpoints, first = store(run), copies(run)
    position = checkpoints.load(1)
    found["first load: from scratch"] = same(run, first)
    found["first load: no best yet"] = math.isinf(position.best) and position.best_by is None
    train_steps(run, 1, 2)
    found["a step changes them"] = not same(run, first)
    checkpoints.load(1)
    found["rolled back to the old modules: from scratch"] = same(run, first)

    train_steps(run, 1, 2)
    kept = copies(run)
    checkpoints.save(TrainState(step=2, best=0.4, best_by="logloss"), best=True)
    checkpoints.wait()
    train_steps(run, 2, 3)
    found["best: kept"] = checkpoints.load_best() == 2 and same(run, kept)
    train_steps(run, 2, 3)
    back = checkpoints.resume()
    found["rolled back to their own: kept"] = back is not None and back[0].best == 0.4 and same(run, kept)

    restarted = build(path, overrides)
    store(restarted).resume()
    found["restarted: kept"] = same(restarted, kept)
    return found, logged


@pytest.mark.parametrize("exchange", [pytest.param(FLAT, marks=pytest.mark.slow), TOWER], ids=["flat", "tower"])
@pytest.mark.parametrize("other", ["towers", "sizes", "none before"])
def test_modules_start_from_scratch_only_where_the_checkpoint_has_none_that_fit(
    rank_pool: Pools, data: Path, tmp_path: Path, exchange: list[str], other: str
) -> None:
    path = run_of(tmp_path, data, TOWERS)
    rank_pool(2).run(partial(leg, load=False, save=True), path, exchange, 0, 1)
    if other == "towers":
        path = run_of(tmp_path, data, SWAPPED)
    elif other == "sizes":
        path = run_of(tmp_path, data, TOWERS, mlp=[4])
    else:
        without_modules(tmp_path / "out/checkpoints/step-000000001")
    found = rank_pool(2).run(reset_once, path, [*RESET, *exchange])
    for rank, (facts, _) in enumerate(found):
        assert all(facts.values()), (rank, facts)
    from_scratch, again, *later = found[0][1]
    assert from_scratch == again and "tower modules start from scratch" in from_scratch
    assert len(later) == 3 and all("nothing to do" in line for line in later)


def edited(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = directory / "index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_bytes(sealed(index))


def without_modules(directory: Path) -> None:
    def change(index: dict[str, Any]) -> None:
        index["tensors"] = {name: entry for name, entry in index["tensors"].items() if not name.startswith("tower/")}

    edited(directory, change)


def load_error(path: Path, overrides: list[str], step: int) -> str:
    try:
        store(build(path, overrides)).load(step)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("there", "here"), [("adamw", "sgd"), ("sgd", "adamw")])
@pytest.mark.parametrize("reset", [FLAT, RESET], ids=["", "reset_towers"])
def test_another_optimizer_is_refused(
    rank_pool: Pools, data: Path, tmp_path: Path, there: str, here: str, reset: list[str]
) -> None:
    path = run_of(tmp_path, data, TOWERS, optimizer=there)
    rank_pool(2).run(partial(leg, load=False, save=True), path, [], 0, 1)
    path = run_of(tmp_path, data, TOWERS, optimizer=here)
    for message in rank_pool(2).run(load_error, path, reset, 1):
        assert f"the optimizer of the tower modules was {there}, this run's is {here}; resume with" in message
        assert message.startswith(str(tmp_path / "out/checkpoints/step-000000001")) and "\n" not in message


def test_an_optimizer_that_has_not_stepped_has_no_states(rank_pool: Pools, data: Path, tmp_path: Path) -> None:
    path = run_of(tmp_path, data, TOWERS)
    rank_pool(2).run(partial(leg, load=False, save=True), path, [], 0, 0)
    assert rank_pool(2).run(load_error, path, [], 0) == ["", ""]


@pytest.fixture(scope="module")
def stepped(rank_pool: Pools, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that saved after its first step."""
    directory = tmp_path_factory.mktemp("stepped")
    rank_pool(2).run(partial(leg, load=False, save=True), run_of(directory, data, TOWERS), [], 0, 1)
    return directory


Tensors = dict[str, Any]


def smallest(tensors: Tensors) -> str:
    """The smallest parameter of the modules."""
    names = [name for name in tensors if name.startswith("tower/") and f"{name}/exp_avg" in tensors]
    return min(names, key=lambda name: math.prod(tensors[name]["shape"]))


def taken(tensors: Tensors) -> Any:
    """The largest tensor of the dense side, no longer there: two tensors of the same numbers are refused before."""
    sizes = {name: math.prod(entry["shape"]) for name, entry in tensors.items() if name.startswith("dense/")}
    return tensors.pop(max(sizes, key=sizes.__getitem__))


def another_state(tensors: Tensors) -> None:
    tensors[f"{smallest(tensors)}/more"] = taken(tensors)


def larger_state(tensors: Tensors) -> None:
    tensors[f"{smallest(tensors)}/exp_avg"] = taken(tensors)


def whole_step(tensors: Tensors) -> None:
    tensors[f"{smallest(tensors)}/step"] = taken(tensors)


def no_step(tensors: Tensors) -> None:
    del tensors[f"{smallest(tensors)}/step"]


def another_parameter(tensors: Tensors) -> None:
    tensors["tower/towers.7.weight"] = taken(tensors)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (another_state, "/more is there, but not in this run"),
        (larger_state, "/exp_avg is ["),
        (whole_step, "] there, [] in this run"),
        (no_step, "/step is not there"),
        (another_parameter, "tower/towers.7.weight is there, but not in this run"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_states_have_the_names_and_sizes_of_the_runs_own(
    rank_pool: Pools, data: Path, tmp_path: Path, stepped: Path, spoil: Callable[[Tensors], None], reason: str
) -> None:
    shutil.copytree(stepped / "out", tmp_path / "out")
    edited(tmp_path / "out/checkpoints/step-000000001", lambda index: spoil(index["tensors"]))
    for exchange in (FLAT, TOWER):
        for message in rank_pool(2).run(load_error, run_of(tmp_path, data, TOWERS), exchange, 1):
            assert reason in message and "\n" not in message


def test_without_its_optimizers_name_the_states_decide(
    rank_pool: Pools, data: Path, tmp_path: Path, stepped: Path
) -> None:
    """An earlier version did not write the name."""
    shutil.copytree(stepped / "out", tmp_path / "out")
    edited(tmp_path / "out/checkpoints/step-000000001", lambda index: index.pop("tower_optimizer"))
    path = run_of(tmp_path, data, TOWERS, optimizer="sgd")
    for message in rank_pool(2).run(load_error, path, [], 1):
        assert "is there, but not in this run (tower_module.optimizer: 'adamw' there, 'sgd' here)" in message
    assert rank_pool(2).run(load_error, run_of(tmp_path, data, TOWERS), [], 1) == ["", ""]
