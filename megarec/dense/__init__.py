"""The dense side: the model under the DeepSpeed engine. The only folder that imports deepspeed.

DeepSpeed picks its accelerator when it is first imported, and warns on a machine that has none: say so before.
"""

import os

import torch

from megarec.distributed.process import DRIVERS

if not torch.accelerator.is_available() and not any(driver.exists() for driver in DRIVERS):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
