"""``scale_model_input`` by one operation, for the schedulers of diffusers that scale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff.diffusers.kept_tables import KeptTables


class InputScaling(KeptTables):
    """A mixin for Euler, Euler ancestral, Heun, KDPM2 and LMS: x / sqrt(sigma^2 + 1).

    The scheduler's own method indexes its sigmas and takes a root on tensors without dimensions at
    every step. Here the numbers of all steps are made at once, and a step divides.
    """

    sigmas: Tensor
    step_index: int | None
    _init_step_index: Callable[[Any], None]
    _notes_scaling = False  # whether diffusers notes a call also where it has no such note before

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """The images as the network expects them at the step that comes.

        Args:
            sample: [N, ...], floating point.
            timestep: one of the scheduler's.

        Returns:
            The scaled images, in their dtype.
        """
        # Under torch.compile a number would be a constant, and each step a graph of its own.
        if torch.compiler.is_compiling() or not isinstance(sample, Tensor):
            return super().scale_model_input(sample, timestep)  # type: ignore[misc]
        step = self.step_index
        if step is None:
            self._init_step_index(timestep)
            step = self.step_index
        sigmas = self._input_sigmas()
        if sigmas.device.type != "cpu":  # reading them would wait for the device
            return super().scale_model_input(sample, timestep)  # type: ignore[misc]
        factors = self._kept(("inputs",), (sigmas,), lambda: self._input_factors(sigmas).tolist())
        if self._notes_scaling or "is_scale_input_called" in self.__dict__:
            self.is_scale_input_called = True
        return self._scaled(sample, factors[step])

    def _input_sigmas(self) -> Tensor:
        """The noise levels by step."""
        return self.sigmas

    def _input_factors(self, sigma: Tensor) -> Tensor:
        return (sigma**2 + 1) ** 0.5

    def _scaled(self, sample: Tensor, factor: float) -> Tensor:
        return sample / factor


class MidpointInputScaling(InputScaling):
    """For KDPM2, every second evaluation of which is between two steps."""

    sigmas_interpol: Tensor

    def _input_sigmas(self) -> Tensor:
        first = self.state_in_first_order  # type: ignore[attr-defined]
        return self.sigmas if first else self.sigmas_interpol


class PreconditionedInputScaling(InputScaling):
    """For EDM's schedulers: c_in x (Karras et al. 2022, arXiv:2206.00364, table 1)."""

    _get_conditioning_c_in: Callable[[Tensor], Tensor]
    _notes_scaling = True

    def _input_factors(self, sigma: Tensor) -> Tensor:
        return self._get_conditioning_c_in(sigma)

    def _scaled(self, sample: Tensor, factor: float) -> Tensor:
        return sample * factor
