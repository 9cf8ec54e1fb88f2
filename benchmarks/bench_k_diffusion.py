"""The cost of k-diffusion's samplers apart from the model: fastdiff's against k-diffusion's own.

The model returns its input at no cost, so all that is timed is the rest of each step. Both take the
same steps with the same noise; for both, the number of calls that reach PyTorch's dispatcher in one
step is printed. Noise is drawn by ``torch.randn_like`` in both, also where k-diffusion's default is
a Brownian path.
"""

from __future__ import annotations

import inspect

import pytest
import torch
from accuracy import CountCalls

import fastdiff.k_diffusion as K

theirs = pytest.importorskip("k_diffusion.sampling")

SHAPE, STEPS = (2, 4, 64, 64), 20
NAMES = (
    "euler", "heun", "euler_ancestral", "dpm_2", "lms", "dpmpp_2m", "dpmpp_2s_ancestral",
    "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde",
)  # fmt: skip


def free(x, sigma):
    return x


@pytest.mark.parametrize("name", NAMES)
def bench_k_diffusion(versus, name) -> None:
    x = 14.6 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    ours, other = (getattr(module, f"sample_{name}") for module in (K, theirs))
    noise = {}
    if "noise_sampler" in inspect.signature(ours).parameters:
        noise = {"noise_sampler": lambda before, after: torch.randn_like(x)}

    def run(sample, steps=STEPS):
        torch.manual_seed(0)
        sigmas = K.get_sigmas_karras(steps, 0.03, 14.6)
        return sample(free, x, sigmas, disable=True, **noise)

    torch.testing.assert_close(run(ours), run(other), rtol=1e-3, atol=1e-3)
    calls = [(_calls(run, sample, 20) - _calls(run, sample, 10)) / 10 for sample in (ours, other)]
    versus(
        lambda: run(ours),
        {"k-diffusion": lambda: run(other)},
        notes=lambda comparison: {
            "us a step": f"{comparison.ours / STEPS * 1e6:.1f}",
            "dispatcher calls": f"{calls[0]:g} and {calls[1]:g}",
        },
    )


def _calls(run, sample, steps) -> int:
    run(sample, steps)  # makes the table
    with CountCalls() as counted:
        run(sample, steps)
    return len(counted.names)
