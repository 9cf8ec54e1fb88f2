"""The variational bound: every term against its closed form, and the sum against the entropy."""

from __future__ import annotations

import math

import pytest
import torch
from gaussian_data import LN2, GaussianData, even_log_snr
from scipy.stats import norm

from fastdiff import NoiseSchedule, losses, ops, process, schedules

LINEAR = schedules.linear(1000)
COSINE = schedules.cosine(50)
ZERO_SNR = schedules.rescale_zero_terminal_snr(LINEAR)
DATA = GaussianData(0.3, 0.5)
SCHEDULES = [
    pytest.param(LINEAR, id="linear"),
    pytest.param(COSINE, id="cosine"),
    pytest.param(ZERO_SNR, id="zero-snr"),
    pytest.param(even_log_snr(60), id="even"),
]
T4 = torch.tensor([0, 1, 20, 49])


def images(generator, n=4, dtype=torch.float64):
    """8-bit images in [-1, 1], the outermost levels among them."""
    levels = torch.randint(256, (n, 2, 3, 3), generator=generator)
    levels[:, 0, 0, :2] = torch.tensor([0, 255])
    return (-1 + 2 * levels.double() / 255).to(dtype)


def noise_like(x0, generator):
    return torch.randn(x0.shape, generator=generator, dtype=torch.float64).to(x0.dtype)


def wrong_model(x_t, t):
    """Predictions, and values of a variance, that depend on the pixel."""
    return torch.cat([0.8 * torch.tanh(x_t), torch.sin(3 * x_t)], dim=1)


def fixed(x_t, t):
    return wrong_model(x_t, t)[:, :2]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_terms_of_the_best_model(variance, schedule):
    """L_t is coef^2 E|x_0 - E[x_0 | x_t]|^2 / (2 variance), and the divergence of the variances."""
    found = DATA.terms(schedule, variance)
    small = schedule.posterior_variance.clone()
    small[0] = small[1]
    large = torch.cat([small[:1], schedule.betas[1:]])
    used = small if variance == "fixed_small" else large
    wanted = schedule.posterior_mean_coef_x0**2 * DATA.mmse(schedule) / (2 * used)
    wanted[1:] += (small[1:] / used[1:] - 1 - torch.log(small[1:] / used[1:])) / 2
    wanted[0] += torch.log(2 * math.pi * used[0]) / 2
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_prior_term(schedule):
    abar = schedule.alphas_cumprod[-1].item()
    power = DATA.mean**2 + DATA.std**2
    wanted = (-math.log(1 - abar) - abar + abar * power) / 2
    assert DATA.prior(schedule) == pytest.approx(wanted, rel=1e-9, abs=1e-16)
    in_bits = losses.prior_term(schedule, DATA.x0)
    in_nats = losses.prior_term(schedule, DATA.x0, unit="nats")
    torch.testing.assert_close(in_bits * LN2, in_nats)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_with_the_exact_variance_the_bound_is_tight(schedule):
    """Every step is then the true one, and only KL(q(x_T) || N(0, 1)) is lost, for any T."""
    log_variance = DATA.step_variance(schedule).log()
    terms = DATA.terms(schedule, "learned", log_variance)
    gap = terms.sum().item() + DATA.prior(schedule) - DATA.entropy
    assert gap == pytest.approx(DATA.prior_divergence(schedule), abs=2e-11)


def test_with_the_posterior_variance_the_bound_tends_to_the_entropy_as_1_over_t():
    """log-SNR falls from 8 to -16 in equal steps; the decoder alone has its exact variance.

    A step whose exact variance is 1 + r times the posterior's costs (r - log(1 + r)) / 2, about
    r^2 / 4, with r = d sigmoid(u), d = 24 / T the fall of log-SNR and u = log-SNR + log std^2.
    """
    gaps = {}
    for steps in (50, 200, 1000, 4000):
        schedule = even_log_snr(steps)
        log_variance = schedule.posterior_log_variance_clipped.clone()
        log_variance[0] = DATA.mmse(schedule)[0].log()
        terms = DATA.terms(schedule, "learned", log_variance)
        gaps[steps] = terms.sum().item() + DATA.prior(schedule) - DATA.entropy
    top, bottom = (torch.tensor(u + 2 * math.log(DATA.std)).double() for u in (8.0, -16.0))
    rises = [torch.nn.functional.softplus(u) - u.sigmoid() for u in (top, bottom)]
    limit = 24 / 4 * (rises[0] - rises[1]).item()  # of T times the gap
    left = {steps: steps * gap / limit - 1 for steps, gap in gaps.items()}
    assert all(0 < gap < 1.2 * limit / steps for steps, gap in gaps.items())
    assert left[4000] < 0.0025
    # What is left is the next order, again as 1 / T.
    assert left[1000] / left[4000] == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned", "learned_range"])
