"""The forward process, its posterior, and the conversions among predictions, in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fastdiff import NoiseSchedule, process, schedules
from fastdiff.schedules import GaussianPath

T = 1000
LINEAR = schedules.linear(T)
ZERO_SNR = schedules.rescale_zero_terminal_snr(LINEAR)
FLOW = schedules.flow(T)


class Exploding(GaussianPath):
    """The images are not scaled, and the noise grows: alpha^2 + sigma^2 and alpha + sigma vary."""

    sigma_t = torch.logspace(-2, 1.5, T, dtype=torch.float64)
    alpha_t = torch.ones_like(sigma_t)


PATHS = [
    pytest.param(LINEAR, id="linear"),
    pytest.param(ZERO_SNR, id="zero-snr"),
    pytest.param(FLOW, id="flow"),
    pytest.param(schedules.flow(T, shift=3.0), id="shifted-flow"),
    pytest.param(Exploding(), id="exploding"),
]
DTYPES = [
    pytest.param(torch.float64, id="float64"),
    pytest.param(torch.float32, id="float32"),
    pytest.param(torch.bfloat16, id="bfloat16"),
    pytest.param(torch.float16, id="float16"),
]


def images(generator, n=4, dtype=torch.float64):
    return torch.randn(n, 3, 5, 7, generator=generator, dtype=torch.float64).to(dtype)


def test_q_sample_is_the_formula(generator):
    x0, noise = images(generator), images(generator)
    t = torch.tensor([0, 1, 500, 999])
    x_t = process.q_sample(LINEAR, x0, t, noise)
    for n, step in enumerate(t.tolist()):
        abar = math.prod(1 - b for b in LINEAR.betas[: step + 1].tolist())
        wanted = math.sqrt(abar) * x0[n] + math.sqrt(1 - abar) * noise[n]
        torch.testing.assert_close(x_t[n], wanted, rtol=1e-12, atol=1e-12)


def test_q_sample_on_a_straight_path(generator):
    """x_t goes from near x_0 to the noise at a constant speed, which is the flow."""
    x0, noise = images(generator, 1), images(generator, 1)
    path = [process.q_sample(FLOW, x0, torch.tensor([t]), noise) for t in (0, 1, 499, 999)]
    torch.testing.assert_close(path[0], 0.999 * x0 + 0.001 * noise)
    torch.testing.assert_close(path[2], (x0 + noise) / 2)
    assert torch.equal(path[3], noise)
    flow = process.target(FLOW, x0, torch.tensor([0]), noise, "flow")
    torch.testing.assert_close(path[1] - path[0], flow / T, rtol=1e-10, atol=1e-12)
    mean, variance = process.q_marginal(FLOW, x0, torch.tensor([299]))
    torch.testing.assert_close(mean, 0.7 * x0)
    assert variance.item() == pytest.approx(0.09)


@pytest.mark.parametrize("t", [0, 300, 999], ids="t={}".format)
def test_q_sample_has_the_moments_of_the_marginal(t, generator):
    count = 100_000
    x0 = torch.full((1, count), 0.7, dtype=torch.float64)
    step = torch.tensor([t])
    mean, variance = process.q_marginal(LINEAR, x0, step)
    assert variance.shape == (1, 1)
    noise = torch.randn(1, count, generator=generator, dtype=torch.float64)
    x_t = process.q_sample(LINEAR, x0, step, noise)
    std = math.sqrt(variance.item())
    assert abs(x_t.mean() - mean[0, 0]) < 4 * std / math.sqrt(count)
    assert abs(x_t.var() / variance.item() - 1) < 4 * math.sqrt(2 / count)


def test_transitions_add_up_to_the_marginal():
    """Mean and variance carried through q(x_t | x_{t-1}) step by step are those of q(x_t | x_0)."""
    schedule = schedules.cosine(50)
    x0 = torch.tensor([[1.5]], dtype=torch.float64)
    mean, variance = x0, torch.zeros(1, 1, dtype=torch.float64)
    for t in range(50):
        step = torch.tensor([t])
        scale = process.q_transition(schedule, torch.ones_like(mean), step)[0]
        mean, added = process.q_transition(schedule, mean, step)
        variance = scale**2 * variance + added
        wanted_mean, wanted_variance = process.q_marginal(schedule, x0, step)
        torch.testing.assert_close(mean, wanted_mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(variance, wanted_variance, rtol=1e-12, atol=0)


def log_normal(x, mean, variance):
    return -((x - mean) ** 2 / variance + torch.log(2 * math.pi * variance)) / 2


@pytest.mark.parametrize("t", [1, 2, 400, 999], ids="t={}".format)
def test_posterior_is_bayes_rule(t, generator):
    """q(x_{t-1} | x_t, x_0) = q(x_t | x_{t-1}) q(x_{t-1} | x_0) / q(x_t | x_0) at any point."""
    step, before = torch.tensor([t]), torch.tensor([t - 1])
    x0, x_t, x_prev = (
        torch.randn(1, 50, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    mean, variance, log_variance = process.q_posterior(LINEAR, x0, x_t, step)
    left = log_normal(x_prev, mean, variance)
    right = (
        log_normal(x_t, *process.q_transition(LINEAR, x_prev, step))
        + log_normal(x_prev, *process.q_marginal(LINEAR, x0, before))
        - log_normal(x_t, *process.q_marginal(LINEAR, x0, step))
    )
    torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(log_variance, variance.log())


def test_posterior_at_the_first_step_is_the_clean_image(generator):
    x0, x_t = images(generator, 2), images(generator, 2)
    mean, variance, log_variance = process.q_posterior(LINEAR, x0, x_t, torch.tensor([0, 0]))
    torch.testing.assert_close(mean, x0, rtol=1e-11, atol=1e-12)
    assert not variance.any()
    assert bool(torch.isfinite(log_variance).all())


PAIRS = [
    pytest.param(kind, wanted, id=f"{kind}-to-{wanted}")
    for kind, wanted in itertools.product(process.KINDS, process.KINDS)
]
CONVERT = {
    "eps": process.to_eps,
    "x0": process.to_x0,
    "v": process.to_v,
    "score": process.to_score,
    "flow": process.to_flow,
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("kind", "wanted"), PAIRS)
def test_conversions(kind, wanted, path, generator):
    """From the true prediction of one kind follows the true one of every other, and back."""
    x0, noise = images(generator), images(generator)
    t = torch.tensor([0, 1, 500, 998 if path.has_zero_terminal_snr else 999])
    x_t = process.q_sample(path, x0, t, noise)
    given = process.target(path, x0, t, noise, kind)
    found = CONVERT[wanted](path, x_t, t, given, kind)
    true = process.target(path, x0, t, noise, wanted)
    # At the last t the signal is 0.001 of x_t or less, at t = 0 the noise: 3 or 4 digits are lost.
    torch.testing.assert_close(found, true, rtol=1e-10, atol=1e-10)
    back = CONVERT[kind](path, x_t, t, found, wanted)
    torch.testing.assert_close(back, given, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", process.KINDS)
def test_x0_and_eps_add_up_to_the_image(kind, path):
    """alpha x_0 + sigma eps = x_t whatever the prediction is, also off the table's timesteps, and
    with the prediction's own definition."""
    alpha, sigma = path.alpha_t[300:302].mean(), path.sigma_t[300:302].mean()
    (x_of_x0, m_of_x0), (x_of_eps, m_of_eps) = process.x0_and_eps(kind, alpha, sigma)
    one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
    torch.testing.assert_close(alpha * x_of_x0 + sigma * x_of_eps, one)
    torch.testing.assert_close(alpha * m_of_x0 + sigma * m_of_eps, zero)
    defined = {
        "eps": (0, 1),
        "x0": (1, 0),
        "v": (-sigma, alpha),
        "score": (0, -1 / sigma),
        "flow": (-1, 1),
    }[kind]  # the prediction as so much of x_0 and so much of eps
    torch.testing.assert_close(defined[0] * x_of_x0 + defined[1] * x_of_eps, zero)
    torch.testing.assert_close(defined[0] * m_of_x0 + defined[1] * m_of_eps, one)


@pytest.mark.parametrize("path", [ZERO_SNR, FLOW], ids=["zero-snr", "flow"])
@pytest.mark.parametrize("kind", ["x0", "v", "flow"])
def test_conversions_at_zero_terminal_snr(kind, path, generator):
    x0, noise = images(generator, 1), images(generator, 1)
    t = torch.tensor([T - 1])
    x_t = process.q_sample(path, x0, t, noise)
    assert torch.equal(x_t, noise)
    given = process.target(path, x0, t, noise, kind)
    for wanted in process.KINDS:
        found = CONVERT[wanted](path, x_t, t, given, kind)
        true = process.target(path, x0, t, noise, wanted)
        torch.testing.assert_close(found, true, rtol=1e-12, atol=1e-12)


def test_targets_are_their_definitions(generator):
    x0, noise = images(generator, 1), images(generator, 1)
    t = torch.tensor([200])
    abar = LINEAR.alphas_cumprod[200].item()
    assert process.target(LINEAR, x0, t, noise, "eps") is noise
    assert process.target(LINEAR, x0, t, noise, "x0") is x0
    v = math.sqrt(abar) * noise - math.sqrt(1 - abar) * x0
    torch.testing.assert_close(process.target(LINEAR, x0, t, noise, "v"), v)
    torch.testing.assert_close(process.velocity(LINEAR, x0, t, noise), v)
    assert torch.equal(process.target(LINEAR, x0, t, noise, "flow"), noise - x0)
    score = -noise / math.sqrt(1 - abar)
    torch.testing.assert_close(process.target(LINEAR, x0, t, noise, "score"), score)
    # On a straight path, 0.799 x_0 + 0.201 eps.
    v = 0.799 * noise - 0.201 * x0
    torch.testing.assert_close(process.target(FLOW, x0, t, noise, "v"), v)
    torch.testing.assert_close(process.target(FLOW, x0, t, noise, "score"), -noise / 0.201)


def test_score_is_the_gradient_of_the_log_density(generator):
    x0 = images(generator, 2)
    t = torch.tensor([3, 700])
    x_t = process.q_sample(LINEAR, x0, t, images(generator, 2)).requires_grad_()
    log_normal(x_t, *process.q_marginal(LINEAR, x0, t)).sum().backward()
    score = process.to_score(LINEAR, x_t.detach(), t, x0, "x0")
    torch.testing.assert_close(score, x_t.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES)
def test_noising_is_exact_to_rounding_at_every_timestep(dtype):
    """Half-precision tables lose 1 - abar at small t: 10 timesteps without noise in bfloat16."""
    t = torch.arange(T)
    zeros, ones = torch.zeros(T, 1, dtype=dtype), torch.ones(T, 1, dtype=dtype)
    eps = torch.finfo(dtype).eps
    noise_part = process.q_sample(LINEAR, zeros, t, ones).double().flatten()
    image_part = process.q_sample(LINEAR, ones, t, zeros).double().flatten()
    torch.testing.assert_close(
        noise_part, LINEAR.sqrt_one_minus_alphas_cumprod, rtol=0.51 * eps + 1e-7, atol=0
    )
    torch.testing.assert_close(
        image_part, LINEAR.sqrt_alphas_cumprod, rtol=0.51 * eps + 1e-7, atol=0
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"]
)
def test_results_keep_dtype_shape_and_layout(dtype, memory_format, generator):
    x0, noise = (
        images(generator, 2, dtype).contiguous(memory_format=memory_format) for _ in range(2)
    )
    t = torch.tensor([5, 600])
    x_t = process.q_sample(LINEAR, x0, t, noise)
    v = process.velocity(LINEAR, x0, t, noise)
    results = [x_t, v]
    results += [convert(LINEAR, x_t, t, v, "v") for convert in CONVERT.values()]
    results += [process.target(LINEAR, x0, t, noise, kind) for kind in process.KINDS]
    results += [process.q_transition(LINEAR, x0, t)[0], process.q_marginal(LINEAR, x0, t)[0]]
    results += [process.q_posterior(LINEAR, x0, x_t, t)[0]]
    for result in results:
        assert result.dtype == dtype
        assert result.shape == x0.shape
        assert result.is_contiguous(memory_format=memory_format)
    variance = process.q_marginal(LINEAR, x0, t)[1]
    assert variance.shape == (2, 1, 1, 1)
    assert variance.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", DTYPES[2:])
def test_half_precision_conversion_is_rounded_once(dtype, generator):
    x0, noise = images(generator, 4, dtype), images(generator, 4, dtype)
    t = torch.tensor([0, 50, 500, 999])
    got = process.velocity(LINEAR, x0, t, noise).double()
    exact = process.velocity(LINEAR, x0.double(), t, noise.double())
    assert bool(((got - exact).abs() <= 0.51 * torch.finfo(dtype).eps * exact.abs() + 1e-6).all())


