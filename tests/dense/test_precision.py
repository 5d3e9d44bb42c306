"""Precisions: what a device lacks is refused; fp16 scales its loss at every ZeRO stage, and both sides see none of it.

No CPU says that it has fp16, but it has: `pretend_fp16` lets DeepSpeed's accelerator say so.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import FusedAdam

from megarec.config.load import load_config
from megarec.dense import engine, settings
from megarec.distributed.process import start_process
from megarec.distributed.rank_pool import RankPool
from megarec.errors import UserError
from megarec.parity.cases import DENSE_SGD
from megarec.parity.reference import reference_steps
from megarec.parity.run import case_losses, write_base
from megarec.run.build import build_run
from megarec.training.profiling import StepTimer
from megarec.training.step import train_step

SGD = (*DENSE_SGD, "embedding.optimizer=sgd", "embedding.l2=0.0", "deepspeed.fp16.hysteresis=1")
TOLERANCE = 5e-3
"""fp16 rounds to 11 significant bits, relative 2^-12."""


class NoHalves:
    def is_fp16_supported(self) -> bool:
        return False

    def is_bf16_supported(self) -> bool:
        return False


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_precision_that_the_device_lacks_is_refused(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    monkeypatch.setattr(settings, "get_accelerator", NoHalves)
    with pytest.raises(UserError, match=f"deepspeed.{precision}.enabled=true: this device has no {precision}"):
        settings.check_precision({precision: {"enabled": True}})
    settings.check_precision({precision: {"enabled": False}})


@contextmanager
def pretend_fp16() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        accelerator = type(get_accelerator())
        patch.setattr(accelerator, "is_fp16_supported", lambda self: True)
        patch.setattr(accelerator, "supported_dtypes", lambda self: [torch.float, torch.half, torch.bfloat16])
        yield


def fp16_losses(path: Path, overrides: list[str], steps: int) -> list[float]:
    """On every rank: the losses of the first global batches."""
    with pretend_fp16():
        return case_losses(path, overrides, steps)


@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.slow), 2, 3])
def test_fp16_trains_as_one_process_in_fp32(stage: int, tmp_path: Path, rank_pool: Callable[[int], RankPool]) -> None:
    """Plain SGD on both sides: Adam would hide a wrong factor."""
    path = write_base(tmp_path)
    overrides = [*SGD, "deepspeed.fp16.enabled=true", f"deepspeed.zero_optimization.stage={stage}"]
    losses = rank_pool(2).run(fp16_losses, path, [*overrides, "deepspeed.fp16.initial_scale_power=12"], 10)[0]
    reference = [step.loss for step in reference_steps(load_config(path, list(SGD)), 10)]
    assert losses == pytest.approx(reference, rel=TOLERANCE)
    assert max(reference) - min(reference) > 10 * TOLERANCE * min(reference)


def fp16_norms(path: Path, overrides: list[str], steps: int) -> list[tuple[float, float]]:
    """On one rank: the norm of the dense gradient and the loss scale of each step."""
    with pretend_fp16():
        config = load_config(path, overrides)
        device = start_process(config)
        run = build_run(config, device)
        run.dense.set_learning_rate(config.dense.learning_rate)
        seen = []
        for batch in list(run.train.batches(epoch=0))[:steps]:
            scale = run.dense.loss_scale()
            result = train_step(run.dense, run.sparse, batch, timer=StepTimer(device), want_norm=True)
            assert result.cause is None and result.gradient_norm is not None and scale is not None
            seen.append((result.gradient_norm, scale))
        return seen


@pytest.mark.parametrize(
    ("stage", "power"), [*(pytest.param(0, power, marks=pytest.mark.slow) for power in (4, 8)), (0, 12), (2, 8)]
)
def test_the_gradient_norm_does_not_depend_on_the_scale_nor_on_its_growth(
    stage: int, power: int, tmp_path: Path, rank_pool: Callable[[int], RankPool]
) -> None:
    path = write_base(tmp_path)
    fp16 = f'deepspeed.fp16={{"enabled": true, "initial_scale_power": {power}, "loss_scale_window": 2}}'
    overrides = [*SGD, fp16, f"deepspeed.zero_optimization.stage={stage}"]
    (seen,) = rank_pool(1).run(fp16_norms, path, overrides, 8)
    assert seen[0][1] == 2**power
    assert seen[-1][1] > seen[0][1], "the scale must grow for its growth to be looked at"
    reference = [step.gradient_norm for step in reference_steps(load_config(path, list(SGD)), 8)]
    assert [norm for norm, _ in seen] == pytest.approx(reference, rel=2e-2)


class FusedAdamOnCpu(FusedAdam):
    """Counts steps where DeepSpeed's and apex's count them, whose kernels need a GPU."""

    def __init__(self, params: Iterable[torch.nn.Parameter], **options: Any) -> None:
        torch.optim.Optimizer.__init__(self, params, options)

    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                first = state["exp_avg"].lerp_(p.grad, 1 - beta1) / (1 - beta1 ** group["step"])
                second = state["exp_avg_sq"].lerp_(p.grad.square(), 1 - beta2) / (1 - beta2 ** group["step"])
                p.data.sub_(group["lr"] * first / (second.sqrt() + group["eps"]))


def largest_first_update(path: Path, overrides: list[str]) -> float:
    """On one rank: by how much the first step changes a master weight, at most, over the learning rate."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "fused_adam", lambda: (FusedAdamOnCpu, "a stand-in"))
        config = load_config(path, overrides)
        device = start_process(config)
        run = build_run(config, device)
        run.dense.set_learning_rate(config.dense.learning_rate)
        (masters,) = run.dense.engine.optimizer.fp32_groups_flat
        before = masters.detach().clone()
        train_step(run.dense, run.sparse, next(iter(run.train.batches(epoch=0))), timer=StepTimer(device))
        return float((masters.detach() - before).abs().max()) / config.dense.learning_rate


def test_the_first_step_of_a_fused_adam_is_the_first(tmp_path: Path, rank_pool: Callable[[int], RankPool]) -> None:
    """At ZeRO 0 in bf16 DeepSpeed takes a step of its own before; with it counted, updates are 26 % too small."""
    overrides = ["deepspeed.bf16.enabled=true", "deepspeed.zero_optimization.stage=0", "dense.weight_decay=0.0"]
    (largest,) = rank_pool(1).run(largest_first_update, write_base(tmp_path), overrides)
    assert largest == pytest.approx(1, abs=0.1)  # except for eps
