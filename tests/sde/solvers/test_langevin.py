"""Langevin dynamics: correctors within ``solve``, and annealed sampling, in float64."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from fastdiff.common.checks import beside
from fastdiff.sde import VE, VP, solvers
from fastdiff.sde.solvers import langevin

solve = partial(solvers.solve, progress=False)
annealed_langevin = partial(langevin.annealed_langevin, progress=False)
pytestmark = pytest.mark.usefixtures("one_thread")


def corrected(sde, x, score, seed=5, **options):
    """What a corrector makes of x at time sde.smallest.

    x is that of one step of the probability flow before it, with a score that is 0 there.
    """
    at_end = torch.tensor(sde.end).double()

    def of_time(x, t):
        return torch.zeros_like(x) if bool((t == at_end).all()) else score(x, t)

    generator = torch.Generator().manual_seed(seed)
    return solve(
        of_time, sde, x, 1, method="reverse-diffusion", denoise=False, generator=generator,
        **options,
    )  # fmt: skip


def test_langevins_step_is_the_published_one(generator):
    """2 alpha (snr |z| / |score|)^2 with each image's norms, alpha that of the step before."""
    sde = VP()
    sde.smallest = 0.95
    x = torch.randn(3, 2, 4, generator=generator, dtype=torch.float64)
    scale = torch.tensor([1.0, 3.0, 0.2]).view(3, 1, 1).double()
    score = lambda x, t: scale * x.cos()  # noqa: E731
    for steps in (1, 2):
        found = corrected(sde, x, score, corrector="langevin", snr=0.2, corrector_steps=steps)
        levels, _ = sde.levels(torch.tensor([1.0, 0.95], dtype=torch.float64))
        alpha = levels[0] / levels[1]
        draws = torch.Generator().manual_seed(5)
        draw = partial(torch.randn, x.shape, generator=draws, dtype=torch.float64)
        wanted = (2 - alpha) * x + (1 - alpha**2).sqrt() * draw()
        for _ in range(steps):
            g, z = score(wanted, None), draw()
            norms = [v.flatten(1).norm(dim=1).view(3, 1, 1) for v in (z, g)]
            step = 2 * alpha**2 * (0.2 * norms[0] / norms[1]) ** 2
            wanted = wanted + step * g + (2 * step).sqrt() * z
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_the_annealed_step_is_a_share_of_the_noise(generator):
    sde = VE(0.1, 10.0)
    sde.smallest = 0.5  # sigma = 1
    x = torch.randn(3, 2, 4, generator=generator, dtype=torch.float64)
    found = corrected(sde, x, lambda x, t: x.cos(), corrector="annealed-langevin", snr=0.3)
    draws = torch.Generator().manual_seed(5)
    draw = partial(torch.randn, x.shape, generator=draws, dtype=torch.float64)
    x = x + math.sqrt(99) * draw()
    wanted = x + 0.18 * x.cos() + 0.6 * draw()
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_an_image_does_not_depend_on_those_beside_it(generator):
    x = torch.randn(2, 3, 4, generator=generator)
    other = x.clone()
    other[1] *= 100
    score = lambda x, t: -x / 3  # noqa: E731
    one, two = (corrected(VP(), batch, score, corrector="langevin") for batch in (x, other))
    assert torch.equal(one[0], two[0])
    assert not torch.equal(one[1], two[1])


def test_a_score_of_0_takes_no_step(generator):
    x = torch.randn(2, 3, 4, generator=generator)
    still = lambda x, t: torch.zeros_like(x)  # noqa: E731
    plain = corrected(VP(), x, still)
    assert torch.equal(corrected(VP(), x, still, corrector="langevin"), plain)


@pytest.mark.parametrize(("snr", "corrector"), [(0.16, "langevin"), (0.4, "langevin"),
                                                (0.16, "annealed-langevin"),
                                                (0.4, "annealed-langevin")])  # fmt: skip
def test_the_exact_marginal_is_nearly_kept(snr, corrector, generator):
    """A step e = 2 snr^2 v makes of variance v (1 - e/v)^2 v + 2 e = (1 + 4 snr^4) v.

    Of a single image at sigma, ancestral sampling gives N(0, sigma^2) in one step; |score| is then
    |z| / sigma to 1%, so that both correctors take that step.
    """
    sde = VE(0.1, 10.0)
    sde.smallest = 0.5  # sigma = 1

    def score(x, t):
        return -x / beside(sde.levels(t)[1], x) ** 2

    x_T = 10 * torch.randn(128, 64, 128, generator=generator)
    x = solve(
        score, sde, x_T, 1, method="ancestral", corrector=corrector, snr=snr, denoise=False,
        generator=generator,
    )  # fmt: skip
    standard_error = math.sqrt(2 / x.numel())
    assert abs(x.mean().item()) < 3 / math.sqrt(x.numel())
    assert abs(x.var().item() / (1 + 4 * snr**4) - 1) < 3 * standard_error


WEIGHTS, CENTRES, WIDTH = (0.8, 0.2), (-2.0, 2.0), 0.2


def mixture_score(x, sigma):
    """Of two Gaussians far apart, given the noise."""
    variance = WIDTH**2 + beside(sigma, x) ** 2
    apart = torch.stack([centre - x for centre in CENTRES])
    weights = torch.tensor(WEIGHTS, dtype=x.dtype).log().view(2, 1, 1)
    share = (weights - apart**2 / (2 * variance)).softmax(0)
    return (share * apart).sum(0) / variance


