"""A search at equal effort: draws, budgets, kills, workers, lost trials, the table, and what is refused."""

import json
import random
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from megarec.commands.search import check_options
from megarec.config.load import load_config
from megarec.errors import UserError
from megarec.scaling.grid import Trial
from megarec.scaling.results import DIVERGED, Rows, lost_row, row_of
from megarec.scaling.search import read_search
from megarec.scaling.search_report import config_of
from megarec.scaling.space import draw, read_settings
from tests.scaling.studies import WUKONG, write_study
from tests.scaling.test_sweep import ROOT, finish, run_here, start, starts

FAMILIES = {
    "wukong": {"model": WUKONG, "model.layers": {"int": [1, 3]}, "model.dropout": {"choice": [0.0, 0.1]}},
    "dnn": {"model": {"name": "dnn", "dim": 4}, "model.head": {"choice": [[8], [8, 8]]}},
}
SHARED = {"dense.learning_rate": {"log_uniform": [1e-3, 1e-1]}, "embedding.l2": {"uniform": [0.0, 0.1]}}


def write_search(directory: Path, **sections: Any) -> Path:
    """A search over the tiny study's data: two families, four trials each, two seeds."""
    base = write_study(directory).with_name("base.json")
    search = {"base": base.name, "budget": {"trials": 4}, "seeds": [1, 2], "shared": SHARED, "families": FAMILIES}
    path = directory / "search.json"
    path.write_text(json.dumps(search | sections))
    return path


def report(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "search.json").read_text())
    return found


def draws(path: Path) -> list[Trial]:
    return [trial for trial in read_search(path).trials()[0] if trial.tuning]


def rows_of(output: Path) -> list[dict[str, Any]]:
    columns = ["model", "seed", "rate", "config_hash", "status", "logloss", "valid_logloss", "chosen"]
    return parquet.read_table(output / "runs.parquet", columns=columns).to_pylist()