@pytest.mark.parametrize("discrete", [True, False], ids=["discrete", "density"])
@pytest.mark.parametrize("clip", [True, False], ids=["clip", "free"])
def test_one_pixel_at_a_time_by_hand(clip, discrete, variance, generator):
    """The formulas of the paper with Python's floats, and SciPy for the decoder."""
    x0 = images(generator)
    noise = 2 * noise_like(x0, generator)
    learned = variance.startswith("learned")
    model = wrong_model if learned else fixed
    found = losses.vlb_loss(
        COSINE, model, x0, T4, noise, kind="v", variance=variance, clip=clip, discrete=discrete
    )
    x_t = process.q_sample(COSINE, x0, T4, noise)
    output = wrong_model(x_t, T4)
    beta, abar = COSINE.betas.tolist(), COSINE.alphas_cumprod.tolist()
    for n, t in enumerate(T4.tolist()):
        before = abar[t - 1] if t else 1.0
        small = beta[max(t, 1)] * (1 - abar[max(t, 1) - 1]) / (1 - abar[max(t, 1)])
        of_x0 = beta[t] * math.sqrt(before) / (1 - abar[t])
        of_xt = (1 - before) * math.sqrt(1 - beta[t]) / (1 - abar[t])
        total = 0.0
        for x, noised, v, frac in zip(
            *(y[n].flatten().tolist() for y in (x0, x_t, output[:, :2], output[:, 2:])), strict=True
        ):
            guess = math.sqrt(abar[t]) * noised - math.sqrt(1 - abar[t]) * v
            if clip:
                guess = min(1.0, max(-1.0, guess))
            mean = of_x0 * guess + of_xt * noised
            log_variance = {
                "fixed_small": math.log(small),
                "fixed_large": math.log(beta[t] if t else small),
                "learned": frac,
                "learned_range": (frac + 1) / 2 * math.log(beta[t])
                + (1 - frac) / 2 * math.log(small),
            }[variance]
            std = math.exp(log_variance / 2)
            if t:
                true = of_x0 * x + of_xt * noised
                total += (
                    log_variance - math.log(small) - 1 + small / std**2 + ((true - mean) / std) ** 2
                ) / 2
            elif discrete:
                low, high = x - 1 / 255, x + 1 / 255
                # The mirror image where that is the lower tail.
                a, b = (low, high) if x < mean else (2 * mean - high, 2 * mean - low)
                p = norm.cdf(b, mean, std) - norm.cdf(a, mean, std)
                if abs(x) > 0.999:
                    p = norm.cdf(high, mean, std) if x < 0 else norm.sf(low, mean, std)
                total -= math.log(max(p, 1e-12))
            else:
                total -= norm.logpdf(x, mean, std)
        assert found[n].item() == pytest.approx(total / 18 / LN2, rel=1e-9)


@pytest.mark.parametrize("kind", process.KINDS)
def test_the_bound_is_of_the_model_whatever_it_predicts(kind, generator):
    x0 = images(generator)
    noise = noise_like(x0, generator)
    convert = getattr(process, f"to_{kind}")

    def model(x_t, t):
        return convert(COSINE, x_t, t, fixed(x_t, t), "x0")

    options = {"variance": "fixed_small"}
    found = losses.vlb_loss(COSINE, model, x0, T4, noise, kind=kind, **options)
    wanted = losses.vlb_loss(COSINE, fixed, x0, T4, noise, kind="x0", **options)
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=0)


def test_units(generator):
    x0 = images(generator)
    x_t = process.q_sample(COSINE, x0, T4, noise_like(x0, generator))
    log_variance = losses.model_variance(COSINE, x_t, T4, "fixed_large")
    mean = process.q_posterior(COSINE, 0.9 * x0, x_t, T4)[0]
    bits, nats = (
        losses.bound_term(COSINE, mean, log_variance, x0, x_t, T4, unit=unit)
        for unit in ("bits", "nats")
    )
    torch.testing.assert_close(bits * LN2, nats)
    assert bool((bits > 0).all())


