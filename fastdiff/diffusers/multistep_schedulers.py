"""diffusers' schedulers that keep earlier outputs of the model, whose steps run on a table."""

from __future__ import annotations

import diffusers
import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from fastdiff.diffusers.input_scaling import PreconditionedInputScaling
from fastdiff.diffusers.noise_addition import AlphaNoising, AngleNoising, SigmaNoising
from fastdiff.diffusers.table_stepping import TableStepping


class PNDMScheduler(AlphaNoising, TableStepping, diffusers.PNDMScheduler):
    """``diffusers.PNDMScheduler`` (pseudo numerical methods, arXiv:2202.09778) on a table."""

    _counter = "counter"
    _time_matters = True

    def step(
        self, model_output: Tensor, timestep: int, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """The step of ``diffusers.PNDMScheduler``, with its arguments, results and errors."""
        made = self._table_step(model_output, timestep, sample)
        if made is None:
            return self._diffusers_step(model_output, timestep, sample, return_dict)
        return SchedulerOutput(*made) if return_dict else made


class DPMSolverSinglestepScheduler(
    AngleNoising, TableStepping, diffusers.DPMSolverSinglestepScheduler
):
    """``diffusers.DPMSolverSinglestepScheduler`` (arXiv:2206.00927) on a table."""

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """The step of ``diffusers.DPMSolverSinglestepScheduler``, with its arguments and errors."""
        made = self._table_step(model_output, timestep, sample, generator=generator)
        if made is None:
            return self._diffusers_step(model_output, timestep, sample, generator, return_dict)
        return SchedulerOutput(*made) if return_dict else made

    def _has_variance(self, output: Tensor, sample: Tensor) -> bool:
        return _drops_variance(self, output, sample)


class DPMSolverMultistepScheduler(
    AngleNoising, TableStepping, diffusers.DPMSolverMultistepScheduler
):
    """``diffusers.DPMSolverMultistepScheduler`` (DPM-Solver++, arXiv:2211.01095) on a table."""

    _one_time_a_step = True

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """The step of ``diffusers.DPMSolverMultistepScheduler``, with its arguments and errors."""
        made = self._table_step(
            model_output, timestep, sample, generator=generator, noise=variance_noise
        )
        if made is None:
            return self._diffusers_step(
                model_output, timestep, sample, generator, variance_noise, return_dict
            )
        return SchedulerOutput(*made) if return_dict else made

    def _has_variance(self, output: Tensor, sample: Tensor) -> bool:
        return _drops_variance(self, output, sample)


class UniPCMultistepScheduler(AngleNoising, TableStepping, diffusers.UniPCMultistepScheduler):
    """``diffusers.UniPCMultistepScheduler`` (arXiv:2302.04867) on a table."""

    _one_time_a_step = True

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """The step of ``diffusers.UniPCMultistepScheduler``, with its arguments and errors."""
        made = self._table_step(model_output, timestep, sample)
        if made is None:
            return self._diffusers_step(model_output, timestep, sample, return_dict)
        return SchedulerOutput(*made) if return_dict else made


class DEISMultistepScheduler(AngleNoising, TableStepping, diffusers.DEISMultistepScheduler):
    """``diffusers.DEISMultistepScheduler`` (arXiv:2204.13902) on a table."""

    _one_time_a_step = True

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """The step of ``diffusers.DEISMultistepScheduler``, with its arguments and errors."""
        made = self._table_step(model_output, timestep, sample)
        if made is None:
            return self._diffusers_step(model_output, timestep, sample, return_dict)
        return SchedulerOutput(*made) if return_dict else made


class EDMDPMSolverMultistepScheduler(
    SigmaNoising,
    PreconditionedInputScaling,
    TableStepping,
    diffusers.EDMDPMSolverMultistepScheduler,
):
    """``diffusers.EDMDPMSolverMultistepScheduler`` (DPM-Solver++ with EDM's preconditioning)."""

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """The step of ``diffusers.EDMDPMSolverMultistepScheduler``: arguments, results, errors."""
        made = self._table_step(model_output, timestep, sample, generator=generator)
        if made is None:
            return self._diffusers_step(model_output, timestep, sample, generator, return_dict)
        return SchedulerOutput(*made) if return_dict else made


def _drops_variance(scheduler: TableStepping, output: Tensor, sample: Tensor) -> bool:
    """Whether the output has variance channels, which the scheduler drops after the third channel.

    diffusers does so for a model that predicts eps of images of three channels.
    """
    config = scheduler.config
    doubled = (sample.shape[0], 6, *sample.shape[2:])
    return (
        sample.shape[1] == 3
        and output.shape == doubled
        and config.prediction_type == "epsilon"
        and config.variance_type in ("learned", "learned_range")
    )
