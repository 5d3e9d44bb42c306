"""A bare virtual environment, an installed wheel, an empty directory: from MovieLens-100K to a prediction.

Nothing but installed commands, in an environment that knows nothing of this checkout. Without a package index the tests
skip; under CI they fail.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread

import pyarrow.parquet as pq
import pytest

from megarec.distributed.rendezvous import free_port

ROOT = Path(__file__).parents[1]
PASSED_ON = re.compile(r"PIP_\w+|\w+_proxy|HOME|LANG|TMPDIR|SSL_CERT_FILE|REQUESTS_CA_BUNDLE", re.IGNORECASE)
NO_NETWORK = re.compile(r"Retry\(|Max retries|ConnectionError|name resolution|timed out|check the network")
PREDICT = """
import json, sys
from pathlib import Path
import megarec
assert Path(megarec.__file__).is_relative_to(sys.prefix), megarec.__file__
model = megarec.load_model("exported")
from megarec.data.loader import EvalLoader
from megarec.data.store import open_split
rows = open_split(Path("data/movielens-100k"), "test", model.schema, "error")
loader = EvalLoader(rows, model.schema, batch_size=100, rank=0, world_size=1, seed=1, prefetch=1, pin_memory=False)
print(json.dumps(model.predict(next(iter(loader.batches()))).tolist()))
"""
PIP = "pip==26.3"
pytestmark = [pytest.mark.network, pytest.mark.timeout(1800)]  # minutes on a busy machine


def run(programs: Path, work: Path, *words: object, downloads: bool = False) -> str:
    """Standard output of a program that must succeed, without the variables of this process but a few.

    Args:
        programs: the directory of the program, first on PATH.
        downloads: it asks the package index. If that cannot be reached the test skips; under CI it fails.
    """
    others = [part for part in os.environ["PATH"].split(os.pathsep) if Path(part) != Path(sys.executable).parent]
    environment = {name: value for name, value in os.environ.items() if PASSED_ON.fullmatch(name)}
    environment |= {"PATH": os.pathsep.join([str(programs), *others]), "DS_ACCELERATOR": "cpu"}
    command = [str(programs / str(words[0])), *map(str, words[1:])]
    ran = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
    output = ran.stdout + ran.stderr
    if ran.returncode != 0 and downloads and "CI" not in os.environ:
        causes = [line.strip() for line in output.splitlines() if NO_NETWORK.search(line)]
        if causes:
            pytest.skip(f"the package index cannot be reached: {causes[-1]}")
    assert ran.returncode == 0, f"exit code {ran.returncode} of {command}\n{output}"
    return ran.stdout


@pytest.fixture(scope="session")
def removed_meanwhile() -> Iterator[Callable[[Path], None]]:
    """Remove a directory while other tests run: 1.5 GB take a minute where the file system discards at once."""
    threads: list[Thread] = []

    def remove(directory: Path) -> None:
        threads.append(Thread(target=shutil.rmtree, args=[directory]))
        threads[-1].start()

    yield remove
    for thread in threads:
        thread.join()


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory, removed_meanwhile: Callable[[Path], None]) -> Iterator[Path]:
    """The programs of a new virtual environment in which the wheel and its requirements are installed."""
    directory = tmp_path_factory.mktemp("installed")
    own, new, wheels = Path(sys.executable).parent, directory / "venv/bin", directory / "wheels"
    build = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", wheels, ROOT]
    run(own, directory, "python", *build, downloads=True)
    run(own, directory, "python", "-m", "venv", new.parent)
    (wheel,) = wheels.iterdir()
    # Without --no-compile pip compiles what nothing here imports: 30 of 50 seconds.
    install = ["-m", "pip", "install", "--quiet", "--no-compile", f"{wheel}[cpu]", "-c", ROOT / "requirements.txt"]
    run(new, directory, "python", *install, downloads=True)
    yield new
    removed_meanwhile(directory)


@pytest.mark.slow  # a download
def test_the_requirements_of_gpu_machines_resolve(tmp_path: Path) -> None:
    """To torch's CUDA build and an FBGEMM of its own, wherever this machine's pip looks; only metadata are read."""
    own, report = Path(sys.executable).parent, tmp_path / "report.json"
    # A pip that downloads nothing in a dry run, apart from that of the environment.
    run(own, tmp_path, "python", "-m", "pip", "install", "--quiet", "--target", tmp_path, PIP, downloads=True)
    options = ["--quiet", "--dry-run", "--ignore-installed", "--use-feature=fast-deps", "--report", report]
    requirements = ["-r", ROOT / "requirements-gpu.txt"]
    run(own, tmp_path, "python", tmp_path / "pip", "install", *options, *requirements, downloads=True)
    found = [package["metadata"] for package in json.loads(report.read_text(encoding="utf-8"))["install"]]
    versions = {package["name"].lower().replace("_", "-"): package["version"] for package in found}
    assert "fbgemm-gpu" in versions and "fbgemm-gpu-cpu" not in versions
    needs = next(package["requires_dist"] for package in found if package["name"] == "torch")
    assert "nvidia-nccl-cu13" in versions and any("nvidia-nccl" in need for need in needs), versions["torch"]
    pinned = (ROOT / "requirements-dev.txt").read_text(encoding="utf-8").splitlines()
    assert f"triton=={versions['triton']}" in pinned, "the tests' Triton is the one that torch asks for"


def test_from_raw_data_to_a_prediction(programs: Path, tmp_path: Path) -> None:
    """All in one test: pytest-xdist would give another one to another process, which installs for itself."""
    (package,) = programs.parent.glob("lib/python*/site-packages/megarec")
    config = package / "ds_configs/movielens-100k.json"
    assert config.exists() and (package / "py.typed").exists()
    assert not (package / "benchmarks").exists() and not (package.parent / "tools").exists()
    assert "wukong-108gflop" in json.loads(run(programs, tmp_path, "megarec", "flops", "--ladder", "--json"))

    data, output = "data/movielens-100k", tmp_path / "runs/movielens-100k"  # as the config says
    run(programs, tmp_path, "megarec", "prepare", "movielens-100k", "--output", data, downloads=True)

    two_ranks = ["--num_gpus", 2, "--master_port", free_port(), "--module", "megarec.train", "--config", config]
    run(programs, tmp_path, "deepspeed", "--log_level", "error", *two_ranks, "--set", "train.max_steps=8")
    resumed = ["--num_gpus", 2, "--config", config, "--resume", "--set", "train.max_steps=16"]
    run(programs, tmp_path, "megarec", "launch", "one-host", *resumed)
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["train"]["steps"] == 16 and metrics["test"]["auc"] > 0.6

    scored = ["--run", output, "--data", data, "--json", "--predictions", "predictions.parquet"]
    found = json.loads(run(programs, tmp_path, "megarec", "evaluate", *scored))
    trained = metrics["test"]
    for nested in ("gauc", "ndcg", "hit_rate"):
        own = trained.pop(nested)
        assert {key: found[nested][key] for key in own} == pytest.approx(own, rel=0, abs=1e-6)
    assert {key: found[key] for key in trained} == pytest.approx(trained, rel=0, abs=1e-6)

    run(programs, tmp_path, "megarec", "checkpoint", "export", output / "checkpoints/best", "exported")
    predicted = json.loads(run(programs, tmp_path, "python", "-c", PREDICT))
    expected = pq.read_table(tmp_path / "predictions.parquet")["logit"][:100].to_pylist()
    assert predicted == pytest.approx(expected, rel=0, abs=1e-5)
