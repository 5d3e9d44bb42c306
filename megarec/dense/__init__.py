"""The dense side: the model under the DeepSpeed engine. The only folder that imports deepspeed.

DeepSpeed picks its accelerator at its first import, and warns on a machine that has none: set it before.
"""

import os

import torch

from megarec.distributed.process import DRIVERS

if not torch.accelerator.is_available() and not any(driver.exists() for driver in DRIVERS):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
