"""Precision and ZeRO of the deepspeed section, as DeepSpeed parses it: read here and nowhere else.

An engine that is built answers by itself, from the same parsed section.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.precision_config import get_bfloat16_config, get_float16_config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig, get_zero_config

from megarec.errors import UserError


@dataclass(frozen=True)
class Settings:
    """A deepspeed section as DeepSpeed reads it.

    Attributes:
        zero: its zero_optimization with all defaults.
        stage: of ZeRO.
        dtype: the type in which the model computes.
    """

    zero: DeepSpeedZeroConfig
    stage: int
    dtype: torch.dtype


def settings_of(section: dict[str, Any]) -> Settings:
    """Read a deepspeed section.

    Raises:
        UserError: DeepSpeed refuses it; the message carries its reason.
    """
    with refusals_of_deepspeed():
        zero = get_zero_config(section)
        bf16, fp16 = get_bfloat16_config(section).enabled, get_float16_config(section).enabled
    dtype = torch.bfloat16 if bf16 else torch.float16 if fp16 else torch.float32
    return Settings(zero, int(zero.stage), dtype)


@contextmanager
def refusals_of_deepspeed() -> Iterator[None]:
    """Errors of DeepSpeed about its section become a UserError with its reason."""
    try:
        yield
    except (deepspeed.DeepSpeedConfigError, ValueError, TypeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"DeepSpeed refused the deepspeed section: {' '.join(str(error).split())}") from error


def check_precision(section: dict[str, Any]) -> None:
    """Raise a UserError for a precision that this device lacks."""
    dtype = settings_of(section).dtype
    if dtype == torch.float16 and not get_accelerator().is_fp16_supported():
        raise UserError("deepspeed.fp16.enabled=true: this device has no fp16; use deepspeed.bf16 or fp32")
    if dtype == torch.bfloat16 and not get_accelerator().is_bf16_supported():
        raise UserError("deepspeed.bf16.enabled=true: this device has no bf16; use fp32")
