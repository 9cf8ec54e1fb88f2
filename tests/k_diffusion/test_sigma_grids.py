"""Grids of levels and the small formulas."""

from __future__ import annotations

import math

import pytest
import torch

import fastdiff.k_diffusion as K

HIGH, LOW = 14.6, 0.03


@pytest.mark.parametrize("n", [1, 2, 10])
def test_grids(n):
    shares = [i / max(n - 1, 1) for i in range(n)]
    rho = 7.0
    ends = HIGH ** (1 / rho), LOW ** (1 / rho)
    wanted = {
        K.get_sigmas_karras: [(ends[0] + u * (ends[1] - ends[0])) ** rho for u in shares],
        K.get_sigmas_exponential: [HIGH * (LOW / HIGH) ** u for u in shares],
        K.get_sigmas_polyexponential: [HIGH * (LOW / HIGH) ** u for u in shares],
    }
    for function, levels in wanted.items():
        found = function(n, LOW, HIGH)
        assert found.dtype == torch.float32
        assert found.tolist() == pytest.approx([*levels, 0.0], rel=1e-6)
    found = K.get_sigmas_polyexponential(n, LOW, HIGH, rho=2.0)
    logs = [math.log(LOW) + (1 - u) ** 2 * math.log(HIGH / LOW) for u in shares]
    assert found[:-1].log().tolist() == pytest.approx(logs, abs=1e-5)
    times = [1 + u * (1e-3 - 1) for u in shares]
    levels = [math.sqrt(math.exp(19.9 * t * t / 2 + 0.1 * t) - 1) for t in times]
    assert K.get_sigmas_vp(n).tolist() == pytest.approx([*levels, 0.0], rel=1e-6)


def test_slopes_and_ancestral_steps():
    x, denoised = torch.full((2, 1, 3), 5.0), torch.ones(2, 1, 3)
    found = K.to_d(x, torch.tensor([2.0, 4.0]), denoised)
    assert found[:, 0, 0].tolist() == [2.0, 1.0]
    assert torch.equal(K.to_d(x, torch.tensor(2.0), denoised), (x - denoised) / 2)
    for level in (float, torch.tensor):
        down, up = K.get_ancestral_step(level(5.0), level(3.0), eta=1.0)
        assert (float(down), float(up)) == pytest.approx((9 / 5, 12 / 5))
        assert K.get_ancestral_step(level(5.0), level(3.0), eta=0.0) == (3.0, 0.0)
        down, up = K.get_ancestral_step(level(5.0), level(3.0), eta=9.0)  # no more than there is
        assert (float(down), float(up)) == (0.0, 3.0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: K.get_sigmas_karras(0, LOW, HIGH), ValueError, "n must be at least 1, got 0"),
        (lambda: K.get_sigmas_vp(1.5), TypeError, "whole number, got 1.5"),
        (lambda: K.get_sigmas_exponential(3, HIGH, LOW), ValueError, "sigma_min < sigma_max"),
        (lambda: K.get_sigmas_exponential(3, 0.0, LOW), ValueError, "0 < sigma_min"),
        (lambda: K.get_sigmas_karras(3, LOW, HIGH, rho=0.0), ValueError, "rho must be positive"),
    ],
    ids=["no levels", "half a level", "crossed", "zero", "rho"],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()
