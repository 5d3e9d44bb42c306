"""Seeded malformed configs, schemas, towers and studies: exit 0 or 2, one line, no traceback, nothing written.

In this process, through the mains of the tools. The seed is fixed, so that a failure
is one that everybody sees; change SEED by hand to look for more.
"""

import copy
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megarec.commands import flops, placement, prepare_data, scaling_law, train

SEED = 13
ROUNDS = 75  # of each kind
SECONDS_OF_ONE = 20.0  # on a busy machine; alone it takes a hundredth

RUN: dict[str, Any] = {
    "model": {"name": "wukong", "layers": 2, "num_fm": 4, "num_lcb": 4, "rank": 6, "mlp": [16], "dim": 8, "head": [8]},
    "data": {"path": "data", "schema": "schema.json", "batch_size": 64},
    "embedding": {"optimizer": "sgd", "features": {"a": {"embeddings": 2}}, "tables": {"b": {"placement": "row"}}},
    "dense": {"learning_rate": 1e-3, "betas": [0.9, 0.99]},
    "parallel": {"exchange": "tower", "towers": "towers.json", "timeout_seconds": 30.0},
    "tower_module": {"name": "dlrm", "compression": 2},
    "schedule": {"warmup": 0.1, "decay": "step"},
    "train": {"epochs": 1, "output_dir": "out", "trace": [1, 2], "faults": {"spike": "skip"}},
    "deepspeed": {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}, "gradient_clipping": 1.0},
}
SCHEMA: dict[str, Any] = {
    "name": "x",
    "categorical": [
        {"name": "a", "rows": 100},
        {"name": "b", "rows": 50, "multi_valued": True, "pooling": "mean", "weighted": True},
        {"name": "c", "rows": 50, "multi_valued": True, "table": "b", "mean_length": 3.0},
        {"name": "d", "rows": 7},
    ],
    "numeric": ["n"],
    "rows": {"train": 100, "valid": 10, "test": 10},
}
TOWERS: dict[str, Any] = {"towers": [["a", "d"], ["b", "c"]], "strategy": "random", "seed": 1}
STUDY: dict[str, Any] = {
    "base": "run.json",
    "models": {"wukong-1": {"model.layers": 1}, "wukong-2": {"model.layers": 2}},
    "learning_rates": [{"dense.learning_rate": 0.01}, {"dense.learning_rate": 0.1}],
    "seeds": [1, 2],
}
SPEC: dict[str, Any] = {
    "name": "x",
    "columns": {"a": {"type": "categorical"}, "l": {"type": "multi_valued"}, "y": {"type": "label"}},
}
FILES = {"run.json": RUN, "schema.json": SCHEMA, "towers.json": TOWERS, "study.json": STUDY, "spec.json": SPEC}

VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 3, 10**30, -(10**30), 1e308, -1e-300, 0.5, "", "auto", "True", "null", "a", "/", "..",
    "../x", "\u202e", "é" * 300, [], [[]], [[[1]]], {}, {"a": {}}, [1, "a"], [0] * 500, {"name": "wukong"}, "run.json",
    {"type": "label"}, {"enabled": "auto"}, "[red]x[/]", "%s{0}",
]  # fmt: skip
TEXTS: list[Callable[[str, random.Random], str]] = [
    lambda text, dice: text[: dice.randrange(len(text))],
    lambda text, dice: text.replace('"', "'", dice.randrange(1, 9)),
    lambda text, dice: "\ufeff" + text,
    lambda text, dice: text.replace(":", ": NaN, " if dice.random() < 0.5 else ": -Infinity,", 1),
    lambda text, dice: text.replace("{", '{"name": "x", "name": 1, ', 1),
    lambda text, dice: "[" * 100_000 + text,
    lambda text, dice: text.replace("1", "9" * 5_000, 1),
    lambda text, dice: text + text,
    lambda text, dice: text.replace("a", "\\u0000", 2),
    lambda text, dice: text.replace("a", "\\ud800", 2),
    lambda text, dice: "",
    lambda text, dice: "null",
    lambda text, dice: "".join(dice.sample(text, len(text))),
]


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything below a value."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in list(keys) for place in [(value, key), *places(value[key])]]


def mutated(value: dict[str, Any], dice: random.Random) -> Any:
    """One to three changes: another value, a key less, one more, one under another name."""
    value = copy.deepcopy(value)
    for _ in range(dice.randint(1, 3)):
        container, key = dice.choice(places(value) or [({"x": 0}, "x")])
        change = dice.randrange(5)
        if change <= 2:
            container[key] = copy.deepcopy(dice.choice(VALUES))
        elif change == 3:
            del container[key]
        elif isinstance(container, dict):
            container[dice.choice(["zz", "", "nam", "rows", "a.b"])] = container.pop(key)
    return value


COMMANDS: dict[str, list[tuple[Callable[[], None], list[str]]]] = {
    "run.json": [(train.main, ["--config", "run.json", "--print-config"]), (flops.main, ["--config", "run.json"])],
    "schema.json": [
        (flops.main, ["--config", "run.json", "--json"]),
        (placement.main, ["--config", "run.json", "--hosts", "2", "--ranks-per-host", "2"]),
    ],
    "towers.json": [(flops.main, ["--config", "run.json"])],
    "study.json": [(scaling_law.main, ["sweep", "--study", "study.json", "--output", "out", "--plan",
                    "--gflop-per-second", "1"])],
    "spec.json": [(prepare_data.main, ["table", "--schema", "spec.json", "--output", "out",
                   *(word for split in ("train", "valid", "test") for word in (f"--{split}", "rows.csv"))])],
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_malformed_files_are_one_line(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("signal.signal", lambda *_: None)  # prepare_data's, of a process of its own
    dice, ended = random.Random(f"{SEED} {kind}"), []
    for number in range(ROUNDS):
        for name, value in FILES.items():
            (tmp_path / name).write_text(json.dumps(value))
        (tmp_path / "rows.csv").write_text("a,l,y\n1,2|3,0\n2,,1\n")
        text = json.dumps(FILES[kind])
        text = dice.choice(TEXTS)(text, dice) if number % 5 == 0 else json.dumps(mutated(FILES[kind], dice))
        (tmp_path / kind).write_text(text)
        main, words = COMMANDS[kind][number % len(COMMANDS[kind])]
        before, started = sorted(tmp_path.rglob("*")), time.monotonic()
        code, error = outcome(main, words, monkeypatch, capsys)
        case = f"round {number}: {' '.join(words)} with {text[:1_500]}"
        assert code in (0, 2), f"{case}: exit {code}\n{error}"
        assert time.monotonic() - started < SECONDS_OF_ONE, case
        if code:
            lines = error.splitlines()
            assert error.startswith("error: ") and len(lines) == 1 and len(error) < 1_500, f"{case}\n{error[:3_000]}"
            assert sorted(tmp_path.rglob("*")) == before, f"{case}: left {sorted(tmp_path.rglob('*'))}"
        remove(tmp_path / "out")
        ended.append(code)
    assert ended.count(2) > ROUNDS // 4, "most of what is malformed must be seen"


def outcome(
    main: Callable[[], None], words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    """The exit code of a command and what it wrote to standard error."""
    monkeypatch.setattr(sys, "argv", ["megarec", *words])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0), capsys.readouterr().err
    except Exception as error:
        return 1, f"{type(error).__name__}: {error}"
    return 0, capsys.readouterr().err


def remove(path: Path) -> None:
    for child in sorted(path.rglob("*"), reverse=True) if path.is_dir() else ():
        child.unlink() if not child.is_dir() else child.rmdir()
    if path.is_dir():
        path.rmdir()
