"""The installed k-diffusion beside ours: the same arguments, images and callbacks."""

from __future__ import annotations

import inspect

import pytest
import torch

import fastdiff.k_diffusion as K

theirs = pytest.importorskip("k_diffusion.sampling")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:torchsde is not installed"),
]
NAMES = [name for name in dir(theirs) if name.startswith("sample_")]
BETWEEN = ("sample_dpm_fast", "sample_dpm_adaptive")  # given two levels, not all of them


def model(x, sigma, scale=1.0):
    return scale * torch.sin(x) / 2 + 0.3 * x / (1 + sigma.view(-1, 1, 1, 1) ** 2)


@pytest.mark.parametrize("name", NAMES)
def test_signatures(name):
    found, wanted = (inspect.signature(getattr(each, name)) for each in (K, theirs))
    assert list(found.parameters) == list(wanted.parameters)
    for key, parameter in wanted.parameters.items():
        assert found.parameters[key].default == parameter.default, key


@pytest.mark.parametrize("name", NAMES)
def test_runs(name):
    x = 10 * torch.randn(2, 3, 4, 4, dtype=torch.float64)
    levels = (0.03, 10.0) if name in BETWEEN else (K.get_sigmas_karras(8, 0.03, 10.0).double(),)
    levels += (11,) if name == "sample_dpm_fast" else ()
    runs = []
    for module in (K, theirs):
        sample, seen = getattr(module, name), []
        torch.manual_seed(0)
        noise = {}
        if "noise_sampler" in inspect.signature(sample).parameters:
            noise = {"noise_sampler": lambda before, after: torch.randn_like(x)}
        images = sample(
            model,
            x,
            *levels,
            extra_args={"scale": 0.9},
            callback=seen.append,
            disable=True,
            **noise,
        )
        runs.append((images, seen))
    # k-diffusion has the levels of these two in float32.
    rounding = 1e-5 if name in BETWEEN else 1e-9
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=rounding, atol=rounding)
    for ours, other in zip(runs[0][1], runs[1][1], strict=True):
        assert set(ours) == set(other)
        for key in ("x", "denoised", "sigma", "sigma_hat"):
            torch.testing.assert_close(
                ours[key].double(), other[key].double(), rtol=rounding, atol=rounding
            )


def test_grids():
    """k-diffusion computes in float32; exp(...) - 1 near 0 then loses three digits."""
    for name, arguments, rounding in (
        ("get_sigmas_karras", (9, 0.03, 10.0), 2e-5),
        ("get_sigmas_exponential", (9, 0.03, 10.0), 2e-5),
        ("get_sigmas_polyexponential", (9, 0.03, 10.0, 1.5), 2e-5),
        ("get_sigmas_vp", (9,), 1e-3),
    ):
        found, wanted = (getattr(module, name)(*arguments) for module in (K, theirs))
        torch.testing.assert_close(found, wanted, rtol=rounding, atol=0)