@pytest.fixture(autouse=True)
def _no_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer that stands in here leaves nothing that could be scored again."""
    monkeypatch.setattr("megarec.commands.search.open_model", _nothing_to_open)


def _nothing_to_open(*arguments: object) -> None:
    raise UserError("no model")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """A search and where an unbroken sweep has run it."""
    directory = tmp_path_factory.mktemp("search")
    path = write_search(directory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megarec.commands.search.open_model", _nothing_to_open)
        run_here(path, directory / "out", "--jobs", "2")
        yield path, directory / "out"


def test_draws_follow_from_seed_key_and_number_alone() -> None:
    settings = read_settings(SHARED | {"n": {"int": [1, 3]}, "c": {"choice": ["a", "b"]}, "f": 7}, "x")
    drawn = [draw(settings, 1, number) for number in range(300)]
    values = {key: [settings[key].value(each[key]) for each in drawn] for key in settings}
    assert set(values["n"]) == {1, 2, 3} and set(values["c"]) == {"a", "b"} and set(values["f"]) == {7}
    assert all(1e-3 <= rate <= 1e-1 for rate in values["dense.learning_rate"])
    assert 0.4 < sum(rate < 1e-2 for rate in values["dense.learning_rate"]) / 300 < 0.6
    assert [draw(read_settings({"n": {"int": [1, 3]}}, "x"), 1, number)["n"] for number in range(300)] == values["n"]
    assert drawn[0]["dense.learning_rate"] == 0.03778  # on every machine, with every version of every library
    assert [draw(settings, 2, number) for number in range(300)] != drawn


def test_the_test_split_is_read_for_what_validation_chose_alone(whole: tuple[Path, Path]) -> None:
    _, output = whole
    rows, found = rows_of(output), report(output)
    assert len(rows) == 2 * (4 + 2) and set(starts(output).values()) == {1}
    for family in FAMILIES:
        own = [row for row in rows if row["model"] == family]
        tried, tested = [row for row in own if not row["chosen"]], [row for row in own if row["chosen"]]
        best = min(tried, key=lambda row: row["valid_logloss"])
        assert len(tried) == 4 and all(row["logloss"] is None for row in tried)
        assert [(row["rate"], row["seed"]) for row in tested] == [(best["rate"], 1), (best["rate"], 2)]
        of = found["families"][family]
        assert of["trials"] == {"drawn": 4, "done": 4, "diverged": 0, "failed": 0}
        assert (of["chosen"]["draw"], of["seeds"]) == (best["rate"], [1, 2])
        assert of["gflop"]["spent"] == pytest.approx(of["gflop"]["planned"]) and of["steps"]["spent"] == 4 * 8
        losses = [row["logloss"] for row in tested]
        low, high = of["test"]["logloss"]["interval"]
        assert of["test"]["logloss"]["mean"] == pytest.approx(sum(losses) / 2)
        assert high - low == pytest.approx(2 * 12.7062047 * abs(losses[0] - losses[1]) / 2)  # Student's t, one degree
    (difference,) = found["differences"].values()
    mine, theirs = (found["families"][family]["test"]["auc"]["mean"] for family in FAMILIES)
    assert difference["auc"]["mean"] == pytest.approx(mine - theirs)
    text = (output / "search.md").read_text()
    assert "Each family: 4 trials (random, seed 1)" in text and "| wukong | 4 (0, 0) |" in text


def test_what_was_chosen_is_a_config_of_its_own(whole: tuple[Path, Path]) -> None:
    path, output = whole
    for trial in read_search(path).trials()[0]:
        of = report(output)["families"][trial.model]["chosen"]
        if not trial.tuning and trial.seed == 1 and trial.rate == of["draw"]:
            config = load_config(Path(of["config"]))
            expected = trial.config.model_dump()
            expected["train"]["output_dir"] = f"runs/search-{trial.model}"
            assert config.model_dump() == expected and trial.config.train.test
            assert config_of(trial, "runs/x").count(b"\n") < 12


@pytest.mark.slow  # as a killed sweep
def test_a_killed_search_goes_on_and_gives_the_same_table(whole: tuple[Path, Path], tmp_path: Path) -> None:
    path, unbroken = whole
    broken, moment = tmp_path / "broken", random.Random(1)
    sweep = start(path, broken, "--jobs", "3")
    while len(list(broken.glob("rows/*.json"))) < 4:
        assert sweep.poll() is None, sweep.communicate()
        time.sleep(0.01)
    time.sleep(moment.uniform(0, 0.1))
    sweep.kill()
    sweep.communicate()
    run_here(path, broken)
    assert rows_of(broken) == rows_of(unbroken)
    assert {**report(broken), "families": None} == {**report(unbroken), "families": None}
    first, second = (report(output)["families"] for output in (broken, unbroken))
    for family in FAMILIES:
        first[family]["chosen"].pop("config"), second[family]["chosen"].pop("config")
    assert first == second


@pytest.mark.slow  # as shares of a sweep
def test_shares_of_an_array_give_the_same_table(
    whole: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, unbroken = whole
    for number in ("1/2", "2/2", "1/2", "2/2"):
        run_here(path, tmp_path / "out", "--array", number, pace=False)
    run_here(path, tmp_path / "out")
    assert "| wukong | 4 (0, 0) |" in capsys.readouterr().out
    assert rows_of(tmp_path / "out") == rows_of(unbroken)


def test_lost_trials_are_counted_and_never_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One fails twice and one diverges: each has had its turn, and the search ends."""
    dropout = {"choice": [0.0, 0.1, 0.2, 0.3, 0.85, 0.95]}
    families = {"wukong": {"model": WUKONG, "model.dropout": dropout}}
    path = write_search(tmp_path, families=families, shared={}, budget={"trials": 6})
    run_here(path, tmp_path / "out", "--jobs", "2")
    found = report(tmp_path / "out")["families"]["wukong"]
    assert found["trials"] == {"drawn": 6, "done": 4, "diverged": 1, "failed": 1}
    assert found["chosen"]["settings"]["model.dropout"] < 0.5 and found["seeds"] == [1, 2]
    assert found["steps"]["spent"] == 4 * 8 + 3 + 8  # a failed one may have made all of its steps
    assert sorted(starts(tmp_path / "out").values()) == [1] * 7 + [2]
    assert "| wukong | 6 (1, 1) |" in capsys.readouterr().out
    run_here(path, tmp_path / "out")
    assert sorted(starts(tmp_path / "out").values()) == [1] * 7 + [2]

    families["wukong"]["model.dropout"] = {"choice": [0.0, 0.82, 0.85, 0.88]}
    path = write_search(tmp_path, families=families, shared={})
    with pytest.raises(SystemExit) as raised:
        run_here(path, tmp_path / "most")
    assert raised.value.code == 2
    assert "wukong: nothing is chosen, as of its 4 trials 0 diverged and 3 failed" in capsys.readouterr().err
    assert not [row for row in rows_of(tmp_path / "most") if row["chosen"]]


