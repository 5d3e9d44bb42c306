"""The training loop of a run: steps, faults, what an operator sees."""
