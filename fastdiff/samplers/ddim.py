"""DDIM (Song et al. 2021, arXiv:2010.02502)."""

from __future__ import annotations

import torch

from fastdiff.samplers.table import Sampler, clip_columns, grid, rows_for
from fastdiff.samplers.timesteps import spaced_timesteps
from fastdiff.schedules import NoiseSchedule


class DDIM(Sampler):
    """x' = sqrt(abar') x0 + sqrt(1 - abar' - sigma^2) eps + sigma z (arXiv:2010.02502, eq. 12).

    Args:
        schedule: the noise schedule that the model was trained on.
        steps: steps to take, 1..T.
        eta: sigma as a fraction of DDPM's (eq. 16); 0 is deterministic. In [0, 1].
        prediction: what the model predicts: eps, x0, v or score.
        clip: limits for x0, or None.
        spacing: leading, trailing or linspace.
        offset: added to leading timesteps (Stable Diffusion uses 1).
        use_clipped_model_output: derive eps again from the clipped x0, so that the two agree (as
            OpenAI's code does; diffusers' default is False). No difference when nothing is clipped.
        set_alpha_to_one: step to abar = 1 at the end; otherwise to the schedule's first abar.

    Raises:
        ValueError: any of them outside these ranges, or eps prediction at zero terminal SNR.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        steps: int = 50,
        *,
        eta: float = 0.0,
        prediction: str = "eps",
        clip: tuple[float, float] | None = (-1.0, 1.0),
        spacing: str = "leading",
        offset: int = 0,
        use_clipped_model_output: bool = True,
        set_alpha_to_one: bool = True,
    ) -> None:
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must lie in [0, 1], got {eta}")
        timesteps = spaced_timesteps(schedule.num_timesteps, steps, spacing, offset)
        final_abar = 1.0 if set_alpha_to_one else schedule.alphas_cumprod[0].item()
        g = grid(schedule, timesteps, prediction, final_abar=final_abar)
        variance = (1 - g.abar_prev) / (1 - g.abar) * (1 - g.abar / g.abar_prev)
        sigma = eta * variance.clamp(min=0).sqrt()
        eps = (1 - g.abar_prev - sigma**2).clamp(min=0).sqrt()  # direction pointing to x_t
        if clip is not None and use_clipped_model_output:
            inverse = 1 / (1 - g.abar).sqrt()  # eps = (x - sqrt(abar) x0) / sqrt(1 - abar)
            out_x, out_m = eps * inverse, torch.zeros_like(eps)
            out_x0 = g.abar_prev.sqrt() - eps * g.abar.sqrt() * inverse
        else:
            out_x, out_m = eps * g.eps_x, eps * g.eps_m
            out_x0 = g.abar_prev.sqrt()
        table = rows_for(
            steps,
            x0_x=g.x0_x,
            x0_m=g.x0_m,
            out_x=out_x,
            out_x0=out_x0,
            out_m=out_m,
            noise=sigma,
            **clip_columns(clip),
        )
        super().__init__(timesteps, table)
