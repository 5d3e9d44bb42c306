"""One factor over time for the learning rates of both sides."""

import math
from dataclasses import dataclass

from megarec.config.sections import ScheduleConfig


@dataclass
class Schedule:
    """Factor on the base learning rates, a function of the step and of the drops on plateaus so far.

    Attributes:
        total_steps: optimizer steps of the whole run.
        plateau_drops: times the validation loss did not improve for `plateau_patience` validations.
    """

    config: ScheduleConfig
    total_steps: int
    steps_per_epoch: int
    plateau_drops: int = 0

    def factor(self, step: int) -> float:
        """The factor for optimizer step `step`, counted from 0."""
        config = self.config
        warmup_steps = round(config.warmup * self.total_steps)
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, self.total_steps - 1 - warmup_steps))
        if config.decay == "linear":
            factor = 1.0 + (config.final - 1.0) * progress
        elif config.decay == "cosine":
            factor = config.final + (1.0 - config.final) * 0.5 * (1.0 + math.cos(math.pi * progress))
        elif config.decay == "step":
            factor = config.step_factor ** math.floor(step / (config.step_every * self.steps_per_epoch))
        else:
            factor = 1.0
        return factor * config.plateau_factor**self.plateau_drops


@dataclass
class Patience:
    """Counts validations since the best one. One without a score (NaN or infinite) is never the best.

    Attributes:
        best: lowest score so far: validation LogLoss, or minus what is better the larger (train.best_by).
        since_best: validations since then.
        since_drop: validations since the best one or the last drop of the learning rate.
    """

    best: float = math.inf
    since_best: int = 0
    since_drop: int = 0

    def update(self, score: float) -> bool:
        """Take in a validation's score; True when it is the best so far."""
        if math.isfinite(score) and score < self.best:
            self.best, self.since_best, self.since_drop = score, 0, 0
            return True
        self.since_best += 1
        self.since_drop += 1
        return False
