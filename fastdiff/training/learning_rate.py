"""The learning rate of each step."""

from __future__ import annotations

import math

from fastdiff.training.training_options import TrainingOptions


def learning_rate(options: TrainingOptions, step: int) -> float:
    """Learning rate of step ``step``, counted from 0: a linear rise, then ``lr_schedule``.

    cosine and linear fall to 0 at the last step. rsqrt is lr / sqrt(max(1, t / reference)) after t
    steps (Karras et al. 2024, arXiv:2312.02696, equation 67). The last ``cooldown`` steps of
    constant and rsqrt fall linearly to 0.
    """
    rise = min(1.0, (step + 1) / options.warmup) if options.warmup else 1.0
    done = max(0, step - options.warmup) / max(1, options.steps - options.warmup)
    lr = options.lr * rise
    if options.lr_schedule == "cosine":
        return lr * (1 + math.cos(math.pi * min(1.0, done))) / 2
    if options.lr_schedule == "linear":
        return lr * (1 - min(1.0, done))
    if options.lr_schedule == "rsqrt":
        lr /= math.sqrt(max(1.0, step / (options.lr_reference or options.warmup)))
    left = max(0, options.steps - step)
    return lr * min(1.0, left / options.cooldown) if options.cooldown else lr
