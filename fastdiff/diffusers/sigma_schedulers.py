"""diffusers' schedulers on noise levels sigma (arXiv:2206.00364), whose steps run on a table."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_edm_euler import EDMEulerSchedulerOutput
from diffusers.schedulers.scheduling_euler_ancestral_discrete import (
    EulerAncestralDiscreteSchedulerOutput,
)
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteSchedulerOutput,
)
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_k_dpm_2_discrete import KDPM2DiscreteSchedulerOutput
from diffusers.schedulers.scheduling_lms_discrete import LMSDiscreteSchedulerOutput
from torch import Tensor

from fastdiff.diffusers.input_scaling import (
    InputScaling,
    MidpointInputScaling,
    PreconditionedInputScaling,
)
from fastdiff.diffusers.noise_addition import EulerNoising, FlowNoising, SigmaNoising
from fastdiff.diffusers.table_stepping import TableStepping

_CHURN = ("s_churn", "s_tmin", "s_tmax", "s_noise")


def _is_whole(timestep: float | Tensor) -> bool:
    """Whether a time is an integer, which diffusers' Euler schedulers refuse as an index."""
    if isinstance(timestep, Tensor):
        return not timestep.is_floating_point()
    return isinstance(timestep, int)


class EulerDiscreteScheduler(
    EulerNoising, InputScaling, TableStepping, diffusers.EulerDiscreteScheduler
):
    """``diffusers.EulerDiscreteScheduler`` (arXiv:2206.00364, algorithm 2 without Heun's step)."""

    _options = _CHURN
    _one_time_a_step = True

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> EulerDiscreteSchedulerOutput | tuple[Tensor, ...]:
        """The step of ``diffusers.EulerDiscreteScheduler``, with its arguments and errors."""
        made = None
        if not _is_whole(timestep):
            options = (s_churn, s_tmin, s_tmax, s_noise)
            made = self._table_step(model_output, timestep, sample, options, generator)
        if made is None:
            return self._diffusers_step(
                model_output, timestep, sample, s_churn, s_tmin, s_tmax, s_noise, generator,
                return_dict,
            )  # fmt: skip
        return EulerDiscreteSchedulerOutput(*made) if return_dict else made


class EulerAncestralDiscreteScheduler(
    SigmaNoising, InputScaling, TableStepping, diffusers.EulerAncestralDiscreteScheduler
):
    """``diffusers.EulerAncestralDiscreteScheduler`` on a table."""

    _one_time_a_step = True

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> EulerAncestralDiscreteSchedulerOutput | tuple[Tensor, ...]:
        """The step of ``diffusers.EulerAncestralDiscreteScheduler``: arguments, results, errors."""
        made = None
        if not _is_whole(timestep):
            made = self._table_step(model_output, timestep, sample, generator=generator)
        if made is None:
            return self._diffusers_step(model_output, timestep, sample, generator, return_dict)
        return EulerAncestralDiscreteSchedulerOutput(*made) if return_dict else made


class HeunDiscreteScheduler(
    SigmaNoising, InputScaling, TableStepping, diffusers.HeunDiscreteScheduler
):
    """``diffusers.HeunDiscreteScheduler`` (arXiv:2206.00364, algorithm 1) on a table."""

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        return_dict: bool = True,
    ) -> HeunDiscreteSchedulerOutput | tuple[Tensor, ...]:
        """The step of ``diffusers.HeunDiscreteScheduler``, with its arguments and errors."""
        made = self._table_step(model_output, timestep, sample)
        if made is None:
            return self._diffusers_step(model_output, timestep, sample, return_dict)
        return HeunDiscreteSchedulerOutput(*made) if return_dict else made


class KDPM2DiscreteScheduler(
    SigmaNoising, MidpointInputScaling, TableStepping, diffusers.KDPM2DiscreteScheduler
):
    """``diffusers.KDPM2DiscreteScheduler`` (arXiv:2206.00927, DPM-Solver-2) on a table."""

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        return_dict: bool = True,
    ) -> KDPM2DiscreteSchedulerOutput | tuple[Tensor, ...]:
        """The step of ``diffusers.KDPM2DiscreteScheduler``, with its arguments and errors."""
        made = self._table_step(model_output, timestep, sample)
        if made is None:
            return self._diffusers_step(model_output, timestep, sample, return_dict)
        return KDPM2DiscreteSchedulerOutput(*made) if return_dict else made

    @property
    def state_in_first_order(self) -> bool:
        """Whether the next step is the first of its two; asking does not end a run."""
        return self.sample is None if self._run is None else self._run.is_none("sample")


class LMSDiscreteScheduler(
    SigmaNoising, InputScaling, TableStepping, diffusers.LMSDiscreteScheduler
):
    """``diffusers.LMSDiscreteScheduler`` (linear multistep) on a table."""

    _options = ("order",)
    _one_time_a_step = True

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        order: int = 4,
        return_dict: bool = True,
    ) -> LMSDiscreteSchedulerOutput | tuple[Tensor, ...]:
        """The step of ``diffusers.LMSDiscreteScheduler``, with its arguments and errors."""
        made = self._table_step(model_output, timestep, sample, (order,))
        if made is None:
            return self._diffusers_step(model_output, timestep, sample, order, return_dict)
        return LMSDiscreteSchedulerOutput(*made) if return_dict else made


class EDMEulerScheduler(
    SigmaNoising, PreconditionedInputScaling, TableStepping, diffusers.EDMEulerScheduler
):
    """``diffusers.EDMEulerScheduler`` (arXiv:2206.00364, with its preconditioning) on a table."""

    _options = _CHURN

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
        pred_original_sample: Tensor | None = None,
    ) -> EDMEulerSchedulerOutput | tuple[Tensor, ...]:
        """The step of ``diffusers.EDMEulerScheduler``, with its arguments, results and errors."""
        made = None
        if not _is_whole(timestep) and pred_original_sample is None:
            options = (s_churn, s_tmin, s_tmax, s_noise)
            made = self._table_step(model_output, timestep, sample, options, generator)
        if made is None:
            return self._diffusers_step(
                model_output, timestep, sample, s_churn, s_tmin, s_tmax, s_noise, generator,
                return_dict, pred_original_sample,
            )  # fmt: skip
        return EDMEulerSchedulerOutput(*made) if return_dict else made


class FlowMatchEulerDiscreteScheduler(
    FlowNoising, TableStepping, diffusers.FlowMatchEulerDiscreteScheduler
):
    """``diffusers.FlowMatchEulerDiscreteScheduler`` (arXiv:2403.03206) on a table."""

    _options = _CHURN

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: torch.Generator | None = None,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[Tensor, ...]:
        """The step of ``diffusers.FlowMatchEulerDiscreteScheduler``: arguments, results, errors."""
        made: Any = None  # annotated by diffusers as a legacy type of CPU tensors
        if per_token_timesteps is None and not _is_whole(timestep):
            options = (s_churn, s_tmin, s_tmax, s_noise)
            made = self._table_step(model_output, timestep, sample, options, generator)
        if made is None:
            return self._diffusers_step(
                model_output, timestep, sample, s_churn, s_tmin, s_tmax, s_noise, generator,
                per_token_timesteps, return_dict,
            )  # fmt: skip
        return FlowMatchEulerDiscreteSchedulerOutput(*made) if return_dict else made
