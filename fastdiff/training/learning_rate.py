"""The learning rate of each step."""

from __future__ import annotations

import math

from fastdiff.training.training_options import TrainingOptions


def learning_rate(options: TrainingOptions, step: int) -> float:
    """Learning rate of step ``step``, counted from 0: a linear rise, then ``lr_schedule``."""
    rise = min(1.0, (step + 1) / options.warmup) if options.warmup else 1.0
    if options.lr_schedule == "constant":
        return options.lr * rise
    done = max(0, step - options.warmup) / max(1, options.steps - options.warmup)
    return options.lr * rise * (1 + math.cos(math.pi * min(1.0, done))) / 2
