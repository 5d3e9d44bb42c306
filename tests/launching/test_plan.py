"""What the preflight sees without asking any host."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from megarec.errors import UserError
from megarec.launching import probe
from megarec.launching.preflight import Job, plan_job, required_packages


def plan(directory: Path, run: dict[str, Any], slots: int = 4, hosts: int = 2) -> Job:
    (directory / "hostfile").write_text("".join(f"host{i} slots={slots}\n" for i in range(hosts)))
    (directory / "run.json").write_text(json.dumps({"model": {}, "data": {"path": "d", "batch_size": 64}} | run))
    return plan_job(directory / "hostfile", directory / "run.json", [], None, 29500, None)


def test_every_json_that_the_run_takes_in_is_compared(tmp_path: Path) -> None:
    (tmp_path / "zero.json").write_text("{}")
    (tmp_path / "towers.json").write_text('{"towers": [["a"], ["b"]]}')
    job = plan(tmp_path, {"deepspeed": "zero.json", "parallel": {"towers": "towers.json"}})
    names = [f"{tmp_path}/{name}" for name in ("run.json", "zero.json", "towers.json")]
    assert job.files == [*names, "d/schema.json"]


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"ranks_per_host": 3}, "parallel.ranks_per_host=3 does not divide the 8 ranks of"),
        ({"tensor": 3}, "parallel.tensor=3 does not divide the 4 ranks of a host"),
    ],
)
def test_sizes_that_do_not_fit_the_hostfile(tmp_path: Path, parallel: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(tmp_path, {"parallel": parallel})


def test_a_batch_that_does_not_fit_the_hostfile(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.batch_size=64 does not divide: 6 ranks"):
        plan(tmp_path, {}, slots=3)


def test_names_of_the_requirements() -> None:
    names = required_packages()
    assert {"torch", "deepspeed", "fbgemm-gpu-cpu", "fbgemm-gpu", "numpy"} <= set(names)
    assert all(name.replace("-", "").isalnum() for name in names)


def test_the_hash_of_code_sees_content_and_names(tmp_path: Path) -> None:
    (tmp_path / "megarec").mkdir()
    assert probe.hash_of_code(str(tmp_path)) is None
    module = tmp_path / "megarec/a.py"
    module.write_text("1")
    first = probe.hash_of_code(str(tmp_path))
    module.write_text("2")
    second = probe.hash_of_code(str(tmp_path))
    module.rename(tmp_path / "megarec/b.py")
    assert len({first, second, probe.hash_of_code(str(tmp_path))}) == 3


def test_the_probe_sees_this_machine(tmp_path: Path) -> None:
    before = Path.cwd()
    try:
        facts = probe.facts(str(tmp_path), str(tmp_path), [], ["torch", "no-such-package"], "runs/x", ["localhost"])
    finally:
        os.chdir(before)
    assert facts["packages"]["torch"] and facts["packages"]["no-such-package"] is None
    assert facts["output"]["path"] == str(tmp_path) and facts["output"]["free"] > 0
    assert facts["addresses"] == {"localhost": "127.0.0.1"} and facts["interfaces"]["lo"] == "127.0.0.1"
    assert probe.route("127.0.0.1") == {"address": "127.0.0.1", "interface": "lo"}
    port = probe.listen("127.0.0.1", 0)["port"]
    assert "in use" in probe.listen("127.0.0.1", port)["error"]
    assert probe.connect([("127.0.0.1", port)]) == {"tried": [None]}
    probe.LISTENING.pop().close()
    assert "refused" in probe.connect([("127.0.0.1", port)])["tried"][0]
