"""``add_noise``, ``get_velocity`` and ``scale_noise`` of diffusers' schedulers, by one operation.

A class here is a mixin, one for each way in which these schedulers know their noise levels, and is
named before the scheduler's own class among the bases. Each method is

    signal[row] * x + sigma[row] * noise

by ``ops.q_sample`` from tables that are made once for a schedule, where the scheduler's own method
casts, indexes, takes roots and multiplies one after the other. Nothing waits for an accelerator:
which row of a schedule a timestep is, the device finds out itself.

The scheduler's own method runs where tables do not apply: for tensors of different dtypes, shapes
or devices, for timesteps that are no row of the schedule, and under ``torch.compile``, which fuses
it anyway. So arguments that are odd or wrong give what they gave before, errors included.

With ``strict_compat``, the default, the coefficients are those of diffusers, made in the dtype of
the images: in bfloat16 1 - alphas_cumprod is then 0 for the first timesteps. Without it they are
made in float64. The result is computed in float32 (float64 for float64 images) and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.common.checks import wide_dtype
from fastdiff.diffusers.kept_tables import KeptTables

_IMAGES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTEGERS = (torch.int64,)
_NUMBERS = (torch.int64, torch.int32, torch.float32, torch.float64)


class AlphaNoising(KeptTables):
    """For schedulers whose timesteps are rows of ``alphas_cumprod``: DDPM, DDIM, PNDM, LCM, TCD."""

    alphas_cumprod: Tensor

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noise images to their timesteps (Ho et al. 2020, arXiv:2006.11239, eq. 4).

        Args:
            original_samples: [N, ...], floating point.
            noise: like the images.
            timesteps: [N] or [1], int64, rows of ``alphas_cumprod``.

        Returns:
            sqrt(abar) x0 + sqrt(1 - abar) noise, like the images.

        Raises:
            IndexError: a timestep outside the schedule. On an accelerator, which is not waited for,
                its image is NaN.
        """
        if _fit(original_samples, noise, timesteps, _INTEGERS):
            signal, sigma, _ = self._roots(original_samples)
            rows = _of_each(timesteps, original_samples)
            try:
                return ops.q_sample(original_samples, rows, noise, signal, sigma)
            except IndexError:  # a negative timestep counts from the end, any other is an error
                pass
        return super().add_noise(original_samples, noise, timesteps)  # type: ignore[misc]

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The velocity of images (Salimans & Ho 2022, arXiv:2202.00512, appendix D).

        Args:
            sample: [N, ...], clean images, floating point.
            noise: like the images.
            timesteps: as for :meth:`add_noise`, whose errors are those of this method too.

        Returns:
            sqrt(abar) noise - sqrt(1 - abar) x0, like the images.
        """
        if _fit(sample, noise, timesteps, _INTEGERS):
            signal, _, negative_sigma = self._roots(sample)
            rows = _of_each(timesteps, sample)
            try:
                return ops.q_sample(noise, rows, sample, signal, negative_sigma)
            except IndexError:
                pass
        return super().get_velocity(sample, noise, timesteps)  # type: ignore[misc]

    def _roots(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """sqrt(abar), sqrt(1 - abar) and its negative for images x."""
        if self.alphas_cumprod.device != x.device:
            self.alphas_cumprod = self.alphas_cumprod.to(x.device)

        def make() -> tuple[Tensor, Tensor, Tensor]:
            signal, sigma = _roots_of(_precise(self.alphas_cumprod, x, self.strict_compat))
            wide = wide_dtype(x.dtype)
            return signal.to(wide), sigma.to(wide), -sigma.to(wide)

        return self._kept(("roots", x.dtype, self.strict_compat), (self.alphas_cumprod,), make)


class _LevelNoising(KeptTables):
    """For schedulers whose timesteps are looked up among ``timesteps`` and have a sigma each."""

    timesteps: Tensor
    sigmas: Tensor
    step_index: int | None
    begin_index: int | None
    index_for_timestep: Callable[..., int]

    def _coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of the first tensor and of the second at noise levels ``sigma``."""
        raise NotImplementedError

    def _noised(self, x: Tensor | None, noise: Tensor, t: Tensor) -> Tensor | None:
        """Images x with noise of the levels of t; None if the scheduler's own method must run."""
        if x is None or not _fit(x, noise, t, _NUMBERS):
            return None
        if self.begin_index is None:
            return self._at_timesteps(x, noise, t, self.sigmas, self._coefficients)
        # A denoising run has begun or is about to: all images have the level of its step.
        levels = self._levels(x)
        step = self.begin_index if self.step_index is None else self.step_index
        if levels is None or not 0 <= step < len(levels):
            return None
        signal, sigma = levels[step]
        if not math.isfinite(sigma):
            return None
        return torch.add(x if signal == 1 else x * signal, noise, alpha=sigma)

    def _at_timesteps(
        self, x: Tensor, noise: Tensor, t: Tensor, source: Tensor,
        coefficients: Callable[[Tensor], tuple[Tensor, Tensor]],
    ) -> Tensor | None:  # fmt: skip
        """``coefficients`` of ``source`` at the steps of t, applied to x and the noise.

        None if the host can see that a timestep is not in the schedule, which is then an error.
        """
        ascending, found, steps, other = self._kept(
            ("steps", x.device), (self.timesteps,), lambda: self._searched(x.device)
        )

        def make() -> list[Tensor]:
            columns = []
            for factor in coefficients(_precise(source, x, self.strict_compat)):
                column = factor.to(wide_dtype(x.dtype))
                # The last row is that of all timesteps which are not in the schedule.
                last = column.new_full((), math.nan) if other is None else column[other]
                columns.append(torch.cat([column[steps], last[None]]))
            return columns

        name = ("levels", coefficients.__name__, x.device, x.dtype, self.strict_compat)
        tables = self._kept(name, (self.timesteps, source), make)
        t = _of_each(t, x)
        if t.dtype == torch.float64 and self.timesteps.dtype == torch.float32:
            t = t.float()
        t = t.double().contiguous()  # of others searchsorted warns
        rows = torch.searchsorted(ascending, t)
        # On a CPU a row outside the tables is an error.
        none = steps.shape[0] + (other is None and x.device.type == "cpu")
        rows = torch.where(found[rows] == t, rows, none)
        try:
            return ops.q_sample(x, rows, noise, *tables)
        except IndexError:
            return None

    def _searched(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, int | None]:
        """Which step each timestep is, by the scheduler's own search.

        Returns:
            The K different timesteps from the smallest, float64; the same and NaN, which no
            timestep equals; the step of each [K]; and the step of all other timesteps, None where
            they are an error.
        """
        schedule = self.timesteps.cpu()
        different = sorted(set(schedule.tolist()))
        steps = [self.index_for_timestep(value, schedule) for value in different]
        try:
            other: int | None = self.index_for_timestep(math.nan, schedule)
        except IndexError:
            other = None
        found = torch.tensor([*different, math.nan], dtype=torch.float64, device=device)
        return found[:-1], found, torch.tensor(steps, dtype=torch.int64, device=device), other

    def _levels(self, x: Tensor) -> list[tuple[float, float]] | None:
        """Both factors of each step for images x; None if the sigmas are on an accelerator."""
        if self.sigmas.device.type != "cpu":  # reading them would wait for the device
            return None

        def make() -> list[tuple[float, float]]:
            sigmas = self.sigmas.to(x.dtype if self.strict_compat else torch.float64)
            signal, sigma = self._coefficients(sigmas)
            return list(zip(signal.tolist(), sigma.tolist(), strict=True))

        return self._kept(("steps' levels", x.dtype, self.strict_compat), (self.sigmas,), make)


