"""Continuous-time processes: rates against levels, published values, priors, refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastdiff import schedules
from fastdiff.sde import EDM, VE, VP, Interpolated, Straight, SubVP

LINEAR, COSINE = schedules.linear(), schedules.cosine()
SDES = [
    pytest.param(VP(), id="vp"),
    pytest.param(VP(0.5, 3.0), id="weak-vp"),
    pytest.param(SubVP(), id="sub-vp"),
    pytest.param(VE(), id="ve"),
    pytest.param(VE(0.1, 3.0), id="weak-ve"),
    pytest.param(EDM(), id="edm"),
    pytest.param(Straight(), id="straight"),
    pytest.param(Straight(50, 3.0), id="shifted-straight"),
    pytest.param(Interpolated(LINEAR), id="linear"),
    pytest.param(Interpolated(COSINE), id="cosine"),
    pytest.param(Interpolated(schedules.cosine(7)), id="cosine-of-7"),
]
ZERO = torch.zeros(1, dtype=torch.float64)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def times(sde, count=64):
    """Times over the whole range, float64."""
    share = torch.rand(count, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return sde.smallest + (sde.end - sde.smallest) * share


@pytest.mark.parametrize("sde", SDES)
def test_rates_follow_from_levels(sde):
    """f = alpha'/alpha and g^2 = (sigma^2)' - 2 f sigma^2, by automatic differentiation."""
    t = times(sde).requires_grad_()
    alpha, sigma = sde.levels(t)
    constant = 0 * t.sum()  # so that an alpha that is 1 has a gradient, too
    (alpha_rate,) = torch.autograd.grad(alpha.sum() + constant, t, retain_graph=True)
    (power_rate,) = torch.autograd.grad((sigma**2).sum(), t)
    f, squared = sde.rates(t.detach())
    torch.testing.assert_close(f, alpha_rate / alpha.detach(), rtol=1e-11, atol=1e-13)
    expected = power_rate - 2 * f * sigma.detach() ** 2
    torch.testing.assert_close(squared, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("sde", SDES)
def test_levels_are_the_moments_of_the_forward_sde(sde):
    """dm/dt = f m and dv/dt = 2 f v + g^2 from t = 0, in Gauss-Legendre quadrature.

    So log m is the integral of f, and v / m^2 grows by that of g^2 / m^2.
    """
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(10))
    edges = torch.linspace(0, sde.end, 7001, dtype=torch.float64)  # each schedule's timesteps
    half = edges.diff() / 2
    inside = edges[:-1, None] + half[:, None] * (1 + nodes)
    f, squared = sde.rates(inside)
    log_mean = torch.cat([ZERO, (f * weights).sum(1) * half]).cumsum(0)
    alpha, sigma = sde.levels(edges)
    torch.testing.assert_close(alpha.log(), log_mean, rtol=1e-11, atol=1e-12)

    inner, _ = sde.levels(inside)
    growth = (squared / inner**2 * weights).sum(1) * half
    ratio = sigma[0] ** 2 + torch.cat([ZERO, growth]).cumsum(0)
    torch.testing.assert_close(sigma**2, ratio * alpha**2, rtol=1e-10, atol=1e-13)


def test_vp_is_the_integral_of_beta():
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    alpha, sigma = VP().levels(t)
    integral = [0.0, 0.1 * 0.5 + 19.9 * 0.125, 0.1 + 19.9 * 0.5]
    assert (alpha**2).tolist() == pytest.approx([math.exp(-value) for value in integral], rel=1e-13)
    assert (sigma**2).tolist() == pytest.approx(
        [-math.expm1(-value) for value in integral], rel=1e-13
    )
    f, squared = VP().rates(t)
    assert squared.tolist() == pytest.approx([0.1, 10.05, 20.0])
    assert f.tolist() == pytest.approx([-0.05, -5.025, -10.0])


def test_vp_is_the_limit_of_ddpm():
    """Betas of 0.1 / T to 20 / T: abar tends to alpha^2, at a rate of 1 / T."""
    wanted = VP().levels(torch.tensor(1.0, dtype=torch.float64))[0] ** 2
    error = {}
    for T in (1000, 10000, 100000):
        found = schedules.linear(T, 0.1 / T, 20 / T).alphas_cumprod[-1]
        error[T] = abs(found / wanted - 1).item()
    assert error[1000] / error[10000] == pytest.approx(10, rel=0.1)
    assert error[10000] / error[100000] == pytest.approx(10, rel=0.02)


def test_sub_vp_has_the_square_of_vps_deviation():
    t = times(VP())
    alpha, sigma = SubVP().levels(t)
    vp_alpha, vp_sigma = VP().levels(t)
    torch.testing.assert_close(alpha, vp_alpha, rtol=0, atol=0)
    torch.testing.assert_close(sigma, vp_sigma**2, rtol=1e-12, atol=0)
    torch.testing.assert_close(sigma, 1 - alpha**2, rtol=1e-9, atol=0)
    assert bool((SubVP().diffusion(t) < VP().diffusion(t)).all())


def test_ve_is_geometric():
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    alpha, sigma = VE().levels(t)
    assert alpha.tolist() == [1, 1, 1]
    assert sigma.tolist() == pytest.approx([0.01, math.sqrt(0.5), 50], rel=1e-13)
    g = VE().diffusion(t)
    assert (g / sigma).tolist() == pytest.approx([math.sqrt(2 * math.log(5000))] * 3, rel=1e-13)


def test_edms_time_is_its_noise():
    t = times(EDM())
    alpha, sigma = EDM().levels(t)
    assert bool((alpha == 1).all())
    assert torch.equal(sigma, t)
    torch.testing.assert_close(EDM().diffusion(t), (2 * t).sqrt())
    assert (EDM().smallest, EDM().end) == (0.002, 80)


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_preconditioning_of_edm(sigma_data):
    """Its three defining properties (Karras et al. 2022, appendix B.6)."""
    t = times(EDM())
    skip, out, scale = EDM(sigma_data=sigma_data).preconditioning(t)
    one, data = torch.ones_like(t), sigma_data**2
    torch.testing.assert_close(scale**2 * (data + t**2), one)  # inputs of variance 1
    error = (1 - skip) ** 2 * data + skip**2 * t**2
    torch.testing.assert_close(error / out**2, one)  # targets of variance 1
    torch.testing.assert_close(skip * t**2, (1 - skip) * data)  # where that error is smallest
    half = EDM(sigma_data=0.5).preconditioning(torch.tensor(0.5, dtype=torch.float64))
    assert [value.item() for value in half] == pytest.approx([0.5, 0.5**1.5, 2**0.5])


@pytest.mark.parametrize(
    "schedule", [LINEAR, COSINE, schedules.cosine(7)], ids=["linear", "cosine", "cosine-of-7"]
)
def test_interpolated_is_its_schedule_at_timesteps(schedule):
    sde, T = Interpolated(schedule), schedule.num_timesteps
    t = torch.arange(1, T + 1, dtype=torch.float64) / T
    alpha, sigma = sde.levels(t)
    torch.testing.assert_close(alpha, schedule.alpha_t, rtol=1e-13, atol=0)
    torch.testing.assert_close(sigma, schedule.sigma_t, rtol=2e-12, atol=0)
    torch.testing.assert_close(sde.label(t), torch.arange(T).double(), rtol=0, atol=1e-9)
    assert sde.smallest == 1 / T


def test_interpolated_is_straight_in_log_alpha():
    sde = Interpolated(COSINE)
    alpha_t = torch.cat([torch.ones(1, dtype=torch.float64), COSINE.alpha_t])
    for share in (0.25, 0.5, 0.9):
        t = (torch.arange(1000, dtype=torch.float64) + share) / 1000
        alpha, sigma = sde.levels(t)
        between = alpha_t[:-1] ** (1 - share) * alpha_t[1:] ** share
        torch.testing.assert_close(alpha, between, rtol=1e-11, atol=0)
        torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t))


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.4])
def test_straight_reads_its_schedules_timesteps(shift):
    """At the sigma of each timestep but the last, beyond the end, the label is the same."""
    flow, sde = schedules.flow(40, shift), Straight(40, shift)
    kept = flow.sigma_t <= sde.end
    assert kept.tolist() == [True] * 39 + [False]
    alpha, sigma = sde.levels(flow.sigma_t[kept])
    torch.testing.assert_close(alpha, flow.alpha_t[kept])
    assert torch.equal(sigma, flow.sigma_t[kept])
    label = sde.label(flow.sigma_t)
    wanted = flow.labels_of(torch.arange(40), torch.float64).double()
    torch.testing.assert_close(label, wanted, rtol=0, atol=1e-9)
    by_timestep = Straight(40, shift, label_by="timestep")
    label = by_timestep.label(flow.sigma_t)
    torch.testing.assert_close(label, torch.arange(40).double(), rtol=0, atol=1e-10)
    assert repr(by_timestep) == f"Straight(num_timesteps=40, shift={shift}, label_by='timestep')"
    assert sde.smallest == flow.sigma_t[0].item()
    assert repr(sde) == f"Straight(num_timesteps=40, shift={shift})"


def test_the_flow_is_eps_minus_x0(generator):
    """f x - g^2 score / 2 of the straight path, given x_0."""
    x0, eps = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    for time in (0.01, 0.5, 0.999):
        t = torch.tensor(time, dtype=torch.float64)
        f, squared = Straight().rates(t)
        x = (1 - t) * x0 + t * eps
        torch.testing.assert_close(f * x + squared / 2 * eps / t, eps - x0, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("sde", SDES)
def test_levels_and_times_at_a_ratio(sde):
    """The inverse of sigma / alpha, from the first time to the last."""
    t = times(sde).sort().values
    t[0], t[-1] = sde.smallest, sde.end
    alpha, sigma = sde.levels(t)
    again = sde.levels_at(sigma / alpha)
    torch.testing.assert_close(again[0], alpha, rtol=1e-13, atol=0)
    torch.testing.assert_close(again[1], sigma, rtol=1e-13, atol=0)
    torch.testing.assert_close(sde.time_at(sigma / alpha), t, rtol=1e-10, atol=0)
    assert sde.time_at((sigma / alpha)[5]).shape == ()


def test_labels():
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    for sde in (VP(), SubVP(), VE()):
        assert sde.label(t).tolist() == [0, 499.5, 999]
    e = torch.tensor([math.exp(-4), 1, math.exp(2)], dtype=torch.float64)
    assert EDM().label(e).tolist() == pytest.approx([-1, 0, 0.5])


@pytest.mark.parametrize("sde", SDES)
def test_marginal_drift_and_snr(sde, generator):
    x = torch.randn(3, 2, 4, generator=generator, dtype=torch.float64)
    t = times(sde, 3)
    (alpha, sigma), (f, squared) = sde.levels(t), sde.rates(t)
    mean, deviation = sde.marginal(x, t)
    drift = sde.drift(x, t)
    for n in range(3):
        torch.testing.assert_close(mean[n], alpha[n].item() * x[n])
        torch.testing.assert_close(drift[n], f[n].item() * x[n])
    assert deviation.shape == (3, 1, 1)
    torch.testing.assert_close(deviation.flatten(), sigma)
    torch.testing.assert_close(sde.diffusion(t), squared.sqrt())
    torch.testing.assert_close(sde.snr(t), (alpha / sigma) ** 2)
    torch.testing.assert_close(sde.drift(x, t[1])[1], drift[1])
    torch.testing.assert_close(sde.marginal(x, t[1])[0][1], mean[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sde", [VP(), SubVP(), VE(0.01, 5.0)], ids=repr)
def test_images_are_rounded_once(sde, dtype, generator):
    x = torch.randn(64, 3, 4, generator=generator).to(dtype)
    t, eps = times(sde), torch.finfo(dtype).eps
    exact = sde.marginal(x.double(), t)[0], sde.drift(x.double(), t)
    for found, wanted in zip((sde.marginal(x, t)[0], sde.drift(x, t)), exact, strict=True):
        assert found.dtype == dtype
        rounding = 0.51 * eps if dtype.itemsize == 2 else 2 * eps
        bound = rounding * wanted.abs() + torch.finfo(dtype).smallest_normal
        assert bool(((found.double() - wanted).abs() <= bound).all())


def test_times_of_single_precision_are_taken_as_they_are():
    t = torch.tensor([0.1, 1.0])
    torch.testing.assert_close(VP().diffusion(t), VP().diffusion(t.double()), rtol=0, atol=0)
    assert VP().diffusion(t).dtype == torch.float64
    wide = EDM(sigma_max=0.1)  # 0.1 in float32 is a little more
    assert wide.check_time(torch.tensor([0.1])).dtype == torch.float64


@pytest.mark.parametrize("sde", SDES)
def test_the_priors_density(sde, generator):
    z = sde.prior_sample((5, 3, 4), generator=generator, dtype=torch.float64)
    normal = torch.distributions.Normal(0.0, torch.tensor(sde.prior_std, dtype=torch.float64))
    wanted = normal.log_prob(z).flatten(1).sum(1)
    torch.testing.assert_close(sde.prior_logp(z), wanted, rtol=1e-12, atol=1e-12)
    assert sde.prior_logp(z.float()).dtype == torch.float64


@pytest.mark.parametrize(
    ("sde", "deviation"),
    [(VP(), 1), (SubVP(), 1), (VE(0.1, 7), 7), (EDM(), 80), (Straight(), 0.999)],
    ids=repr,
)
def test_noise_of_the_prior(sde, deviation):
    assert sde.prior_std == deviation
    draw = [
        sde.prior_sample((4, 5000), generator=torch.Generator().manual_seed(seed))
        for seed in (3, 3, 4)
    ]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])
    z = draw[0] / deviation
    assert abs(z.mean().item()) < 3 / math.sqrt(20000)
    assert abs(z.var().item() - 1) < 3 * math.sqrt(2 / 20000)
    assert sde.prior_sample((2, 3), dtype=torch.float64).dtype == torch.float64


def test_priors_are_the_marginals_at_the_end():
    """To what is left of the images there: alpha, and sigma's distance from the prior's."""
    for sde in (VP(), SubVP(), VE(), EDM(), Straight(), Interpolated(LINEAR), Interpolated(COSINE)):
        alpha, sigma = sde.levels(torch.tensor(sde.end, dtype=torch.float64))
        assert sigma.item() == pytest.approx(sde.prior_std, rel=1e-4)
        assert alpha.item() == 1 or alpha.item() < 0.01


def test_no_images():
    x, t = torch.zeros(0, 3, 4), torch.zeros(0)
    assert VP().drift(x, t).shape == (0, 3, 4)
    assert VP().marginal(x, t)[1].shape == (0, 1, 1)
    assert VP().prior_logp(x).shape == (0,)


@pytest.mark.parametrize(("kind", "stop"), [(VP, 1e-3), (SubVP, 1e-3), (VE, 1e-5)])
def test_the_papers_smallest_times(kind, stop):
    """1e-5 in training and likelihoods; sampling stops at 1e-3 for VP and sub-VP."""
    sde = kind()
    assert (sde.trained_from, sde.smallest) == (1e-5, stop)
    assert "trained_from" not in repr(sde)
    sde = kind(smallest=1e-6)
    assert (sde.trained_from, sde.smallest) == (1e-6, 1e-6)
    sde = kind(smallest=0.1, trained_from=0.01)
    assert repr(sde).endswith(", smallest=0.1, trained_from=0.01)")
    for other in (EDM(), Straight(), Interpolated(LINEAR)):
        assert other.trained_from == other.smallest


X = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: VP().drift(X, torch.tensor([0.5, 1.1])), ValueError, r"0\.\.1, got .* 0.5 to 1.1"),
        (lambda: VP().diffusion(torch.tensor(-0.1)), ValueError, r"0\.\.1, got values from -0.1"),
        (lambda: EDM().drift(X, torch.tensor(81.0)), ValueError, r"0\.\.80, got"),
        (lambda: VE().snr(torch.tensor(math.nan)), ValueError, "got values from nan"),
        (lambda: VP().drift(X, torch.zeros(3)), ValueError, r"\[\] or \[2\], .* got \(3,\)"),
        (lambda: VP().marginal(X, torch.zeros(2, 1)), ValueError, r"got \(2, 1\)"),
        (lambda: VP().marginal(X, torch.tensor([1, 1])), TypeError, "got torch.int64"),
        (lambda: VP().marginal(X, 0.5), TypeError, "got float"),
        (lambda: VP().drift(X.long(), torch.zeros(2)), TypeError, "floating point, got"),
        (lambda: VP().prior_logp(X.long()), TypeError, "z must be floating point"),
        (lambda: VP(1.0, 0.5), ValueError, "got 1.0 and 0.5"),
        (lambda: VP(0.0, 20.0), ValueError, "0 < beta_min <= beta_max"),
        (lambda: VP(smallest=1.0), ValueError, "< 1, got trained_from 1e-05 and smallest 1$"),
        (lambda: VP(trained_from=0.01), ValueError, "trained_from 0.01 and smallest 0.001"),
        (lambda: VE(trained_from=0.0), ValueError, "0 < trained_from <= smallest"),
        (lambda: SubVP(0.1, math.inf), ValueError, "got 0.1 and inf"),
        (lambda: VE(0.5, 0.5), ValueError, "0 < sigma_min < sigma_max, got 0.5 and 0.5"),
        (lambda: VE(-1.0, 5.0), ValueError, "got -1.0 and 5.0"),
        (lambda: EDM(0.0, 80.0), ValueError, "got 0.0 and 80.0"),
        (lambda: EDM(sigma_data=0.0), ValueError, "sigma_data must be positive, got 0.0"),
        (
            lambda: Interpolated(schedules.rescale_zero_terminal_snr(LINEAR)),
            ValueError,
            "zero terminal SNR",
        ),
        (lambda: Straight(0), ValueError, "num_timesteps must be at least 1, got 0"),
        (lambda: Straight(10, -1.0), ValueError, "shift must be positive, got -1.0"),
        (lambda: Straight(1), ValueError, "less noisy than 0.999, got 1 with num_timesteps=1"),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()
