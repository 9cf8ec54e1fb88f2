"""Which of the T training timesteps a shorter sampling process visits."""

from __future__ import annotations

import torch
from torch import Tensor

SPACINGS = ("leading", "trailing", "linspace")


def spaced_timesteps(
    num_timesteps: int, steps: int, spacing: str = "leading", offset: int = 0
) -> Tensor:
    """Visited timesteps in sampling order, int64 [steps], strictly falling.

    The three spacings of Lin et al. 2023 (arXiv:2305.08891, table 2), with n = steps:

        leading   i * (T // n) + offset for i = 0..n-1
        trailing  round(T - i * T / n) - 1, which always has n entries and begins at T - 1
        linspace  round(i * (T - 1) / (n - 1)), from T - 1 down to 0

    Raises:
        ValueError: steps outside 1..T, an unknown spacing, or an offset that leaves 0..T-1.
    """
    if spacing not in SPACINGS:
        raise ValueError(f"unknown spacing {spacing!r}, wanted one of {', '.join(SPACINGS)}")
    if not 1 <= steps <= num_timesteps:
        raise ValueError(f"steps must lie in 1..{num_timesteps} (the schedule's T), got {steps}")
    if offset and spacing != "leading":
        raise ValueError(f"an offset goes with leading spacing only, got {offset} with {spacing}")
    i = torch.arange(steps, dtype=torch.float64)
    if spacing == "leading":
        timesteps = (i * (num_timesteps // steps)).flip(0) + offset
    elif spacing == "trailing":
        timesteps = (num_timesteps - i * num_timesteps / steps).round() - 1
    else:
        timesteps = torch.linspace(num_timesteps - 1, 0, steps, dtype=torch.float64).round()
    if timesteps[0] >= num_timesteps or timesteps[-1] < 0:
        raise ValueError(
            f"offset {offset} puts timesteps outside 0..{num_timesteps - 1}: "
            f"{int(timesteps[-1])}..{int(timesteps[0])}"
        )
    return timesteps.long()