class SigmaNoising(_LevelNoising):
    """x0 + sigma noise, for Euler, Euler ancestral, Heun, KDPM2, LMS and EDM's two schedulers."""

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noise images to the levels of their timesteps (Karras et al. 2022, arXiv:2206.00364).

        Args:
            original_samples: [N, ...], floating point.
            noise: like the images.
            timesteps: [N] or [1], of the scheduler's timesteps. During a denoising run, or once
                ``set_begin_index`` was called, the level is that of the step instead.

        Returns:
            x0 + sigma noise, like the images.

        Raises:
            IndexError: a timestep that the scheduler does not have. On an accelerator, which is not
                waited for, its image is NaN.
        """
        noised = self._noised(original_samples, noise, timesteps)
        if noised is not None:
            return noised
        return super().add_noise(original_samples, noise, timesteps)  # type: ignore[misc]

    def _coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(sigma), sigma


class EulerNoising(SigmaNoising):
    """For the Euler scheduler, which knows the velocity too."""

    alphas_cumprod: Tensor

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The velocity of images (Salimans & Ho 2022, arXiv:2202.00512, appendix D).

        Args:
            sample: [N, ...], clean images, floating point.
            noise: like the images.
            timesteps: [N] or [1], floating point, of the scheduler's timesteps.

        Returns:
            sqrt(abar) noise - sqrt(1 - abar) x0, like the images, where abar is the entry of
            ``alphas_cumprod`` at the timestep's place in ``timesteps``, as in diffusers.

        Raises:
            ValueError: integer timesteps.
            IndexError: see :meth:`add_noise`.
        """
        if _fit(sample, noise, timesteps, (torch.float32, torch.float64)):
            velocity = self._at_timesteps(
                noise, sample, timesteps, self.alphas_cumprod, _velocity_factors
            )
            if velocity is not None:
                return velocity
        return super().get_velocity(sample, noise, timesteps)  # type: ignore[misc]