def test_annealing_finds_the_weights_of_two_modes(generator):
    """Langevin dynamics at the last level alone does not (Song & Ermon 2019, section 3.2.2)."""
    count = 8000
    sigmas = torch.logspace(math.log10(8), -1, 24, dtype=torch.float64)
    start = 8 * torch.randn(count, 1, generator=generator, dtype=torch.float64)
    x = annealed_langevin(mixture_score, sigmas, start, 150, 2e-3, generator=generator)
    standard_error = math.sqrt(WEIGHTS[0] * WEIGHTS[1] / count)
    share = (x < 0).double().mean().item()
    assert abs(share - WEIGHTS[0]) < 3 * standard_error
    for side, centre in ((x < 0, CENTRES[0]), (x > 0, CENTRES[1])):
        mode = x[side]
        assert abs(mode.mean().item() - centre) < 4 * WIDTH / math.sqrt(mode.numel())

    alone = annealed_langevin(mixture_score, sigmas[-1:], start, 1000, 2e-3, generator=generator)
    assert abs((alone < 0).double().mean().item() - WEIGHTS[0]) > 20 * standard_error


def test_annealed_langevin_is_algorithm_1(generator):
    x = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    seen = []

    def score(x, sigma):
        seen.append(sigma)
        return x.cos() / beside(sigma, x)

    draws = [torch.Generator().manual_seed(4) for _ in range(2)]
    options = {"steps_each": 3, "step": 0.02, "generator": draws[0]}
    found = annealed_langevin(score, [2.0, 1.0, 0.5], x, **options)
    for sigma in (2.0, 1.0, 0.5):
        size = 0.02 * sigma**2 / 0.5**2
        for _ in range(3):
            z = torch.randn(2, 3, generator=draws[1], dtype=torch.float64)
            x = x + size / 2 * x.cos() / sigma + math.sqrt(size) * z
    x = x + 0.5**2 * x.cos() / 0.5
    torch.testing.assert_close(found, x, rtol=1e-12, atol=1e-12)
    assert [sigma.tolist() for sigma in seen] == [[s, s] for s in [2.0] * 3 + [1.0] * 3 + [0.5] * 4]
    assert seen[0].dtype == torch.float64


def test_without_denoising_some_noise_is_left(generator):
    sigmas, x = (1.0, 0.3), torch.zeros(2, 3)
    score = lambda x, sigma: -x / beside(sigma, x) ** 2  # noqa: E731
    options = {"steps_each": 2, "step": 0.01}
    noisy, clean = (
        annealed_langevin(
            score, sigmas, x, denoise=denoise, generator=torch.Generator().manual_seed(1), **options
        )
        for denoise in (False, True)
    )
    assert noisy.std() > 0.01
    torch.testing.assert_close(clean, torch.zeros(2, 3), rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_small_steps_are_not_lost(dtype):
    """1000 of 1e-3 / 2: a bfloat16 of 1 would take none of them."""
    x = torch.ones(2, 3, dtype=dtype)

    def score(x, sigma):
        assert x.dtype == dtype
        return torch.ones_like(x)

    generator = torch.Generator().manual_seed(2)
    found = annealed_langevin(score, [1.0], x, 1000, 1e-3, denoise=False, generator=generator)
    assert found.dtype == dtype
    again = torch.Generator().manual_seed(2)
    noise = sum(torch.randn(2, 3, generator=again).double() for _ in range(1000))
    wanted = 1.5 + math.sqrt(1e-3) * noise
    rtol = 2**-8 if dtype == torch.bfloat16 else 0
    # 1000 roundings of numbers below 4 in float32
    torch.testing.assert_close(found.double(), wanted, rtol=rtol, atol=1000 * 2**-23)


def test_a_score_that_is_not_finite():
    def score(x, sigma):
        wrong = torch.zeros_like(x)
        wrong[2, 1] = math.inf if sigma[0] < 1 else 0
        return wrong

    x = torch.zeros(3, 4)
    with pytest.raises(FloatingPointError, match=r"step 5 \(t = 0.5\): .*: 1 of image 2$"):
        annealed_langevin(score, [1.0, 0.5], x, 5, check_finite=True)
    annealed_langevin(score, [1.0, 0.5], x, 5)


X = torch.zeros(2, 3)


def still(x, sigma):
    return torch.zeros_like(x)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: annealed_langevin(still, [], X), ValueError, r"\[L\] with L >= 1, got \(0,\)"),
        (lambda: annealed_langevin(still, 1.0, X), ValueError, r"\[L\] with L >= 1, got \(\)"),
        (lambda: annealed_langevin(still, [1, 2], X), ValueError, r"fall, got \[1.0, 2.0\]"),
        (lambda: annealed_langevin(still, [1, 0], X), ValueError, "positive and fall"),
        (lambda: annealed_langevin(still, [math.nan], X), ValueError, "positive and fall"),
        (lambda: annealed_langevin(still, [1], X, 0), ValueError, "steps_each .* least 1, got 0"),
        (lambda: annealed_langevin(still, [1], X, 1.5), TypeError, "whole number, got 1.5"),
        (lambda: annealed_langevin(still, [1], X, step=0.0), ValueError, "step must be positive"),
        (lambda: annealed_langevin(still, [1], X[0]), ValueError, r"\[N, ...\], got \(3,\)"),
        (lambda: annealed_langevin(still, [1], X.int()), TypeError, "x must be floating point"),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()
