"""The dense side: the model under the DeepSpeed engine. The only folder that imports deepspeed.

DeepSpeed picks its accelerator when it is first imported, and warns on a machine that has none: say so before.
"""

import os

import torch

if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
