"""A sweep in parts: which task has which trials, who may work in a directory, the batch script."""

import json
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from megarec.errors import UserError
from megarec.scaling.array import Share, share_of
from megarec.scaling.grid import read_grid
from megarec.scaling.sweep import folder_of
from tests.scaling.studies import write_study
from tests.scaling.test_sweep import MODELS, RATES, run_here, table

ROOT = Path(__file__).parents[2]


def slurm(number: int, first: int, last: int, step: int = 1, count: int | None = None) -> dict[str, str]:
    count = (last - first) // step + 1 if count is None else count
    values = {"ID": number, "MIN": first, "MAX": last, "STEP": step, "COUNT": count}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()}


def test_which_task_this_is() -> None:
    assert share_of("3/16", {}) == Share(3, 16)
    assert share_of("", slurm(0, 0, 15)) == Share(1, 16) and share_of("", slurm(15, 0, 15)) == Share(16, 16)
    assert share_of("", slurm(7, 1, 9, 2)) == Share(4, 5)
    for text in ("0/4", "5/4", "1", "1/0", "a/b", "1/2/3"):
        with pytest.raises(UserError, match=f"--array {text}: expected K/N, the K-th of N tasks"):
            share_of(text, {})
    with pytest.raises(UserError, match=r"SLURM_ARRAY_TASK_ID is not set: submit with sbatch --array=0-15, or say"):
        share_of("", {})
    for part in (slurm(3, 3, 3), slurm(3, 3, 7, 1, 2)):  # sbatch --array=3, or 3,7
        with pytest.raises(UserError, match=r"is only a part of one; say which task of how many this is"):
            share_of("", part)


def test_shares_are_even_and_have_every_trial_once(tmp_path: Path) -> None:
    trials = read_grid(write_study(tmp_path, models=MODELS, learning_rates=RATES, seeds=[1, 2, 3]))
    for count in (1, 2, 3, 5, 50):
        shares = [Share(number, count).names(trials) for number in range(1, count + 1)]
        assert Counter(name for share in shares for name in share) == Counter(trial.name for trial in trials)
        runs = [
            sum(t.tuning for t in trials if t.name in s)
            + len({(t.model, t.seed) for t in trials if t.name in s and not t.tuning})
            for s in shares
        ]
        assert max(runs) - min(runs) <= 1 and sum(runs) == 2 * (2 + 2)


def test_with_one_rate_no_seed_waits_and_a_rate_that_was_stopped_has_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, output = write_study(tmp_path, models=MODELS), tmp_path / "out"
    run_here(path, output, "--array", "2/2", pace=False)
    assert [(row["model"], row["seed"]) for row in table(output)] == [("wukong-1", 1), ("wukong-1", 2)]
    assert "wait for" not in capsys.readouterr().out
    path = write_study(tmp_path, models=MODELS, learning_rates=RATES)
    output = tmp_path / "stopped"
    (other,) = (t for t in read_grid(path) if (t.model, t.rate, t.seed) == ("wukong-1", 1, 1))  # of task 4/4
    (folder := folder_of(output, other)).mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps({"stopped": "non-finite loss"}))
    run_here(path, output, "--array", "2/4", pace=False)
    assert "task 2/4: the other seeds of wukong-1 wait for learning rates that other" in capsys.readouterr().out
    for number in (3, 2):
        run_here(path, output, "--array", f"{number}/4", pace=False)
    assert "wait for" not in capsys.readouterr().out
    found = [(row["model"], row["rate"], row["seed"]) for row in table(output)]
    assert found == [("wukong-1", 0, 1), ("wukong-1", 0, 2), ("wukong-2", 1, 1)]


def test_who_may_work_in_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megarec.scaling.array import only_task_in
    from megarec.scaling.sweep import only_sweep_in

    monkeypatch.setattr("megarec.scaling.array._PATIENCE", 0.1)
    with only_task_in(tmp_path, Share(1, 2)):
        with only_task_in(tmp_path, Share(2, 2)):
            pass
        with pytest.raises(UserError, match="task 1/2 is at work there already"), only_task_in(tmp_path, Share(1, 2)):
            pass
        with pytest.raises(UserError, match="tasks of an array of 2 are at work"), only_task_in(tmp_path, Share(1, 3)):
            pass
        with pytest.raises(UserError, match="another sweep is at work there"), only_sweep_in(tmp_path):
            pass
    with only_task_in(tmp_path, Share(1, 3)):
        pass
    with (
        only_sweep_in(tmp_path),
        pytest.raises(UserError, match="another sweep is at work there"),
        only_task_in(tmp_path, Share(1, 3)),
    ):
        pass


def test_options_of_a_whole_sweep_and_another_study_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(tmp_path)
    with pytest.raises(SystemExit) as end:
        run_here(path, tmp_path / "out", "--array", "1/2", "--hours", "1", pace=False)
    assert end.value.code == 2 and "--hours is for a whole sweep" in capsys.readouterr().err
    (tmp_path / "out/runs/other-seed1-0123").mkdir(parents=True)
    with pytest.raises(SystemExit) as end:
        run_here(path, tmp_path / "out", "--array", "1/2", pace=False)
    assert end.value.code == 2 and "start without --array, which moves it" in capsys.readouterr().err


def test_the_batch_script_asks_for_its_share(tmp_path: Path) -> None:
    """Without Slurm: its variables, and a python that prints its arguments."""
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/scaling_law.py").touch()
    fake = tmp_path / ".venv/bin/python"
    fake.parent.mkdir(parents=True)
    fake.write_text('#!/bin/sh\necho "$@"\n')
    fake.chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "SLURM_SUBMIT_DIR": str(tmp_path)}
    for words, options in (
        (["--study", "s"], "--study s --array"),
        (["--study", "s", "--array", "4/16"], "--study s --array 4/16"),
    ):
        command = ["bash", str(ROOT / "launch/sweep.sh"), *words]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert (ran.returncode, ran.stdout) == (0, f"tools/scaling_law.py sweep {options}\n"), ran.stderr