def test_hybrid_loss_is_its_two_parts(generator):
    x0 = images(generator)
    noise, weight = noise_like(x0, generator), losses.min_snr(COSINE)
    given = (COSINE, wrong_model, x0, T4, noise)
    vlb = losses.vlb_loss(*given)
    simple = losses.simple_loss(COSINE, fixed, x0, T4, noise, weight=weight)
    found = losses.hybrid_loss(*given, weight=weight)
    torch.testing.assert_close(found, simple + 50 / 1000 * vlb, rtol=1e-12, atol=0)
    unscaled = losses.hybrid_loss(*given, weight=weight, vlb_weight=1.0)
    torch.testing.assert_close(unscaled, simple + vlb, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="vlb_weight must be at least 0, got -1"):
        losses.hybrid_loss(*given, vlb_weight=-1.0)
    torch.testing.assert_close(losses.rescaled_kl(*given), 50 * vlb, rtol=1e-14, atol=0)
    clipped = losses.vlb_loss(*given, clip=True, kind="v", variance="learned")
    found = losses.rescaled_kl(*given, clip=True, kind="v", variance="learned")
    torch.testing.assert_close(found, 50 * clipped)


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_in_the_hybrid_loss_the_bound_does_not_move_the_mean(variance, generator):
    x0 = images(generator)
    noise = noise_like(x0, generator)
    prediction = noise_like(x0, generator).requires_grad_()
    v = noise_like(x0, generator).sub(2).requires_grad_()

    def model(x_t, t):
        return torch.cat([prediction, v], dim=1)

    options = {"variance": variance, "discrete": False}
    losses.hybrid_loss(COSINE, model, x0, T4, noise, **options).sum().backward()
    of_hybrid, of_v = prediction.grad.clone(), v.grad.clone()
    prediction.grad = v.grad = None
    losses.simple_loss(COSINE, lambda x_t, t: prediction, x0, T4, noise).sum().backward()
    assert torch.equal(of_hybrid, prediction.grad)
    prediction.grad = None
    losses.vlb_loss(COSINE, model, x0, T4, noise, **options).sum().backward()
    torch.testing.assert_close(of_v, 50 / 1000 * v.grad, rtol=1e-12, atol=0)
    assert bool((prediction.grad != 0).all())  # which the hybrid loss has left out
    assert bool((of_v != 0).all())


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
@pytest.mark.parametrize("discrete", [True, False], ids=["discrete", "density"])
def test_gradients(discrete, variance, generator):
    x0 = images(generator)
    noise = noise_like(x0, generator)
    # Near the truth, so that no probability is raised to 1e-12.
    prediction = (x0 + 0.01 * noise_like(x0, generator)).requires_grad_()
    v = (noise_like(x0, generator) - (4 if variance == "learned" else 0)).requires_grad_()
    schedule = schedules.linear(50, 0.001, 0.2)

    def of_vlb(prediction, v):
        return losses.vlb_loss(
            schedule, lambda x_t, t: torch.cat([prediction, v], dim=1), x0, T4, noise,
            kind="x0", variance=variance, discrete=discrete,
        )  # fmt: skip

    def of_hybrid(v):
        return losses.hybrid_loss(
            schedule, lambda x_t, t: torch.cat([prediction, v], dim=1), x0, T4, noise,
            kind="x0", variance=variance, discrete=discrete,
        )  # fmt: skip

    assert torch.autograd.gradcheck(of_vlb, (prediction, v))
    assert torch.autograd.gradcheck(of_hybrid, v)


def test_half_precision_images_have_terms_in_float32(generator):
    x0 = images(generator, dtype=torch.bfloat16)
    noise = noise_like(x0, generator)
    seen = []

    def model(x_t, t):
        seen.append(x_t)
        return fixed(x_t.double(), t).float()

    found = losses.vlb_loss(COSINE, model, x0, T4, noise, kind="x0", variance="fixed_small")
    assert (found.dtype, seen[0].dtype) == (torch.float32, torch.bfloat16)
    wide = [x.double() for x in (x0, seen[0])]
    mean = process.q_posterior(COSINE, fixed(wide[1], T4), wide[1], T4)[0]
    log_variance = losses.model_variance(COSINE, wide[1], T4, "fixed_small")
    wanted = losses.bound_term(COSINE, mean, log_variance, *wide, T4)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=0)


