"""k-diffusion's samplers, by its names and signatures, run as tables of one fused step.

``import fastdiff.k_diffusion as K`` stands in for ``k_diffusion.sampling``. It also has
``K.sample_<name>`` for every sampler of ``fastdiff.samplers.names()``, with ``_`` for ``-``. Where
a name is both, as ``sample_dpm_2``, it is k-diffusion's sampler.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from fastdiff import samplers
from fastdiff.common.model import Model
from fastdiff.k_diffusion.brownian_tree import BrownianTreeNoiseSampler
from fastdiff.k_diffusion.denoising import Callback, NoiseSampler, denoise
from fastdiff.k_diffusion.dpm_solvers import sample_dpm_adaptive, sample_dpm_fast
from fastdiff.k_diffusion.named import (
    sample_dpm_2,
    sample_dpm_2_ancestral,
    sample_dpmpp_2m,
    sample_dpmpp_2m_sde,
    sample_dpmpp_2s_ancestral,
    sample_dpmpp_3m_sde,
    sample_dpmpp_sde,
    sample_euler,
    sample_euler_ancestral,
    sample_heun,
    sample_lms,
)
from fastdiff.k_diffusion.sigma_grids import (
    append_zero,
    get_ancestral_step,
    get_sigmas_exponential,
    get_sigmas_karras,
    get_sigmas_polyexponential,
    get_sigmas_vp,
    to_d,
)

__all__ = [
    "BrownianTreeNoiseSampler", "append_zero", "get_ancestral_step", "get_sigmas_exponential",
    "get_sigmas_karras", "get_sigmas_polyexponential", "get_sigmas_vp", "sample_dpm_2",
    "sample_dpm_2_ancestral", "sample_dpm_adaptive", "sample_dpm_fast", "sample_dpmpp_2m",
    "sample_dpmpp_2m_sde", "sample_dpmpp_2s_ancestral", "sample_dpmpp_3m_sde", "sample_dpmpp_sde",
    "sample_euler", "sample_euler_ancestral", "sample_heun", "sample_lms", "to_d",
]  # fmt: skip

# Every sampler of the registry by its name here; the functions imported above come first.
_REGISTRY = {f"sample_{name.replace('-', '_')}": name for name in samplers.names()}


def __getattr__(name: str) -> Callable[..., Tensor]:
    if name not in _REGISTRY:
        raise AttributeError(f"module 'fastdiff.k_diffusion' has no attribute {name!r}")
    # LCM's boundary condition is one of timesteps; a denoiser of sigma meets it by itself.
    defaults = {"timestep_scaling": None} if name == "sample_lcm" else {}

    def sample(
        model: Model,
        x: Tensor,
        sigmas: Tensor,
        extra_args: Mapping[str, Any] | None = None,
        callback: Callback | None = None,
        disable: bool | None = None,
        noise_sampler: NoiseSampler | None = None,
        **options: Any,
    ) -> Tensor:
        return denoise(
            _REGISTRY[name], model, x, sigmas, extra_args, callback, disable,
            noise_sampler=noise_sampler, **defaults | options,
        )  # fmt: skip

    sample.__name__ = sample.__qualname__ = name
    sample.__doc__ = f"``samplers.make({_REGISTRY[name]!r}, ...)``, see ``denoising.denoise``."
    return sample


def __dir__() -> list[str]:
    return sorted({*globals(), *_REGISTRY})
