"""Does the partitioner find the hidden groups of made-up data, as features, probe steps and noise grow?

One thing changes at a time. Each case is a data set of its own and the partition into as many towers as there are
groups: coherent, by the default measure and by the cosine (on a flat DLRM), diverse, and random as the reference.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megarec.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "ds_configs/studies/towers-base.json"
MODEL = {"name": "dlrm", "dim": 16, "head": [64, 64]}
BATCH = 128
GROUP = 16  # features for each group, two of them in none
TRAIN_SHARE = 0.8
SEED = 1


@dataclass(frozen=True)
class Case:
    """What a partition is learned from.

    Attributes:
        steps: of the probe, each of BATCH examples that it has not seen before.
        signal: variance of the logit; less is more noise.
        inside: what the interactions inside a group are made of.
    """

    features: int = 64
    steps: int = 300
    signal: float = 8.0
    inside: str = "products"


CASES = (
    *(Case(steps=steps) for steps in (100, 300, 1_000)),
    *(Case(features=features, steps=3_000) for features in (128, 256)),
    *(Case(signal=signal) for signal in (2.0, 32.0)),
    Case(steps=3_000, inside="chains"),
)


def run(cases: tuple[Case, ...] = CASES) -> dict[str, Any]:
    """A row a case and strategy; `ratios` is empty, an index is none.

    Raises:
        UserError: a tool fails.
    """
    rows: list[dict[str, Any]] = []
    for case in cases:
        found = rows_of(case)
        summary = ", ".join(f"{row['strategy']} {row['adjusted_rand']:.3f}" for row in found)
        print(f"{case}: adjusted Rand index {summary}", file=sys.stderr, flush=True)
        rows += found
    return {"name": "groups", "rows": rows, "ratios": {}}


def rows_of(case: Case) -> list[dict[str, Any]]:
    groups = case.features // GROUP
    with tempfile.TemporaryDirectory(prefix="megarec-groups-") as name:
        directory = Path(name)
        examples = round(case.steps * BATCH / TRAIN_SHARE) + BATCH
        _call(
            "prepare_data.py", "grouped", "--features", case.features, "--groups", groups, "--alone", 2 * groups,
            "--rows", 8, "--signal", case.signal, "--inside", case.inside, "--seed", SEED, "--examples", examples,
            "--output", directory / "data",
        )  # fmt: skip
        found = {}
        for strategy, options in (
            ("coherent", ["--probe-steps", case.steps]),
            ("cosine", ["--probe-steps", case.steps, "--measure", "cosine"]),
            ("diverse", ["--strategy", "diverse", "--interactions", directory / "coherent-interactions.npy"]),
            ("random", ["--strategy", "random", "--interactions", directory / "coherent-interactions.npy"]),
        ):
            found[strategy] = json.loads(_call(
                "partition_towers.py", "--config", CONFIG, "--towers", groups, "--json", *options,
                "--output", directory / f"{strategy}.json",
                "--set", f"model={json.dumps(MODEL)}", "--set", f"data.path={directory / 'data'}",
                "--set", f"data.batch_size={BATCH}", "--set", f"train.output_dir={directory / 'run'}",
            ))  # fmt: skip
    return [
        {
            "features": case.features,
            "groups": groups,
            "probe_steps": case.steps,
            "signal": case.signal,
            "made_of": case.inside,
            "strategy": strategy,
            "adjusted_rand": one["adjusted_rand"],
            "inside": one["interaction"]["inside"],
            "across": one["interaction"]["across"],
        }
        for strategy, one in found.items()
    ]


def _call(tool: str, *options: object) -> str:
    command = [sys.executable, str(ROOT / "tools" / tool), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    if done.returncode:
        raise UserError(f"{tool} failed with exit code {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout
