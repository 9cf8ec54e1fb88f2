"""Likelihoods of data whose density is known at every time, by all processes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fastdiff import schedules
from fastdiff.sde import EDM, VE, VP, Interpolated, SubVP, solve_ode
from fastdiff.sde.likelihood import bits_per_dim, dequantize, log_likelihood

pytestmark = pytest.mark.usefixtures("one_thread")
PROCESSES = pytest.mark.parametrize("sde", [VP(), SubVP(), VE(), EDM()], ids=lambda s: repr(s)[:3])
WEIGHTS = torch.tensor([0.3, 0.7], dtype=torch.float64)
MEANS = torch.tensor([[-0.5, 0.2], [0.4, -0.3]], dtype=torch.float64)
STDS = torch.tensor([[0.3, 0.2], [0.15, 0.4]], dtype=torch.float64)


def log_density(sde, x, t):
    """log p_t [N] at x [N, 2] of the mixture of two Gaussians."""
    alpha, sigma = (level.view(-1, 1, 1) for level in sde.levels(t))
    variance = (alpha * STDS) ** 2 + sigma**2
    each = -((x[:, None] - alpha * MEANS) ** 2) / (2 * variance)
    each = (each - 0.5 * (2 * math.pi * variance).log()).sum(2)
    return (WEIGHTS.log() + each).logsumexp(1)


def mixture(sde):
    def score(x, t):
        with torch.enable_grad():
            at = x if x.requires_grad else x.detach().requires_grad_()
            total = log_density(sde, at, t).sum()
            return torch.autograd.grad(total, at, create_graph=True)[0]

    return score


def drawn(generator, n=6):
    which = (torch.rand(n, generator=generator, dtype=torch.float64) > 0.3).long()
    noise = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    return MEANS[which] + STDS[which] * noise


def times(sde, n):
    return [torch.full((n,), t, dtype=torch.float64) for t in (sde.trained_from, sde.end)]


def error(sde, x, found):
    """Largest error in nats, apart from that of the prior for the marginal at the end."""
    first, last = times(sde, len(x))
    prior = log_density(sde, found.z, last) - sde.prior_logp(found.z)
    return (found.logp + prior - log_density(sde, x, first)).abs().max().item()


@PROCESSES
def test_density_of_a_mixture(sde, generator):
    """True to the tolerance, and the more so the smaller it is."""
    x = drawn(generator)
    errors, evaluations = [], []
    for tolerance in (1e-3, 1e-5, 1e-7):
        found = log_likelihood(
            mixture(sde), sde, x, trace="exact", rtol=tolerance, atol=tolerance, progress=False
        )
        assert found.logp.dtype == torch.float64
        errors.append(error(sde, x, found))
        evaluations.append(found.evaluations.sum().item())
        assert errors[-1] <= 50 * tolerance
    assert errors[0] > 5 * errors[1] > 25 * errors[2]
    assert evaluations[0] < evaluations[1] < evaluations[2]


@pytest.mark.parametrize("schedule", [schedules.linear(), schedules.cosine()], ids=repr)
def test_a_schedules_jumps_cost_neither_evaluations_nor_accuracy(schedule, generator):
    """Its f and g^2 jump at each of a thousand timesteps, log(alpha / sigma) does not."""
    sde, x, tolerance = Interpolated(schedule), drawn(generator), 1e-5
    found = log_likelihood(
        mixture(sde), sde, x, trace="exact", rtol=tolerance, atol=tolerance, progress=False
    )
    assert error(sde, x, found) <= 50 * tolerance
    assert found.evaluations.max() < 200
    back = solve_ode(mixture(sde), sde, found.z, rtol=tolerance, atol=tolerance)
    assert (back.x - x).abs().max() <= 100 * tolerance
    assert back.evaluations.max() < 200


def test_prior_and_all(generator):
    """A process that forgets the data altogether needs no correction for its prior."""
    sde, x = VP(beta_max=80.0), drawn(generator)
    found = log_likelihood(
        mixture(sde), sde, x, trace="exact", rtol=1e-8, atol=1e-8, progress=False
    )
    wanted = log_density(sde, x, times(sde, len(x))[0])
    torch.testing.assert_close(found.logp, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("start", [None, 1e-5, 1e-3])
@pytest.mark.parametrize("sde", [VP(), SubVP()], ids=["VP", "SubVP"])
def test_sharp_data_need_an_early_start(sde, start, generator):
    """Of a Gaussian of deviation 0.003, which VP's noise at 1e-3, of 0.0105, blurs to 0.011."""
    std = 0.003

    def score(x, t):
        alpha, sigma = (level.view(-1, 1) for level in sde.levels(t))
        return -x / ((alpha * std) ** 2 + sigma**2)

    x = std * torch.randn(40, 8, generator=generator, dtype=torch.float64)
    found = log_likelihood(score, sde, x, trace="exact", start=start, progress=False)
    true = torch.distributions.Normal(0.0, float(std)).log_prob(x).sum(1)
    lost = bits_per_dim(found.logp - true, (8,), offset=0.0).mean().item()
    alpha, sigma = sde.levels(torch.tensor(start or 1e-5, dtype=torch.float64))
    spread = ((alpha * std) ** 2 + sigma**2).sqrt().item()
    blurred = torch.distributions.Normal(0.0, spread).log_prob(x).sum(1)
    wanted = bits_per_dim(blurred - true, (8,), offset=0.0).mean().item()
    assert lost == pytest.approx(wanted, abs=0.02)
    assert (lost > 1) == (start == 1e-3 and isinstance(sde, VP) and not isinstance(sde, SubVP))
    assert (lost < 0.1) == (wanted < 0.1)


def test_the_start_is_that_of_training(generator):
    x = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    trained, asked = VP(trained_from=2e-4), []

    def score(x, t):
        asked.append(t.min().item())
        return -x

    log_likelihood(score, trained, x, progress=False)
    assert min(asked) == 2e-4


def test_it_integrates_to_one():
    """exp(logp) over a grid, which for a Gaussian of deviation 1/2 may be a coarse one."""
    sde = VP(beta_max=30.0)
    axis = torch.linspace(-2.2, 2.2, 23, dtype=torch.float64)
    x = torch.cartesian_prod(axis, axis)
    wide = lambda x, t: -x / (1 - 0.75 * sde.levels(t)[0].view(-1, 1) ** 2)  # noqa: E731
    found = log_likelihood(wide, sde, x, trace="exact", rtol=1e-6, atol=1e-6, progress=False)
    total = found.logp.exp().sum() * (axis[1] - axis[0]) ** 2
    assert total.item() == pytest.approx(1, abs=1e-4)


def linear_score(matrix):
    return lambda x, t: (x.flatten(1) @ matrix.to(x.dtype).T).view(x.shape)


def test_hutchinson_is_unbiased(generator):
    """For a linear score the estimate is linear in v' A v: the mean over all signs is exact."""
    sde, size = VP(), 3
    matrix = -torch.eye(size, dtype=torch.float64)
    matrix += 0.1 * torch.randn(size, size, generator=generator, dtype=torch.float64)
    x = torch.randn(1, size, generator=generator, dtype=torch.float64).expand(400, size)
    options = {"rtol": 1e-6, "atol": 1e-6, "progress": False}
    exact = log_likelihood(linear_score(matrix), sde, x[:1], trace="exact", **options)
    found = log_likelihood(linear_score(matrix), sde, x, **options)
    torch.testing.assert_close(found.z, exact.z.expand_as(x), rtol=0, atol=1e-5)
    # -1/2 integral g^2 (v' A v - trace A): of the 8 sign vectors, 4 pairs have different values.
    half = (sde.beta_min + sde.beta_max) / 4
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=size)), dtype=torch.float64)
    apart = (signs @ matrix * signs).sum(1) - matrix.trace()
    possible = exact.logp - half * (1 - sde.trained_from**2) * apart
    nearest = (found.logp[:, None] - possible).abs().min(1)
    assert nearest.values.max() < 0.01 * half * apart.abs().max()
    error_of_mean = (half * apart).std() / math.sqrt(400)
    assert (found.logp.mean() - exact.logp).abs() < 3 * error_of_mean
    many = log_likelihood(linear_score(matrix), sde, x[:100], probes=16, **options)
    assert many.logp.std() < 0.4 * found.logp.std()


def test_gaussian_probes_are_unbiased_with_the_variance_of_theory(generator):
    """The variance of v' A v is twice the sum of squares of A's symmetric part."""
    sde, size, count = VP(), 3, 1000
    matrix = -torch.eye(size, dtype=torch.float64)
    matrix += 0.1 * torch.randn(size, size, generator=generator, dtype=torch.float64)
    x = torch.randn(1, size, generator=generator, dtype=torch.float64).expand(count, size)
    options = {"rtol": 1e-5, "atol": 1e-5, "progress": False}
    exact = log_likelihood(linear_score(matrix), sde, x[:1], trace="exact", **options)
    found = log_likelihood(linear_score(matrix), sde, x, probe_type="gaussian", **options)
    half = (sde.beta_min + sde.beta_max) / 4 * (1 - sde.trained_from**2)
    deviation = half * math.sqrt(2) * ((matrix + matrix.T) / 2).norm().item()
    assert found.logp.std().item() == pytest.approx(deviation, rel=0.15)
    assert abs(found.logp.mean() - exact.logp).item() < 3.5 * deviation / math.sqrt(count)


@pytest.mark.parametrize("probe_type", ["rademacher", "gaussian"])
def test_an_image_does_not_depend_on_its_batch(probe_type, generator):
    sde, x = VP(), torch.randn(4, 1, 3, 3, generator=generator, dtype=torch.float64)
    matrix = -torch.eye(9, dtype=torch.float64)
    matrix += 0.1 * torch.randn(9, 9, generator=generator, dtype=torch.float64)
    score, options = linear_score(matrix), {"probe_type": probe_type, "progress": False}
    whole = log_likelihood(score, sde, x, seed=5, probes=2, **options)
    later = log_likelihood(score, sde, x[2:], seed=7, probes=2, **options)
    torch.testing.assert_close(whole.logp[2:], later.logp, rtol=1e-11, atol=0)
    assert whole.evaluations[2:].tolist() == later.evaluations.tolist()
    assert whole.z.shape == x.shape
    other = log_likelihood(score, sde, x, seed=6, probes=2, **options)
    assert (whole.logp - other.logp).abs().max() > 1e-3


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("trace", ["hutchinson", "exact"])
def test_gradients_are_its_own_affair(context, trace):
    """A network of bounded slope; its parameters are neither needed nor touched."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
    calls = []

    def score(x, t):
        calls.append(x.dtype)
        return model(x.flatten(1)).view(x.shape) - x

    with context():
        x = torch.linspace(-1, 1, 8).view(2, 1, 2, 2)
        found = log_likelihood(score, VP(), x, trace=trace, rtol=1e-3, atol=1e-3, progress=False)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert set(calls) == {torch.float32}
    assert found.z.dtype == torch.float32
    assert not found.logp.requires_grad
    assert bool(found.logp.isfinite().all())


def test_traces_agree_where_the_derivative_is_diagonal(generator):
    """v' D v = trace D for every vector of signs."""
    sde, x = SubVP(), torch.randn(3, 5, generator=generator, dtype=torch.float64)
    found = [
        log_likelihood(lambda x, t: -x - x.sin() / 9, sde, x, trace=trace, progress=False).logp
        for trace in ("hutchinson", "exact")
    ]
    torch.testing.assert_close(*found, rtol=1e-10, atol=0)


def test_bits_per_dim():
    """Uniform data in [-1, 1] has density 2^-D: 8 bits a value, whatever D is."""
    shape = (3, 4, 4)
    logp = torch.tensor([-48 * math.log(2.0), 0.0], dtype=torch.float64)
    wanted = torch.tensor([8.0, 7.0], dtype=torch.float64)
    torch.testing.assert_close(bits_per_dim(logp, shape), wanted)
    # in [0, 1] the same density is 1
    assert bits_per_dim(torch.zeros(1), shape, offset=8.0).item() == 8
    with pytest.raises(ValueError, match=r"one image, got \(3, 0\)"):
        bits_per_dim(logp, (3, 0))


def test_dequantize(generator):
    levels = torch.arange(256, dtype=torch.uint8).repeat(200, 1)
    x = dequantize(levels, generator=generator)
    assert x.dtype == torch.float32
    assert torch.equal(((x.double() + 1) * 128).floor().to(torch.uint8), levels)
    part = (x.double() + 1) * 128 - levels
    assert part.mean().item() == pytest.approx(0.5, abs=4 / math.sqrt(12 * part.numel()))
    assert part.var().item() == pytest.approx(1 / 12, abs=2e-3)
    again = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    images = levels.double() / 127.5 - 1
    assert torch.equal(
        dequantize(images, generator=again[0]).float(), dequantize(levels, generator=again[1])
    )
    with pytest.raises(TypeError, match=r"uint8, float32 or float64, got torch\.bfloat16"):
        dequantize(images.bfloat16())
    with pytest.raises(ValueError, match=r"in \[-1, 1\], got values from -2 to 2"):
        dequantize(2 * images)


def test_no_images():
    found = log_likelihood(lambda x, t: -x, VP(), torch.zeros(0, 1, 2, 2), progress=False)
    assert found.logp.shape == (0,)
    assert found.z.shape == (0, 1, 2, 2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        pytest.param(
            {"trace": "full"}, ValueError, "'full', wanted hutchinson or exact", id="trace"
        ),
        pytest.param({"start": 0.0}, ValueError, "between 0 and 1, got 0", id="start"),
        pytest.param({"start": 1.0}, ValueError, "between 0 and 1, got 1", id="start at the end"),
        pytest.param({"probes": 0}, ValueError, "probes must be at least 1, got 0", id="probes"),
        pytest.param(
            {"probe_type": "normal"}, ValueError, "'normal', wanted", id="type of the probes"
        ),
        pytest.param({"rtol": -1.0}, ValueError, "rtol >= 0", id="rtol"),
        pytest.param(
            {"score": lambda x, t: x.detach()}, ValueError, "has no derivative in x", id="detached"
        ),
        pytest.param(
            {"score": lambda x, t: x[:, :1]}, ValueError, "shape of x", id="score of another shape"
        ),
        pytest.param(
            {"score": lambda x, t: x / 0}, FloatingPointError, "sample 0 is not finite", id="nan"
        ),
        pytest.param({"x": torch.zeros(2, 3).int()}, TypeError, "floating point", id="integers"),
        pytest.param(
            {"x": torch.zeros(1, 4097), "trace": "exact"},
            ValueError,
            r"at most 4096, and images of shape \(4097,\) have 4097; use trace='hutchinson'",
            id="too large for the exact trace",
        ),
    ],
)
def test_refusals(options, error, message):
    given = {"score": lambda x, t: -x, "x": torch.zeros(2, 3), "progress": False, **options}
    with pytest.raises(error, match=message):
        log_likelihood(given.pop("score"), VP(), given.pop("x"), **given)
