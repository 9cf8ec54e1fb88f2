"""Fixed-step solvers: exact moments for Gaussian images, published steps, mixtures, in float64."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from scipy import stats

from fastdiff import schedules
from fastdiff.common.checks import beside
from fastdiff.sde import EDM, VE, VP, Interpolated, SubVP
from fastdiff.sde.solvers import fixed_steps

MEAN, SPREAD = 0.4, 0.7  # images are N(MEAN, SPREAD^2) in every pixel
METHODS = ["euler-maruyama", "reverse-diffusion", "ancestral", "probability-flow"]
INTERPOLATED = Interpolated(schedules.linear(100, 1e-3, 0.2))
SDES = [
    pytest.param(VP(), id="vp"),
    pytest.param(SubVP(), id="sub-vp"),
    pytest.param(VE(0.05, 5.0), id="ve"),
    pytest.param(EDM(0.02, 10.0), id="edm"),
    pytest.param(INTERPOLATED, id="interpolated"),
]
pytestmark = pytest.mark.usefixtures("one_thread")
solve = partial(fixed_steps.solve, progress=False)


def gaussian_score(sde, spread=SPREAD):
    def score(x, t):
        alpha, sigma = (beside(level, x) for level in sde.levels(t))
        return -(x - alpha * MEAN) / (alpha**2 * spread**2 + sigma**2)

    return score


def marginal(sde, t, spread=SPREAD):
    """Mean and variance of x_t."""
    alpha, sigma = (level.item() for level in sde.levels(torch.tensor(t, dtype=torch.float64)))
    return alpha * MEAN, alpha**2 * spread**2 + sigma**2


def moments(monkeypatch, sde, steps, *, spread=SPREAD, draws=1, **options):
    """Exact mean and variance of what ``solve`` gives, begun with the exact marginal.

    For a linear score the result is a linear function of x_T and of every draw of noise, pixel by
    pixel. Pixel 0 begins with the mean and gets no noise, pixel 1 with one deviation more, and
    pixel 2 + k gets 1 for the k-th draw: their distances from pixel 0 make up the variance.
    """
    mean, variance = marginal(sde, sde.end, spread)
    x_T = torch.full((1, 2 + steps * draws), mean, dtype=torch.float64)
    x_T[0, 1] += math.sqrt(variance)
    pixels = iter(range(2, x_T.shape[1]))

    def one_for_each(x, generator):
        z = torch.zeros_like(x)
        z[0, next(pixels)] = 1
        return z

    monkeypatch.setattr(fixed_steps, "normal", one_for_each)
    x = solve(gaussian_score(sde, spread), sde, x_T, steps, **options)[0]
    return x[0].item(), (x[1:] - x[0]).square().sum().item()


@pytest.mark.parametrize("sde", SDES)
@pytest.mark.parametrize("method", METHODS)
def test_moments_tend_to_the_datas_with_order_1(method, sde, monkeypatch):
    # A multiple of 99: so no step crosses a corner of the interpolated schedule.
    first = 2000 if isinstance(sde, VE) else 990
    wanted, errors = marginal(sde, sde.smallest), []
    for steps in (first, 2 * first):
        found = moments(monkeypatch, sde, steps, method=method, denoise=False)
        errors.append([a - b for a, b in zip(found, wanted, strict=True)])
    for coarse, fine in zip(*errors, strict=True):
        assert abs(fine) < 0.004
        if abs(fine) > 1e-12:  # some means are exact
            assert coarse / fine == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize("sde", SDES)
@pytest.mark.parametrize("steps", [1, 3, 10])
def test_ancestral_is_exact_for_a_single_image(steps, sde, monkeypatch):
    exact = partial(moments, monkeypatch, sde, steps, method="ancestral", spread=0.0)
    assert exact(denoise=False) == pytest.approx(marginal(sde, sde.smallest, 0.0), rel=1e-10)
    mean, variance = exact()
    assert mean == pytest.approx(MEAN, rel=1e-10)
    assert variance < 1e-20


@pytest.mark.parametrize("sde", SDES)
@pytest.mark.parametrize("method", METHODS)
def test_denoising_is_the_expectation_of_the_image(method, sde, generator):
    alpha, sigma = sde.levels(torch.tensor(sde.smallest, dtype=torch.float64))
    x_T = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    noisy, clean = (
        solve(
            gaussian_score(sde), sde, x_T, 4, method=method, denoise=denoise,
            generator=torch.Generator().manual_seed(3),
        )
        for denoise in (False, True)
    )  # fmt: skip
    gain = alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2)
    torch.testing.assert_close(clean, MEAN + gain * (noisy - alpha * MEAN), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sde", SDES)
def test_correcting_improves_few_steps(sde, monkeypatch):
    """The variance after 20 steps comes nearer to the data's with every correction."""
    _, wanted = marginal(sde, sde.smallest)
    options = {"corrector": "annealed-langevin", "denoise": False}
    for method in ("reverse-diffusion", "ancestral"):
        _, plain = moments(monkeypatch, sde, 20, method=method, denoise=False)
        _, once = moments(monkeypatch, sde, 20, method=method, draws=2, **options)
        options_of_3 = options | {"corrector_steps": 3}
        _, thrice = moments(monkeypatch, sde, 20, method=method, draws=4, **options_of_3)
        assert abs(plain - wanted) > 1.03 * abs(once - wanted)
        assert abs(plain - wanted) > 1.1 * abs(thrice - wanted)


