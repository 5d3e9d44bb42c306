"""How a training process says why it ended; launchers and restart scripts go by these numbers."""

DONE = 0
USER_MISTAKE = 2
"""Something its user must mend: a config, data, a checkpoint that does not fit."""
STOPPED = 70
"""Stopped by the fault policy or because replicas differed: a restart would meet the same fault."""
PREEMPTED = 75
"""Asked to end by a signal, and saved: a restart with --resume continues."""