class AngleNoising(_LevelNoising):
    """alpha x0 + sigma noise, for the DPM-Solvers, UniPC and DEIS."""

    _sigma_to_alpha_sigma_t: Callable[[Tensor], tuple[Tensor, Tensor]]

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noise images to the levels of their timesteps (Lu et al. 2022, arXiv:2206.00927, eq. 1).

        Args:
            original_samples: [N, ...], floating point.
            noise: like the images.
            timesteps: [N] or [1], of the scheduler's timesteps; a timestep that it does not have is
                the last. During a denoising run, or once ``set_begin_index`` was called, the level
                is that of the step instead.

        Returns:
            alpha x0 + sigma noise, like the images.
        """
        noised = self._noised(original_samples, noise, timesteps)
        if noised is not None:
            return noised
        return super().add_noise(original_samples, noise, timesteps)  # type: ignore[misc]

    def _coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return self._sigma_to_alpha_sigma_t(sigma)


class FlowNoising(_LevelNoising):
    """(1 - sigma) x0 + sigma noise, for flow matching."""

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor | None = None) -> Tensor:
        """Noise images to the levels of their timesteps (Lipman et al. 2023, arXiv:2210.02747).

        Args:
            sample: [N, ...], floating point.
            timestep: [N] or [1], of the scheduler's timesteps. During a denoising run, or once
                ``set_begin_index`` was called, the level is that of the step instead.
            noise: like the images.

        Returns:
            (1 - sigma) x0 + sigma noise, like the images.

        Raises:
            IndexError: a timestep that the scheduler does not have. On an accelerator, which is not
                waited for, its image is NaN.
        """
        # The noise comes first, as in diffusers, whose result has the memory format of the first.
        noised = self._noised(noise, sample, timestep)
        if noised is not None:
            return noised
        return super().scale_noise(sample, timestep, noise)  # type: ignore[misc]

    def _coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return sigma, 1.0 - sigma


class VarianceExplodingNoising(KeptTables):
    """x0 + sigma noise, for ScoreSdeVe, whose timesteps are rows of ``discrete_sigmas``."""

    discrete_sigmas: Tensor

    def add_noise(
        self, original_samples: Tensor, noise: Tensor | None, timesteps: Tensor
    ) -> Tensor:
        """Noise images to their timesteps (Song et al. 2021, arXiv:2011.13456, eq. 31).

        Args:
            original_samples: [N, C, H, W], floating point.
            noise: like the images; None draws it.
            timesteps: [N] or [1], int64, rows of ``discrete_sigmas``.

        Returns:
            x0 + sigma noise, in the wider of the dtypes of images and sigmas.

        Raises:
            IndexError: a timestep outside the schedule. On an accelerator, which is not waited for,
                its image is NaN.
        """
        x = original_samples
        if isinstance(x, Tensor) and x.ndim == 4 and x.dtype == self.discrete_sigmas.dtype:
            noise = torch.randn_like(x) if noise is None else noise
            if _fit(x, noise, timesteps, _INTEGERS):

                def make() -> tuple[Tensor, Tensor]:
                    sigma = self.discrete_sigmas.to(x.device)
                    return torch.ones_like(sigma), sigma

                tables = self._kept(("ve", x.device), (self.discrete_sigmas,), make)
                try:
                    return ops.q_sample(x, _of_each(timesteps, x), noise, *tables)
                except IndexError:
                    pass
        return super().add_noise(x, noise, timesteps)  # type: ignore[misc]


def _fit(x: Tensor, noise: Tensor | None, t: Tensor, dtypes: tuple[torch.dtype, ...]) -> bool:
    """Whether ``q_sample`` takes these images and this noise, with t [N] or [1] of ``dtypes``."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or type(noise) is not Tensor:
        return False
    return (
        x.dtype in _IMAGES
        and noise.dtype == x.dtype
        and noise.shape == x.shape
        and noise.device == x.device
        and x.layout == noise.layout == torch.strided
        and x.ndim > 0
        and type(t) is Tensor
        and t.ndim == 1
        and t.dtype in dtypes
        and t.shape[0] in (1, x.shape[0])
    )


def _of_each(t: Tensor, x: Tensor) -> Tensor:
    """The timestep of each image, [N] beside the images x, of t [N] or [1]."""
    t = t if t.device == x.device else t.to(x.device)
    return t if t.shape[0] == x.shape[0] else t.expand(x.shape[0])


def _precise(source: Tensor, x: Tensor, strict: bool) -> Tensor:
    """``source`` on x's device, in the dtype in which coefficients of x are made."""
    return source.to(x.device, x.dtype if strict else torch.float64)


def _roots_of(abar: Tensor) -> tuple[Tensor, Tensor]:
    return abar**0.5, (1 - abar) ** 0.5


def _velocity_factors(abar: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the noise and of the image in the velocity."""
    signal, sigma = _roots_of(abar)
    return signal, -sigma