def one_step(sde, x, t, s, score, method):
    """A step of ``solve`` from t to s, its noise, and alpha and sigma at both."""
    levels = sde.levels(torch.tensor([t, s], dtype=torch.float64))
    sde.smallest = s
    found = solve(
        score, sde, x, 1, method=method, start=t, denoise=False,
        generator=torch.Generator().manual_seed(5),
    )  # fmt: skip
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=x.dtype)
    return found, z, [level.tolist() for level in levels]


@pytest.mark.parametrize("method", METHODS)
def test_steps_of_vp_are_the_published_ones(method, generator):
    """With a score that is not linear, x -> sin x; beta_i is that of the DDPM with this step."""
    x = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    t, s, score = 0.5, 0.45, torch.sin(x)
    found, z, ((a_t, a_s), (s_t, s_s)) = one_step(VP(), x, t, s, lambda x, t: x.sin(), method)
    beta, beta_i, h = 0.1 + t * 19.9, 1 - (a_t / a_s) ** 2, t - s
    x0 = (x + s_t**2 * score) / a_t
    posterior = (a_s * beta_i * x0 + math.sqrt(1 - beta_i) * s_s**2 * x) / s_t**2  # DDPM eq. 7
    wanted = {
        "euler-maruyama": x + (beta / 2 * x + beta * score) * h + math.sqrt(beta * h) * z,
        "probability-flow": x + beta / 2 * (x + score) * h,
        "reverse-diffusion": (2 - math.sqrt(1 - beta_i)) * x
        + beta_i * score
        + math.sqrt(beta_i) * z,
        "ancestral": posterior + math.sqrt(beta_i * s_s**2 / s_t**2) * z,
    }[method]
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["reverse-diffusion", "ancestral"])
def test_steps_of_ve_are_those_of_smld(method, generator):
    """Song et al. 2021, algorithm 2 and appendix F."""
    x = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    found, z, (_, (high, low)) = one_step(VE(0.1, 10.0), x, 1.0, 0.5, lambda x, t: x.sin(), method)
    assert (high, low) == pytest.approx((10, 1))
    mean = x + (high**2 - low**2) * x.sin()
    spread = high**2 - low**2 if method == "reverse-diffusion" else 0.99
    torch.testing.assert_close(found, mean + math.sqrt(spread) * z, rtol=1e-12, atol=1e-12)


def test_probability_flow_of_edm_is_eulers_method_of_karras(generator):
    """x moves by (x - D) / t times the step (Karras et al. 2022, alg. 1 without its correction)."""
    sde = EDM()
    x = 80 * torch.randn(2, 3, generator=generator, dtype=torch.float64)

    def denoiser(x, t):
        return 0.25 / (0.25 + beside(t, x) ** 2) * x + 0.1 * x.sin()

    def score(x, t):
        return (denoiser(x, t) - x) / beside(t, x) ** 2

    found = solve(score, sde, x, 17, method="probability-flow")
    i = torch.arange(18, dtype=torch.float64) / 17
    grid = (80 ** (1 / 7) + i * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    for t, s in zip(grid, [*grid[1:], torch.zeros(())], strict=True):
        x = x + (s - t) * (x - denoiser(x, t)) / t
    torch.testing.assert_close(found, x, rtol=1e-10, atol=1e-10)


WEIGHTS, CENTRES, WIDTH = (0.3, 0.7), (-1.0, 0.8), 0.25


def mixture_score(sde):
    """The score of two Gaussians, by their densities at t."""

    def score(x, t):
        alpha, sigma = (beside(level, x) for level in sde.levels(t))
        variance = alpha**2 * WIDTH**2 + sigma**2
        apart = torch.stack([alpha * centre - x for centre in CENTRES])
        weights = torch.tensor(WEIGHTS, dtype=x.dtype).log().view(2, *[1] * x.ndim)
        share = (weights - apart**2 / (2 * variance)).softmax(0)
        return (share * apart).sum(0) / variance

    return score


def mixture_cdf(x):
    return sum(
        w * stats.norm.cdf(x, centre, WIDTH) for w, centre in zip(WEIGHTS, CENTRES, strict=True)
    )


@pytest.mark.parametrize(
    "sde",
    [
        pytest.param(VP(), id="vp"),
        pytest.param(SubVP(), id="sub-vp"),
        pytest.param(VE(0.01, 20.0), id="ve"),
        pytest.param(EDM(0.01, 20.0), id="edm"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_mixtures_in_one_dimension(method, sde, generator):
    """Kolmogorov-Smirnov at 5%: the SDE and the ODE lead to the same distribution, the data's."""
    x_T = sde.prior_sample((4000, 1), generator=generator, dtype=torch.float64)
    x = solve(mixture_score(sde), sde, x_T, 600, method=method, generator=generator)
    assert stats.kstest(x.flatten().numpy(), mixture_cdf).pvalue > 0.05
    # so many images tell a wrong width, or a wrong weight
    wrong = 1.1 * (x - x.mean()) + x.mean()
    assert stats.kstest(wrong.flatten().numpy(), mixture_cdf).pvalue < 0.01