X = torch.zeros(4, 2, 3, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        pytest.param({"schedule": schedules.flow(50)}, TypeError, "got FlowSchedule", id="flow"),
        pytest.param({"kind": "mean"}, ValueError, "unknown prediction kind 'mean'", id="kind"),
        pytest.param({"variance": "none"}, ValueError, "unknown variance 'none'", id="variance"),
        pytest.param({"x0": X.int()}, TypeError, "floating point, got torch.int32", id="x0"),
        pytest.param({"t": T4 + 1}, IndexError, "from 1 to 50", id="t"),
        pytest.param(
            {"model": fixed}, ValueError,
            r"learned variance .* return \(4, 4, 3, 3\), got \(4, 2, 3, 3\)", id="channels",
        ),
        pytest.param(
            {"schedule": schedules.rescale_zero_terminal_snr(COSINE)}, ValueError,
            "says nothing of x0 at zero signal-to-noise", id="zero SNR",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("loss", [losses.vlb_loss, losses.hybrid_loss, losses.rescaled_kl])
def test_bad_arguments(loss, call, error, message):
    given = {"schedule": COSINE, "model": wrong_model, "x0": X, "t": T4, "noise": X, **call}
    with pytest.raises(error, match=message):
        loss(given.pop("schedule"), **given)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        pytest.param(
            lambda: losses.hybrid_loss(COSINE, fixed, X, T4, X, variance="fixed_small"), ValueError,
            "for a learned variance, got 'fixed_small'", id="hybrid, fixed",
        ),
        pytest.param(
            lambda: losses.prior_term(schedules.flow(9), X), TypeError, "got FlowSchedule",
            id="prior of a flow",
        ),
        pytest.param(
            lambda: losses.prior_term(COSINE, X, unit="dits"), ValueError,
            "unknown unit 'dits', wanted one of bits, nats", id="unit",
        ),
        pytest.param(
            lambda: losses.bound_term(COSINE, X[:1], X, X, X, T4), ValueError,
            r"model_mean must have shape \(4, 2, 3, 3\), got \(1, 2, 3, 3\)", id="mean",
        ),
        pytest.param(
            lambda: losses.bound_term(COSINE, X, X[:, :1], X, X, T4), ValueError,
            r"\(4, 2, 3, 3\) or \(4, 1, 1, 1\), got \(4, 1, 3, 3\)", id="log-variance",
        ),
        pytest.param(
            lambda: losses.bound_term(COSINE, X, X, X, X[:, :1], T4), ValueError, "must have shape",
            id="x_t",
        ),
        pytest.param(
            lambda: losses.bound_term(COSINE, X, X, X, X, T4.int()), TypeError, "int32", id="dtype"
        ),
        pytest.param(
            lambda: losses.bits_per_dim(fixed, COSINE, X + 1.5), ValueError,
            r"\[-1, 1\], got values from 1.5 to 1.5", id="range",
        ),
        pytest.param(
            lambda: losses.bits_per_dim(fixed, COSINE, X * math.nan), ValueError, "from nan",
            id="nan",
        ),
        pytest.param(
            lambda: losses.bits_per_dim(fixed, COSINE, X, batch_size=0), ValueError, "at least 1",
            id="batch size",
        ),
    ],
)  # fmt: skip
def test_other_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_one_step_and_no_signal_left():
    one = NoiseSchedule(torch.tensor([1.0], dtype=torch.float64))
    assert not losses.prior_term(one, X).any()
    t = torch.zeros(4, dtype=torch.int64)
    found = losses.vlb_loss(one, fixed, X, t, X, kind="x0", variance="fixed_small", discrete=False)
    wanted = torch.full((4,), math.log(2 * math.pi) / 2 / LN2)  # of N(0, 1) at its mean
    torch.testing.assert_close(found, wanted)


