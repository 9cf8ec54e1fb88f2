"""diffusers' schedulers of distilled models, whose steps run on a table."""

from __future__ import annotations

import diffusers
import torch
from diffusers.schedulers.scheduling_lcm import LCMSchedulerOutput
from diffusers.schedulers.scheduling_tcd import TCDSchedulerOutput
from torch import Tensor

from fastdiff.diffusers.noise_addition import AlphaNoising
from fastdiff.diffusers.table_stepping import TableStepping


class LCMScheduler(AlphaNoising, TableStepping, diffusers.LCMScheduler):
    """``diffusers.LCMScheduler`` (latent consistency models, arXiv:2310.04378) on a table."""

    _time_matters = True

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> LCMSchedulerOutput | tuple[Tensor, ...]:
        """The step of ``diffusers.LCMScheduler``, with its arguments, results and errors."""
        made = self._table_step(model_output, timestep, sample, generator=generator)
        if made is None:
            return self._diffusers_step(model_output, timestep, sample, generator, return_dict)
        return LCMSchedulerOutput(*made) if return_dict else made


class TCDScheduler(AlphaNoising, TableStepping, diffusers.TCDScheduler):
    """``diffusers.TCDScheduler`` (trajectory consistency, arXiv:2402.19159) on a table."""

    _time_matters = True
    _options = ("eta",)

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        eta: float = 0.3,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> TCDSchedulerOutput | tuple[Tensor, ...]:
        """The step of ``diffusers.TCDScheduler``, with its arguments, results and errors."""
        made = self._table_step(model_output, timestep, sample, (eta,), generator)
        if made is None:
            return self._diffusers_step(model_output, timestep, sample, eta, generator, return_dict)
        return TCDSchedulerOutput(*made) if return_dict else made