def test_no_images(generator):
    empty, t = images(generator, 0), torch.zeros(0, dtype=torch.int64)
    assert process.q_sample(LINEAR, empty, t, empty).shape == (0, 3, 5, 7)
    assert process.to_x0(ZERO_SNR, empty, t, empty).shape == (0, 3, 5, 7)
    assert process.q_posterior(LINEAR, empty, empty, t)[0].shape == (0, 3, 5, 7)


def test_images_of_other_ranks():
    for shape in [(3,), (3, 2), (3, 2, 4), (3, 1, 2, 2, 2)]:
        x = torch.ones(shape, dtype=torch.float64)
        t = torch.tensor([0, 9, 99])
        x_t = process.q_sample(LINEAR, x, t, -x)
        wanted = LINEAR.sqrt_alphas_cumprod[t] - LINEAR.sqrt_one_minus_alphas_cumprod[t]
        torch.testing.assert_close(x_t.reshape(3, -1)[:, 0], wanted)
        assert x_t.shape == shape


X = torch.zeros(2, 1, 4, 4)
T2 = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        pytest.param(
            lambda: process.q_sample(LINEAR, X, torch.tensor([0, T]), X),
            IndexError,
            r"0\.\.999 .* from 0 to 1000",
            id="t too large",
        ),
        pytest.param(
            lambda: process.to_x0(LINEAR, X, torch.tensor([-1, 0]), X),
            IndexError,
            "from -1 to 0",
            id="t negative",
        ),
        pytest.param(
            lambda: process.q_marginal(LINEAR, X, T2.int()),
            TypeError,
            "int64, got torch.int32",
            id="t int32",
        ),
        pytest.param(
            lambda: process.velocity(LINEAR, X, torch.tensor(3), X),
            ValueError,
            r"shape \(2,\).* got \(\)",
            id="one t for all",
        ),
        pytest.param(
            lambda: process.q_transition(LINEAR, X.long(), T2),
            TypeError,
            "floating point, got torch.int64",
            id="integer images",
        ),
        pytest.param(
            lambda: process.q_sample(LINEAR, X, T2, X.double()),
            TypeError,
            "dtype of x0",
            id="noise of another dtype",
        ),
        pytest.param(
            lambda: process.q_sample(LINEAR, X, T2, X[:1]),
            ValueError,
            "shape of x0",
            id="noise of another shape",
        ),
        pytest.param(
            lambda: process.q_posterior(LINEAR, X[..., :2], X, T2),
            ValueError,
            "x0 must have shape",
            id="x0 of another shape",
        ),
        pytest.param(
            lambda: process.to_v(LINEAR, X, T2, X[:, :, :1]),
            ValueError,
            "prediction must have shape",
            id="prediction of another shape",
        ),
        pytest.param(
            lambda: process.target(LINEAR, X, T2, X, "noise"),
            ValueError,
            "unknown prediction kind 'noise'",
            id="unknown target",
        ),
        pytest.param(
            lambda: process.to_eps(LINEAR, X, T2, X, "sample"),
            ValueError,
            "unknown prediction kind 'sample'",
            id="unknown kind",
        ),
        *(
            pytest.param(
                lambda kind=kind, to=to, path=path: CONVERT[to](
                    path, X, torch.tensor([0, T - 1]), X, kind
                ),
                ValueError,
                "says nothing of x0 at zero signal-to-noise",
                id=f"{kind} to {to} at {where}",
            )
            for kind in ("eps", "score")
            for to in ("x0", "v", "flow")
            for path, where in ((ZERO_SNR, "zero SNR"), (FLOW, "the end of a flow"))
        ),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_eps_is_fine_before_the_zero_terminal_step(generator):
    x0, noise = images(generator, 1), images(generator, 1)
    t = torch.tensor([T - 2])
    x_t = process.q_sample(ZERO_SNR, x0, t, noise)
    torch.testing.assert_close(process.to_x0(ZERO_SNR, x_t, t, noise), x0, rtol=1e-8, atol=1e-8)
    last = torch.tensor([T - 1])
    torch.testing.assert_close(process.to_score(ZERO_SNR, noise, last, noise), -noise)


def test_a_schedule_of_one_step():
    one = NoiseSchedule(torch.tensor([0.5], dtype=torch.float64))
    x0 = torch.ones(1, 2, dtype=torch.float64)
    x_t = process.q_sample(one, x0, torch.tensor([0]), -x0)
    assert x_t.abs().max() < 1e-15