def test_the_whole_bound_is_the_sum_of_its_terms(generator):
    x0, seed = images(generator, 3), 5
    schedule = schedules.linear(50)  # which leaves some signal, and so a prior term
    found = losses.bits_per_dim(fixed, schedule, x0, kind="x0", seed=seed, progress=False)
    assert found.terms.shape == found.x0_mse.shape == found.eps_mse.shape == (3, 50)
    torch.testing.assert_close(found.prior, losses.prior_term(schedule, x0))
    assert bool((found.prior > 0.01).all())
    torch.testing.assert_close(found.total, found.prior + found.terms.sum(1))
    seeds = torch.tensor([[seed, 0], [seed, 1], [seed, 2]])
    for step in (0, 1, 30, 49):
        noise = ops.philox_normal(seeds, step, x0.shape, x0.dtype)
        t = torch.full((3,), step)
        term = losses.vlb_loss(
            schedule, fixed, x0, t, noise, kind="x0", variance="fixed_small", clip=True
        )
        torch.testing.assert_close(found.terms[:, step], term, rtol=1e-12, atol=0)
        error = losses.simple_loss(schedule, fixed, x0, t, noise, kind="x0")
        torch.testing.assert_close(found.x0_mse[:, step], error, rtol=1e-12, atol=0)
        snr = schedule.snr[step]
        torch.testing.assert_close(found.eps_mse[:, step], error * snr, rtol=1e-9, atol=0)


def test_the_whole_bound_of_gaussian_data(generator):
    """Mean terms and errors of 4000 one-pixel images within 4.5 standard errors of the truth."""
    schedule = even_log_snr(12, 4.0, -6.0)
    x0 = DATA.mean + DATA.std * torch.randn(4000, 1, 1, generator=generator, dtype=torch.float64)
    model = DATA.model(schedule)

    def on_pixels(x_t, t):
        return model(x_t[..., None], t)[..., 0]

    found = losses.bits_per_dim(
        on_pixels, schedule, x0, kind="x0", clip=False, discrete=False, progress=False
    )
    mmse = DATA.mmse(schedule)
    varying = losses.vlb(schedule, "x0") * mmse
    for values, wanted, spread in (
        (found.terms * LN2, DATA.terms(schedule), varying),
        (found.x0_mse, mmse, mmse),
        (found.eps_mse, mmse * schedule.snr, mmse * schedule.snr),
    ):
        # The square of a normal error has a standard deviation of sqrt(2) times its mean.
        error = spread * math.sqrt(2 / 4000)
        assert bool(((values.mean(0) - wanted).abs() < 4.5 * error).all())


def test_an_image_has_the_same_bound_in_any_batch(generator):
    x0, labels = images(generator, 5), torch.arange(5)
    calls = []

    def model(x_t, t, class_labels, scale):
        calls.append(len(x_t))
        return fixed(x_t, t) * scale + class_labels.view(-1, 1, 1, 1) / 10

    arguments = {"kind": "v", "progress": False, "class_labels": labels, "scale": 0.5}
    whole = losses.bits_per_dim(model, COSINE, x0, **arguments)
    assert calls == [5] * 50
    calls.clear()
    parts = losses.bits_per_dim(model, COSINE, x0, batch_size=2, **arguments)
    assert calls == [2] * 100 + [1] * 50
    torch.testing.assert_close(parts.terms, whole.terms, rtol=1e-12, atol=0)
    torch.testing.assert_close(parts.eps_mse, whole.eps_mse, rtol=1e-12, atol=0)
    other = losses.bits_per_dim(model, COSINE, x0, seed=1, **arguments)
    assert not torch.isclose(other.terms[:, 1:], whole.terms[:, 1:], rtol=1e-6).any()


def test_a_network_with_learned_variance_in_float32(tiny_unet, generator, capsys):
    x0 = images(generator, 2, torch.float32)[:, :1].repeat(1, 1, 3, 3)[:, :, :8, :8]
    unet, schedule = tiny_unet(), schedules.cosine(6)

    def model(x_t, t):
        out = unet(x_t, t)
        return torch.cat([out, torch.tanh(out)], dim=1)

    found = losses.bits_per_dim(model, schedule, x0, variance="learned_range")
    assert "bits per dim: 100%" in capsys.readouterr().err
    assert found.total.dtype == torch.float64
    assert not found.total.requires_grad
    assert bool(torch.isfinite(found.terms).all())
    wide = losses.bits_per_dim(
        lambda x_t, t: model(x_t.float(), t).double(), schedule, x0.double(),
        variance="learned_range", progress=False,
    )  # fmt: skip
    torch.testing.assert_close(found.terms, wide.terms, rtol=1e-4, atol=1e-4)


def test_no_images():
    found = losses.bits_per_dim(fixed, COSINE, X[:0], progress=False)
    assert found.total.shape == (0,)
    assert found.terms.shape == (0, 50)
