"""A machine's JSON with mistakes, at random: one clear line or a plan, never a traceback."""

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest

from megarec.config.load import load_config
from megarec.data.schema import schema_of
from megarec.errors import UserError
from megarec.planning.hardware import FOLDER, known_hardware, load_hardware
from megarec.planning.planner import check_machine
from megarec.planning.step_time import pieces_of
from megarec.planning.work import Work, work_of
from megarec.run.spec import resolve

CONFIG = Path(__file__).resolve().parents[2] / "ds_configs/mlperf-dlrm-dcnv2.json"
ODD: list[Any] = [
    0, -1, 1e-300, 1e300, 1e9, 1e-9, 10**400, True, None, "", "50", "fast", [], {}, [1], {"2": 37}, {"x": 1}, "é\n",
    0.5, {"value": 0, "source": "x"}, {"value": {}, "source": "x"}, {"value": {"0": 1}, "source": "x"},
    {"value": {"1": 1e-9, "99999999999": 1}, "source": "x"}, {"value": 1, "source": 3}, {"value": [1], "source": "x"},
]  # fmt: skip


def damaged(raw: dict[str, Any], dice: random.Random) -> str:
    """One to three mistakes."""
    made = copy.deepcopy(raw)
    for _ in range(dice.randint(1, 3)):
        key = dice.choice(list(made) or ["name"])
        what = dice.randrange(5)
        if what == 0:
            made.pop(key, None)
        elif what == 1:
            made[key] = dice.choice(ODD)
        elif what == 2:
            made[key[:-1] + dice.choice("xyz_")] = made.pop(key, 1)
        elif isinstance(made.get(key), dict) and made[key]:
            inner = dice.choice(list(made[key]))
            made[key] = {**made[key], inner: dice.choice(ODD)}
    text = json.dumps(made)
    if dice.random() < 0.1:
        place = dice.randrange(len(text))
        text = text[:place] + dice.choice(["", "{", "NaN", "\0", "]"]) + text[place + dice.randint(0, 3) :]
    return text


@pytest.fixture(scope="module")
def works() -> dict[int, Work]:
    config = load_config(CONFIG, ["data.batch_size=65536"])
    return {hosts: work_of(config, resolve(config, schema_of(config.data)), hosts, 4) for hosts in (1, 4)}


def test_two_hundred_mistakes(works: dict[int, Work], tmp_path: Path) -> None:
    config, dice, path, refused = load_config(CONFIG, []), random.Random(1), tmp_path / "m.json", 0
    raw = {name: json.loads((FOLDER / f"{name}.json").read_text()) for name in known_hardware()}
    for case in range(200):
        path.write_text(damaged(raw[dice.choice(list(raw))], dice))
        try:
            hardware = load_hardware(str(path))
            for hosts, work in works.items():
                check_machine(config, hardware, hosts, 4)
                assert all(piece.seconds >= 0 for piece in pieces_of(work, hardware)), path.read_text()
        except UserError as error:
            refused += 1
            said = str(error)
            assert "\n" not in said and 10 < len(said) < 600, (case, said)
            assert "Traceback" not in said and "Error(" not in said, (case, said)
    assert 80 < refused < 200
