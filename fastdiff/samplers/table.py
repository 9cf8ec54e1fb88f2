"""The coefficient table that stands for a sampler.

Every step of every sampler here is one row of coefficients. With x = x_t, m the model's output,
v its variance channels where it has them, and z standard normal noise, a row means

    x0 = clamp(x0_x * x + x0_m * m, clip_min, clip_max)
    x' = out_x * x + out_x0 * x0 + out_m * m + noise * exp((logvar + logvar_v * v) / 2) * z

where every factor named in COLUMNS is this row's. ``ops.sampler_step`` computes it. The rows are
written in float64 and rounded once, when they go to the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff import process
from fastdiff.schedules import NoiseSchedule

COLUMNS = (
    "x0_x", "x0_m", "clip_min", "clip_max",
    "out_x", "out_x0", "out_m",
    "noise", "logvar", "logvar_v",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Sampler:
    """A sampler as data.

    Attributes:
        timesteps: the model's timesteps in sampling order, int64 [S].
        table: coefficients, float64 [S, len(COLUMNS)].
        learned_variance: the model's output has twice the channels, the second half v.
    """

    timesteps: Tensor
    table: Tensor
    learned_variance: bool = False

    @property
    def steps(self) -> int:
        """S, the number of steps."""
        return self.timesteps.numel()

    @property
    def needs_noise(self) -> bool:
        """Whether any step adds noise."""
        return bool(self.table[:, COLUMNS.index("noise")].any())

    def __str__(self) -> str:
        head = f"{'t':>6} " + " ".join(f"{name:>11}" for name in COLUMNS)
        rows = (
            f"{t:>6} " + " ".join(f"{value:>11.5g}" for value in row)
            for t, row in zip(self.timesteps.tolist(), self.table.tolist(), strict=True)
        )
        return "\n".join([head, *rows])


def rows_for(steps: int, **columns: Tensor | float) -> Tensor:
    """A [steps, len(COLUMNS)] table with the given columns; the clip columns default to none."""
    table = torch.zeros(steps, len(COLUMNS), dtype=torch.float64)
    values: dict[str, Tensor | float] = {"clip_min": -torch.inf, "clip_max": torch.inf, **columns}
    for name, value in values.items():
        table[:, COLUMNS.index(name)] = torch.as_tensor(value, dtype=torch.float64)
    return table


def clip_columns(clip: tuple[float, float] | None) -> dict[str, float]:
    """The clip columns for x0 limits, or none of them for None; ValueError if they are reversed."""
    if clip is None:
        return {}
    low, high = clip
    if not low < high:
        raise ValueError(f"clip must be (low, high) with low < high, got {clip}")
    return {"clip_min": low, "clip_max": high}


@dataclass(frozen=True, eq=False)
class Grid:
    """abar at the visited timesteps and at the ones they step to, and x0, eps as linear forms.

    With m the model's output of the given kind: x0 = x0_x * x + x0_m * m, eps = eps_x * x +
    eps_m * m. All are float64 [S].
    """

    abar: Tensor
    abar_prev: Tensor
    x0_x: Tensor
    x0_m: Tensor
    eps_x: Tensor
    eps_m: Tensor


def grid(schedule: NoiseSchedule, timesteps: Tensor, kind: str, *, final_abar: float = 1.0) -> Grid:
    """The grid of a sampler that visits ``timesteps`` (int64 [S], falling).

    The previous timestep is the grid's own next entry, whatever the spacing; after the last comes
    ``final_abar``. Raises ValueError for eps or score predictions at zero signal.
    """
    x0 = process.conversion(schedule, kind, "x0")
    eps = process.conversion(schedule, kind, "eps")
    abar = schedule.alphas_cumprod[timesteps]
    if kind in ("eps", "score") and bool((abar == 0).any()):
        raise ValueError(
            f"the schedule has zero signal at t = {int(timesteps[0])}, where a prediction of "
            f"{kind} says nothing of x0; use a model that predicts x0 or v, "
            "or a spacing that does not visit this timestep"
        )
    abar_prev = torch.cat([abar[1:], torch.tensor([final_abar], dtype=torch.float64)])
    return Grid(abar, abar_prev, *(factor[timesteps] for factor in (*x0, *eps)))