def test_a_budget_of_compute_gives_a_cheap_family_more_trials(tmp_path: Path) -> None:
    path = write_search(tmp_path, budget={"steps": 20})
    assert [trial.model for trial in draws(path)] == ["wukong", "wukong", "dnn", "dnn"]  # of 8 steps each
    wukong = [trial for trial in draws(path) if trial.model == "wukong"]
    path = write_search(tmp_path, budget={"gflop": sum(trial.gflop for trial in wukong)})
    spent = {family: [t.gflop for t in draws(path) if t.model == family] for family in FAMILIES}
    assert len(spent["wukong"]) == 2 and len(spent["dnn"]) > 4
    assert 0.5 < sum(spent["dnn"]) / sum(spent["wukong"]) <= 1
    with pytest.raises(UserError, match=r"families\.wukong: budget 7 steps does not cover even its first trial"):
        read_search(write_search(tmp_path, budget={"steps": 7})).trials()
    small = {"lr": {"model": {"name": "lr"}, "model.dim": {"choice": [4, 8]}}}
    assert len(draws(write_search(tmp_path, families=small, shared={}, budget={"trials": 50}))) == 2


def test_keys_of_families_replace_shared_ones_and_draws_are_common(tmp_path: Path) -> None:
    path = write_search(tmp_path)
    rates: dict[str, list[float]] = {}
    for trial in draws(path):
        rates.setdefault(trial.model, []).append(trial.config.dense.learning_rate)
        assert trial.config.train.seed == 1 and not trial.config.train.test
    assert rates["wukong"] == rates["dnn"] and len(set(rates["dnn"])) == 4
    own = {**FAMILIES, "dnn": {**FAMILIES["dnn"], "dense.learning_rate": 0.5}}
    found = [t.config.dense.learning_rate for t in draws(write_search(tmp_path, families=own)) if t.model == "dnn"]
    assert found == [0.5] * 4


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"budget": {}}, r"budget={}: value error, expected one of trials, gflop and steps"),
        ({"budget": {"trials": 1, "steps": 5}}, r"expected one of trials, gflop and steps"),
        ({"budgets": {}}, r"unknown key 'budgets'; did you mean 'budget'\?"),
        ({"families": {"a/b": {}}}, r"'a/b' cannot name a directory"),
        ({"seeds": [1, 1]}, r"the same seed twice"),
        ({"shared": {"dense.lr": 0.1}}, r"search\.json: shared\.dense\.lr=0\.1: .*unknown key 'dense\.lr'; "),
        ({"shared": {"dense.learning_rate": {"log_uniform": [0, 1]}}}, r"shared\.dense\.learning_rate: log_uniform is"),
        ({"shared": {"dense.learning_rate": {"unifrom": [0, 1]}}}, r"'unifrom'; did you mean 'uniform'\?"),
        ({"shared": {"dense.learning_rate": {"uniform": [-1, 1]}}}, r"shared\.dense\.learning_rate=-1: "),
        ({"shared": {"dense.learning_rate": {"uniform": [1, 0]}}}, r"is \[1, 0\], expected two numbers, the lower"),
        ({"shared": {"train.epochs": {"int": [1, 2.5]}}}, r"train\.epochs: int is \[1, 2\.5\], expected two whole"),
        ({"shared": {"train.epochs": {"choice": []}}}, r"choice is \[\], expected a list of at least one value"),
        ({"shared": {"train.seed": 3}}, r"shared\.train\.seed: the search decides this itself"),
        ({"families": {"w": {"model.rankk": 3}}}, r"families\.w\.model\.rankk=3: .*unknown key 'model\.rankk'"),
        ({"families": {"w": {"model": WUKONG, "model.dim": {"choice": [4, 0]}}}}, r"families\.w\.model\.dim=0: "),
        ({"base": "absent.json"}, r"absent\.json: cannot be read"),
    ],
)
def test_what_is_refused(tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_search(write_search(tmp_path, **sections))


def test_rounds_of_optuna_are_the_same_in_any_order_and_after_a_kill(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    families = {"dnn": {"model": {"name": "dnn", "dim": 4}, "model.dropout": {"uniform": [0.0, 0.5]}}}
    sections = {"sampler": "optuna", "budget": {"trials": 24}, "families": families, "shared": {}}
    path = write_search(tmp_path, **sections)
    found = []
    for place, order in enumerate((min, max)):
        while True:  # killed after every trial
            search = read_search(path)
            rows = Rows(tmp_path / f"{place}", search.trials()[0])
            trials, whole = search.trials(rows)
            left = [trial for trial in trials if trial.tuning and trial.name not in rows.of]
            if not left:
                break
            trial = order(left, key=lambda trial: trial.name)
            loss = abs(trial.config.model.dropout - 0.1)
            if trial.rate == 3:
                rows.add(trial, lost_row(trial, DIVERGED, 3, None, None))
            else:
                quality = {"auc": 1 - loss, "logloss": loss, "ne": loss, "calibration": 1.0}
                train = {"steps": 8, "examples_per_second": 1.0, "first_step_seconds": 0.1}
                rows.add(trial, row_of(trial, {"valid": quality, "train": train}, None, None))
        assert whole and rows.status(trials[3]) == DIVERGED
        found.append([(trial.rate, trial.config_hash) for trial in trials])
    assert found[0] == found[1] and len(found[0]) == 24 + 24 * 2  # the draws, and any of them with two seeds
    assert [rate for rate, _ in found[0][:24]] == list(range(24))
    random_ones = [trial.config_hash for trial in draws(write_search(tmp_path, **sections | {"sampler": "random"}))]
    own = [config_hash for _, config_hash in found[0][:24]]
    assert own[:8] == random_ones[:8] and not set(own[8:]) & set(random_ones[8:])
    losses = [abs(trial.config.model.dropout - 0.1) for trial in trials[:24]]
    assert sum(losses[8:]) / 16 < sum(losses[:8]) / 8  # it goes where it is better


def test_with_optuna_no_share_and_no_plan_is_known_and_without_it_there_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_search(tmp_path, sampler="optuna")
    monkeypatch.setattr("megarec.scaling.proposals.importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"search\.json: sampler='optuna' needs Optuna; pip install \"megarec\[search\]\""
    ):
        read_search(path)
    monkeypatch.setattr("megarec.scaling.proposals.importlib.util.find_spec", lambda name: name)
    options = {"array": "1/2", "budget_gflop": None, "hours": None, "plan": False}
    with pytest.raises(UserError, match=r"--array with sampler='optuna' of .*search\.json: its draws follow from how"):
        check_options(read_search(path), Namespace(**options))
    check_options(read_search(path), Namespace(**options | {"array": None}))


def test_shipped_searches_and_that_of_the_docs_do(tmp_path: Path) -> None:
    shipped = sorted((ROOT / "ds_configs/search").glob("*.json"))
    assert {search.file.budget.trials for search in map(read_search, shipped)} == {16}
    text = (ROOT / "docs/search.md").read_text().split("```json\n")[1].split("```")[0]
    (tmp_path / "docs.json").write_text(
        text.replace("../movielens-100k.json", str(ROOT / "ds_configs/movielens-100k.json"))
    )
    assert list(read_search(tmp_path / "docs.json").settings) == ["wukong", "dnn"]


@pytest.mark.slow  # a real sweep is in test_sweep.py
def test_a_real_search_tests_what_it_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the trainer, the calibrated LogLoss, and the config that trains to the same metrics again."""
    monkeypatch.undo()
    path = write_search(tmp_path, families={"dnn": FAMILIES["dnn"]}, budget={"trials": 2}, seeds=[1])
    finish(start(path, tmp_path / "out", "--gflop-per-second", "1", real=True))
    found = report(tmp_path / "out")["families"]["dnn"]
    test = {name: value["mean"] for name, value in found["test"].items()}
    assert 0 < test["calibrated_logloss"] < test["logloss"] + 0.01
    trials, _ = read_search(path).trials(Rows(tmp_path / "out", []))
    metrics = {t.name: json.loads((tmp_path / f"out/runs/{t.name}/metrics.json").read_text()) for t in trials[:2]}
    assert not any("test" in each for each in metrics.values())
    best = metrics[trials[found["chosen"]["draw"]].name]
    assert best["valid"]["logloss"] == min(each["valid"]["logloss"] for each in metrics.values())
