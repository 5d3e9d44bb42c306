"""Imported once by the process from which a test process forks its ranks and its scripts (tests/processes.py).

Every fork has what is imported and found out here. Nothing is computed: threads do not survive a fork.
"""

import gc
import importlib

# DeepSpeed asks a compiler which of its extensions it could build, in every process that starts collectives.
_ = importlib.import_module("deepspeed.ops").__compatible_ops__
COMMANDS = ["cli", "checkpoint", "evaluate", "parity", "partition_towers", "prepare_data", "rehearse", "scaling_law"]
WHAT_COMMANDS_TAKE = [*(f"megarec.commands.{name}" for name in COMMANDS), "pandas", "torch.distributed.run"]
WHAT_TESTS_TAKE = [  # a rank that runs a function of a test imports the test's file, and with it these
    "hypothesis.strategies",
    "matplotlib.backends.backend_agg",
    "megarec.planning.partition.interactions",
    "megarec.planning.shrink",
    "pytest",
    "safetensors.torch",
    "tensorboard.backend.event_processing.event_accumulator",
    "torch.utils.flop_counter",
    "torch.utils.tensorboard",
]
for name in (*WHAT_COMMANDS_TAKE, *WHAT_TESTS_TAKE):
    importlib.import_module(name)
gc.collect()
gc.freeze()  # a collection in a fork would write to, and so copy, the pages of all that is imported
