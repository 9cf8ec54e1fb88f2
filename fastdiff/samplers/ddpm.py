"""Ancestral sampling of DDPM and improved DDPM (arXiv:2006.11239, arXiv:2102.09672)."""

from __future__ import annotations

import torch

from fastdiff.samplers.table import Sampler, clip_columns, grid, rows_for
from fastdiff.samplers.timesteps import spaced_timesteps
from fastdiff.schedules import NoiseSchedule

VARIANCES = ("fixed_small", "fixed_large", "learned", "learned_range")


class DDPM(Sampler):
    """x' = mean of q(x_{t-1} | x_t, x0) + sigma_t z (arXiv:2006.11239, algorithm 2 and eq. 7).

    With fewer steps than T the chain is that of the respaced schedule, whose betas are
    1 - abar_t / abar_prev (arXiv:2102.09672, section 4).

    Args:
        schedule: the noise schedule that the model was trained on.
        steps: steps to take, 1..T; None for all T.
        variance: sigma^2 is beta_tilde (fixed_small), beta (fixed_large), the exponential of the
            model's second half of channels (learned), or that half as a position v in [-1, 1]
            between log beta_tilde and log beta (learned_range, arXiv:2102.09672, eq. 15).
        prediction: what the model predicts: eps, x0, v or score.
        clip: limits for x0, or None.
        spacing: leading, trailing or linspace.
        offset: added to leading timesteps.

    Raises:
        ValueError: any of them outside these ranges, or eps prediction at zero terminal SNR.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        steps: int | None = None,
        *,
        variance: str = "fixed_small",
        prediction: str = "eps",
        clip: tuple[float, float] | None = (-1.0, 1.0),
        spacing: str = "leading",
        offset: int = 0,
    ) -> None:
        if variance not in VARIANCES:
            raise ValueError(f"unknown variance {variance!r}, wanted one of {', '.join(VARIANCES)}")
        steps = schedule.num_timesteps if steps is None else steps
        timesteps = spaced_timesteps(schedule.num_timesteps, steps, spacing, offset)
        g = grid(schedule, timesteps, prediction)
        chain = schedule.respaced(timesteps.flip(0))  # its steps rise; the table's fall
        log_small = chain.posterior_log_variance_clipped.flip(0)
        log_large = chain.betas.flip(0).log()
        zero = torch.zeros_like(log_small)
        logvar, logvar_v = {
            "fixed_small": (log_small, zero),
            "fixed_large": (log_large, zero),
            "learned": (zero, zero + 1),
            "learned_range": ((log_small + log_large) / 2, (log_large - log_small) / 2),
        }[variance]
        noise = torch.ones_like(log_small)
        noise[-1] = 0  # the last step returns its mean
        table = rows_for(
            steps,
            x0_x=g.x0_x,
            x0_m=g.x0_m,
            out_x=chain.posterior_mean_coef_xt.flip(0),
            out_x0=chain.posterior_mean_coef_x0.flip(0),
            noise=noise,
            logvar=logvar,
            logvar_v=logvar_v,
            **clip_columns(clip),
        )
        super().__init__(timesteps, table, learned_variance=variance.startswith("learned"))
