"""Imported once by the process from which a test process forks its ranks and its scripts (tests/processes.py).

Every fork has what is imported and found out here. Nothing is computed: threads do not survive a fork.
"""

import gc
import importlib

# DeepSpeed asks a compiler which of its extensions it could build, in every process that starts collectives.
_ = importlib.import_module("deepspeed.ops").__compatible_ops__
for name in ("megarec.commands.cli", "pandas", "matplotlib.pyplot", "tensorboard.summary.writer.event_file_writer"):
    importlib.import_module(name)
gc.collect()
gc.freeze()  # a collection in a fork would write to, and so copy, the pages of all that is imported
