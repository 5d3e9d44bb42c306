"""At ZeRO-3 the model is partitioned parameter by parameter; the numbers are those of building it whole."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

from megarec.config.load import load_config
from megarec.distributed.process import start_process
from megarec.distributed.rank_pool import RankPool
from megarec.models.initial import initialize, materialize
from megarec.models.recommender import Recommender
from megarec.parity.run import case_losses, write_base
from megarec.run.build import build_run

STAGE_3 = "deepspeed.zero_optimization.stage=3"
STEPS = 5


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("materialize"))


def whole(model: nn.Module, seed: int, device: torch.device, section: dict[str, Any], mpu: object) -> None:
    """The usual way: the whole model in fp32, which DeepSpeed then casts and partitions."""
    materialize(model, device)
    initialize(model, seed)


def losses_built_whole(path: Path, overrides: list[str]) -> list[float]:
    with patch("megarec.dense.parallelize.materialize_and_fill", whole):
        return case_losses(path, overrides, STEPS)


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("bf16", [False, True])
def test_the_losses_are_those_of_the_usual_way(
    bf16: bool, tensor: int, base: Path, rank_pool: Callable[[int], RankPool]
) -> None:
    overrides = [STAGE_3, f"parallel.tensor={tensor}", f"deepspeed.bf16.enabled={str(bf16).lower()}"]
    pool = rank_pool(2)
    expected = pool.run(losses_built_whole, base, overrides)
    assert len({*expected[0]}) == STEPS, "the model must learn for the comparison to mean anything"
    assert pool.run(case_losses, base, overrides, STEPS) == expected


def partitions(path: Path, overrides: list[str]) -> tuple[dict[str, torch.Tensor], int, int]:
    """The partition of every parameter on this rank; the elements of the largest parameter ever made, and of all."""
    made = []

    def remember(parameter: nn.Parameter, device: torch.device, dtype: torch.dtype) -> nn.Parameter:
        made.append(parameter.numel())
        assert sum(p.numel() for p in model[0].parameters() if not p.is_meta) == 0, "an earlier one is still whole"
        return with_memory(parameter, device, dtype)

    def partition(given: nn.Module, *args: Any) -> None:
        model.append(given)
        materialize_and_fill(given, *args)

    from megarec.dense.parallelize import materialize_and_fill, with_memory

    model: list[nn.Module] = []
    config = load_config(path, overrides)
    device = start_process(config)
    with (
        patch("megarec.dense.parallelize.with_memory", remember),
        patch("megarec.dense.parallelize.materialize_and_fill", partition),
    ):
        run = build_run(config, device)
    found = {name: p.ds_tensor.clone() for name, p in run.dense.module.named_parameters()}
    return found, max(made), sum(made)


def test_every_rank_holds_its_partition_and_never_a_second_whole_parameter(
    base: Path, rank_pool: Callable[[int], RankPool]
) -> None:
    results = rank_pool(2).run(partitions, base, [STAGE_3, "deepspeed.bf16.enabled=true"])
    expected = unsharded(base)
    for name, parameter in expected.items():
        flat = torch.cat([found[name] for found, _, _ in results])
        assert flat.dtype == torch.bfloat16
        assert torch.equal(flat[: parameter.numel()], parameter.detach().flatten().bfloat16()), name
        assert flat.numel() - parameter.numel() < len(results)
    assert results[0][1] == max(p.numel() for p in expected.values())
    assert results[0][2] == sum(p.numel() for p in expected.values())


def unsharded(path: Path) -> dict[str, nn.Parameter]:
    """The parameters of the whole model in this process, in fp32."""
    from megarec.data.schema import schema_of
    from megarec.sparse.layout import build_layout

    config = load_config(path)
    schema = schema_of(config.data)
    layout = build_layout(schema, config.embedding, config.model.dim)
    model = Recommender(layout, len(schema.numeric), config.model, config.embedding.dropout)
    initialize(model, config.train.seed)
    return dict(model.named_parameters())
