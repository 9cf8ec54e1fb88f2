"""diffusers' DDPM and DDIM schedulers, whose steps run on a table."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_ddim_inverse import (
    DDIMSchedulerOutput as DDIMInverseSchedulerOutput,
)
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from torch import Tensor

from fastdiff.diffusers.noise_addition import AlphaNoising
from fastdiff.diffusers.table_stepping import TableStepping


class DDPMScheduler(AlphaNoising, TableStepping, diffusers.DDPMScheduler):
    """``diffusers.DDPMScheduler`` (arXiv:2006.11239) on a table.

    The posterior's variance is 0 at t = 0, where diffusers puts 1e-20. ``strict_compat=False`` puts
    the variance of the time before, as arXiv:2102.09672 does. Images are the same, for the step at
    t = 0 adds no noise; likelihoods are not.
    """

    _counter = None
    _one_time_a_step = True

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor, ...]:
        """The step of ``diffusers.DDPMScheduler``, with its arguments, results and errors."""
        made = self._table_step(model_output, timestep, sample, generator=generator)
        if made is None:
            return self._diffusers_step(model_output, timestep, sample, generator, return_dict)
        return DDPMSchedulerOutput(*made) if return_dict else made

    def _get_variance(
        self, t: Any, predicted_variance: Tensor | None = None, variance_type: str | None = None
    ) -> Tensor:
        kind = variance_type or self.config.variance_type
        if self.strict_compat or kind == "learned" or int(t) > 0:
            return self._stock._get_variance(self, t, predicted_variance, variance_type)
        grid = self.timesteps.tolist()
        before = grid[-2] if len(grid) > 1 and grid[-1] == 0 else 1
        smallest = self._stock._get_variance(self, before, variance_type="fixed_small")
        if kind == "learned_range" and predicted_variance is not None:
            largest = torch.log(1 - self.alphas_cumprod[t])
            share = (predicted_variance + 1) / 2
            return share * largest + (1 - share) * torch.log(smallest)
        return {"fixed_small_log": smallest.sqrt(), "fixed_large_log": smallest.log()}.get(
            kind, smallest
        )

    def _has_variance(self, output: Tensor, sample: Tensor) -> bool:
        doubled = (sample.shape[0], 2 * sample.shape[1], *sample.shape[2:])
        return output.shape == doubled and self._learns_variance

    @property
    def _learns_variance(self) -> bool:  # type: ignore[override]
        return self.variance_type in ("learned", "learned_range")


class DDIMScheduler(AlphaNoising, TableStepping, diffusers.DDIMScheduler):
    """``diffusers.DDIMScheduler`` (arXiv:2010.02502) on a table.

    diffusers takes the time before t to be ``t - T // n`` of T training times and n steps. With
    ``strict_compat=False`` it is the next time of the grid, which differs for ``linspace`` spacing
    and wherever n does not divide T.
    """

    _counter = None
    _options = ("eta", "use_clipped_model_output")
    _one_time_a_step = True

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, ...]:
        """The step of ``diffusers.DDIMScheduler``, with its arguments, results and errors."""
        options = (eta, use_clipped_model_output)
        made = self._table_step(model_output, timestep, sample, options, generator, variance_noise)
        if made is None:
            return self._diffusers_step(
                model_output, timestep, sample, eta, use_clipped_model_output, generator,
                variance_noise, return_dict,
            )  # fmt: skip
        return DDIMSchedulerOutput(*made) if return_dict else made

    def _diffusers_step(self, model_output: Tensor, timestep: Any, *rest: Any, **more: Any) -> Any:
        steps = self.num_inference_steps
        grid = [] if self.strict_compat or steps is None else self.timesteps.tolist()
        if not grid or int(timestep) not in grid:
            return super()._diffusers_step(model_output, timestep, *rest, **more)
        following = [*grid, -1][grid.index(int(timestep)) + 1]
        # diffusers divides the training times by the number of steps to get the gap in the grid
        gap = Fraction(self.config.num_train_timesteps, int(timestep) - following)
        self.__dict__["num_inference_steps"] = gap
        try:
            return super()._diffusers_step(model_output, timestep, *rest, **more)
        finally:
            self.__dict__["num_inference_steps"] = steps


class DDIMInverseScheduler(TableStepping, diffusers.DDIMInverseScheduler):
    """``diffusers.DDIMInverseScheduler`` (from images to noise) on a table."""

    _counter = None
    _one_time_a_step = True

    def step(
        self, model_output: Tensor, timestep: int, sample: Tensor, return_dict: bool = True
    ) -> DDIMInverseSchedulerOutput | tuple[Tensor, ...]:
        """The step of ``diffusers.DDIMInverseScheduler``, with its arguments and errors."""
        made = self._table_step(model_output, timestep, sample)
        if made is None:
            return self._diffusers_step(model_output, timestep, sample, return_dict)
        return DDIMInverseSchedulerOutput(*made) if return_dict else made
