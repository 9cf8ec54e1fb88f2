"""diffusers' predictor-corrector scheduler of variance-exploding SDEs (arXiv:2011.13456)."""

from __future__ import annotations

import diffusers
import torch
from diffusers.schedulers.scheduling_sde_ve import SdeVeOutput
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fastdiff.diffusers.noise_addition import VarianceExplodingNoising
from fastdiff.diffusers.table_stepping import TableStepping


class ScoreSdeVeScheduler(VarianceExplodingNoising, TableStepping, diffusers.ScoreSdeVeScheduler):
    """``diffusers.ScoreSdeVeScheduler`` (arXiv:2011.13456), its predictor on a table."""

    _step_name = "step_pred"
    _counter = None

    def step_pred(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> SdeVeOutput | tuple[Tensor, ...]:
        """The predictor of ``diffusers.ScoreSdeVeScheduler``: its arguments, results and errors."""
        made = self._table_step(model_output, timestep, sample, generator=generator)
        if made is None:
            return self._diffusers_step(model_output, timestep, sample, generator, return_dict)
        return SdeVeOutput(*made) if return_dict else made

    def step_correct(
        self,
        model_output: Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """The corrector of ``diffusers.ScoreSdeVeScheduler`` (algorithm 5 of arXiv:2011.13456).

        Its step is (snr * |z| / |score|)^2 * 2, of norms averaged over the batch. It is no row of a
        table, because it depends on the score's norm.
        """
        if (
            self.timesteps is None
            or not sample.dtype == model_output.dtype == torch.float32
            or sample.shape != model_output.shape
            or sample.ndim < 2
        ):
            return self._stock.step_correct(self, model_output, sample, generator, return_dict)
        noise = randn_tensor(sample.shape, layout=sample.layout, generator=generator)
        noise = noise.to(sample.device)
        axes = tuple(range(1, sample.ndim))
        norms = [torch.linalg.vector_norm(one, dim=axes).mean() for one in (noise, model_output)]
        ratio, snr = norms[0] / norms[1], self.config.snr
        mean = torch.addcmul(sample, ratio * ratio, model_output, value=2 * snr**2)
        made = torch.addcmul(mean, ratio, noise, value=2 * snr)  # sqrt(2 * step) * z
        return SchedulerOutput(made) if return_dict else (made,)
