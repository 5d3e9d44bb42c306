"""The benchmark of activation checkpointing at a small size: its rows and what they must show."""

import pytest

from megarec.config.models import WukongConfig
from tools.benchmarks.recompute import measure


@pytest.mark.slow  # times every policy
def test_every_policy_has_a_row_and_full_keeps_least() -> None:
    config = WukongConfig(dim=64, layers=3, num_fm=32, num_lcb=32, rank=16, mlp=[512, 512], head=[64])
    result = measure(config, embeddings=64, batch=512, repetitions=1)
    assert [row["policy"] for row in result["rows"]] == ["none", "selective", "full"]
    assert result["ratios"]["full_kept"] < 0.7
