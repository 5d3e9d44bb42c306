"""Published figures of models that are shipped as configs, to compare with our counts; never tuned to match."""

import csv
import re
from pathlib import Path
from typing import NamedTuple

LADDER = Path(__file__).with_name("published_ladder.csv")


class Published(NamedTuple):
    """A paper's figures of a model.

    Attributes:
        source: where they are published.
        flop: training FLOPs per example, as many digits as are printed.
        parameters: sparse and dense; None where no exact number is printed.
    """

    source: str
    flop: float
    parameters: int | None = None


DLRM_CRITEO = Published("arXiv 2403.02545, table 3", 4.62e6, 26_136_307_201)


def published(config: Path) -> Published | None:
    """The published figures of a shipped config's model, by the file's name; None: unknown."""
    if config.stem == "dlrm-criteo-terabyte":
        return DLRM_CRITEO
    named = re.fullmatch(r"wukong-([0-9.]+)gflop", config.stem)
    if named and named[1] in _wukong_ladder():
        return Published("arXiv 2403.02545, table 5", float(named[1]) * 1e9)
    return None


def _wukong_ladder() -> set[str]:
    """Wukong's rows by their training GFLOP per example, as printed."""
    with LADDER.open(encoding="utf-8", newline="") as rows:
        return {row["train_gflop_per_example"] for row in csv.DictReader(rows) if row["model"] == "wukong"}
