"""Scores from networks and networks' predictions from scores, for Gaussian images, in float64."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

import fastdiff
from fastdiff import schedules
from fastdiff.common.checks import beside
from fastdiff.process import KINDS
from fastdiff.sde import EDM, PARAMETRISATIONS, VE, VP, Interpolated, SubVP, prediction_fn, score_fn

MEAN, SPREAD = 0.4, 0.7  # images are N(MEAN, SPREAD^2) in every pixel
INTERPOLATED = Interpolated(schedules.cosine())
SDES = [
    pytest.param(VP(), lambda label: label / 999, id="vp"),
    pytest.param(SubVP(), lambda label: label / 999, id="sub-vp"),
    pytest.param(VE(), lambda label: label / 999, id="ve"),
    pytest.param(
        VE(label_by="sigma"),
        lambda label: (label / 0.01).log() / math.log(5000),
        id="ve-sigma",
    ),
    pytest.param(EDM(), lambda label: (4 * label).exp(), id="edm"),
    pytest.param(INTERPOLATED, lambda label: (label + 1) / 1000, id="interpolated"),
]


def draw(sde, generator):
    """Images of three times at which no coefficient is extreme."""
    t = sde.end * torch.tensor([0.1, 0.35, 0.8], dtype=torch.float64)
    alpha, sigma = sde.levels(t)
    x = torch.randn(3, 2, 4, generator=generator, dtype=torch.float64)
    return x * beside((alpha**2 + sigma**2).sqrt(), x), t


def exact(sde, x, t):
    """What a perfect network of every kind predicts: expectations given x_t."""
    alpha, sigma = (beside(level, x) for level in sde.levels(t))
    variance = alpha**2 * SPREAD**2 + sigma**2
    eps = sigma * (x - alpha * MEAN) / variance
    x0 = MEAN + alpha * SPREAD**2 * (x - alpha * MEAN) / variance
    v, score = alpha * eps - sigma * x0, -(x - alpha * MEAN) / variance
    return {"eps": eps, "x0": x0, "v": v, "score": score, "flow": eps - x0}


def test_exact_is_exact(generator):
    """The score is the gradient of the marginal's log density."""
    x, t = draw(SubVP(), generator)
    x.requires_grad_()
    mean, deviation = SubVP().marginal(torch.full_like(x, MEAN), t)
    alpha, _ = SubVP().levels(t)
    deviation = (deviation**2 + beside(alpha, x) ** 2 * SPREAD**2).sqrt()
    logp = torch.distributions.Normal(mean, deviation).log_prob(x).sum()
    (gradient,) = torch.autograd.grad(logp, x)
    torch.testing.assert_close(exact(SubVP(), x.detach(), t)["score"], gradient)


@pytest.mark.parametrize(("sde", "time_of"), SDES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_network_gives_the_score(kind, sde, time_of, generator):
    x, t = draw(sde, generator)

    def model(given, label):
        torch.testing.assert_close(time_of(label), t, rtol=1e-12, atol=0)
        return exact(sde, given, t)[kind]

    found = score_fn(model, kind, sde)(x, t)
    torch.testing.assert_close(found, exact(sde, x, t)["score"], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("sde", "time_of"), SDES)
def test_a_noise_conditioned_network(sde, time_of, generator):
    x, t = draw(sde, generator)
    _, sigma = sde.levels(t)

    def model(given, label):
        torch.testing.assert_close(label, sigma, rtol=0, atol=0)
        return beside(label, given) * exact(sde, given, t)["score"]

    found = score_fn(model, "ncsn", sde)(x, t)
    torch.testing.assert_close(found, exact(sde, x, t)["score"], rtol=1e-12, atol=1e-14)


def test_the_network_of_a_preconditioned_denoiser(generator):
    sde = EDM(sigma_data=0.5)
    x, t = draw(sde, generator)
    skip, out, scale = (beside(value, x) for value in sde.preconditioning(t))

    def model(given, label):
        torch.testing.assert_close((4 * label).exp(), t, rtol=1e-12, atol=0)
        torch.testing.assert_close(given, scale * x)
        return (exact(sde, given / scale, t)["x0"] - skip * given / scale) / out

    found = score_fn(model, "edm", sde)(x, t)
    torch.testing.assert_close(found, exact(sde, x, t)["score"], rtol=1e-9, atol=1e-12)


def test_preconditioning_alone_is_a_gaussians_denoiser(generator):
    """A network that returns 0 denoises N(0, sigma_data^2)."""
    x, t = draw(EDM(), generator)
    found = score_fn(lambda given, label: torch.zeros_like(given), "edm", EDM())(x, t)
    torch.testing.assert_close(found, -x / beside(0.25 + t**2, x), rtol=1e-10, atol=0)


@pytest.mark.parametrize(("sde", "time_of"), SDES)
@pytest.mark.parametrize("kind", KINDS)
def test_predictions_of_the_score(kind, sde, time_of, generator):
    x, t = draw(sde, generator)
    found = prediction_fn(lambda x, t: exact(sde, x, t)["score"], kind, sde)(x, t)
    torch.testing.assert_close(found, exact(sde, x, t)[kind], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("sde", "time_of"), SDES)
@pytest.mark.parametrize("kind", KINDS)
def test_prediction_and_score_are_inverse(kind, sde, time_of, generator):
    """For any network, not only a perfect one."""
    x, t = draw(sde, generator)
    output = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    score = score_fn(lambda given, label: output, kind, sde)
    again = prediction_fn(score, kind, sde)(x, t)
    torch.testing.assert_close(again, output, rtol=1e-9, atol=1e-9 * x.abs().max().item())


@pytest.mark.parametrize("kind", PARAMETRISATIONS)
def test_scores_are_differentiable(kind, generator):
    """Likelihoods need the divergence."""
    sde = EDM(sigma_max=2.0)
    weight = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    t = torch.tensor([0.5, 1.5], dtype=torch.float64)
    score = score_fn(lambda x, label: (x @ weight).tanh() + beside(label, x), kind, sde)
    x = torch.randn(2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: score(x, t), (x,))


def test_one_time_for_all_and_conditions(generator):
    x = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    seen = {}

    def model(given, label, *, classes):
        seen.update(label=label, classes=classes)
        return given

    one = torch.tensor(0.3, dtype=torch.float64)
    score = score_fn(model, "eps", VP(), classes=7)
    found = score(x, one)
    assert seen["label"].tolist() == pytest.approx([299.7] * 3)
    assert seen["classes"] == 7
    torch.testing.assert_close(found, score(x, one.expand(3)), rtol=0, atol=0)


def test_networks_that_return_more_than_a_tensor(generator):
    x, t = draw(VP(), generator)
    wanted = score_fn(lambda x, label: -x, "v", VP())(x, t)
    for pack in (lambda y: (y, None), lambda y: SimpleNamespace(sample=y)):
        found = score_fn(lambda x, label, pack=pack: pack(-x), "v", VP())(x, t)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", PARAMETRISATIONS)
def test_dtypes(kind, dtype, generator):
    """Labels keep their digits whatever the images' dtype, and scores are rounded once."""
    sde = EDM(sigma_max=2.0)
    t = torch.tensor([0.3, 1.7], dtype=torch.float64)
    x = torch.randn(2, 5, generator=generator).to(dtype)
    output = torch.randn(2, 5, generator=generator).to(dtype)
    labels = []

    def model(given, label):
        labels.append(label)
        assert given.dtype in (dtype, torch.float64)
        return output.to(given.dtype)

    found = score_fn(model, kind, sde)(x, t)
    wanted = score_fn(model, kind, sde)(x.double(), t)
    assert found.dtype == dtype
    torch.testing.assert_close(labels[0].double(), labels[1], rtol=1e-7, atol=0)
    eps = torch.finfo(dtype).eps
    scale = 20 * eps * eps if dtype.itemsize == 2 else 0  # sums that nearly cancel, in float32
    bound = (0.51 if scale else 8) * eps * wanted.abs() + max(scale, 4e-6)
    assert bool(((found.double() - wanted).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_labels_of_half_precision_images(dtype):
    """999 t rounded to bfloat16 would be off by up to 2 timesteps."""
    t = torch.linspace(0.5, 1.0, 64, dtype=torch.float64)
    seen = []
    model = lambda x, label: seen.append(label) or x  # noqa: E731
    score_fn(model, "eps", VP())(torch.zeros(64, 2, dtype=dtype), t)
    torch.testing.assert_close(seen[0].double(), 999 * t, rtol=1e-7, atol=0)


X, T = torch.zeros(2, 3), torch.tensor([0.2, 0.5])


def same(x, t):
    return x


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: score_fn(same, "noise", VP()), ValueError, "unknown parametrisation 'noise', .*"),
        (lambda: score_fn(same, "edm", VE()), ValueError, r"needs the SDE EDM, got VE\("),
        (lambda: prediction_fn(same, "ncsn", VP()), ValueError, "unknown prediction kind 'ncsn'"),
        (
            lambda: score_fn(lambda x, t: x[:, :2], "eps", VP())(X, T),
            ValueError,
            r"must return \(2, 3\), got \(2, 2\)",
        ),
        (lambda: score_fn(lambda x, t: None, "edm", EDM())(X, T), TypeError, "got NoneType"),
        (lambda: score_fn(same, "v", VP())(X, 2 * T + 1), ValueError, r"must lie in 0\.\.1"),
        (lambda: score_fn(same, "v", VP())(X, T[:1]), ValueError, r"\[\] or \[2\]"),
        (lambda: score_fn(same, "ncsn", VP())(X.long(), T), TypeError, "floating point"),
        (lambda: prediction_fn(same, "x0", VP())(X, T.long()), TypeError, "floating point"),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_ve_may_tell_its_network_the_logarithm_of_sigma(generator):
    sde, told = VE(label_by="log-sigma"), []
    x, t = draw(sde, generator)
    score_fn(lambda x, label: told.append(label) or x, "score", sde)(x, t)
    torch.testing.assert_close(told[0], sde.levels(t)[1].log())
    assert repr(sde) == "VE(sigma_min=0.01, sigma_max=50.0, label_by='log-sigma')"
    with pytest.raises(ValueError, match="is told sigma, not its logarithm"):
        score_fn(None, "ncsn", sde)
    with pytest.raises(ValueError, match="label_by"):
        VE(label_by="variance")


def test_a_network_of_sigma_is_told_it_by_losses_samplers_and_likelihoods(generator):
    """As score_sde tells its NCSN++: a U-Net that divides its output by sigma gives the score."""
    sde, told = VE(0.1, 10.0, label_by="sigma"), []

    def network(x, label):
        told.append(label.double())
        return -x / beside(label**2 + SPREAD**2, x)  # the score of N(0, SPREAD^2), noised

    diffusion = fastdiff.Diffusion(network, sde, "score")
    x = SPREAD * torch.randn(4, 2, 4, generator=generator)
    diffusion.loss(x, generator=generator)
    sampler = diffusion.sampler("ddim", 40, clip=None)
    images = diffusion.generate(sampler, (500, 2, 2), generator=generator).images
    assert images.std().item() == pytest.approx(SPREAD, rel=0.1)
    found = diffusion.log_likelihood(x).logp
    wanted = torch.distributions.Normal(0, math.hypot(SPREAD, 0.1)).log_prob(x).sum((1, 2))
    torch.testing.assert_close(found, wanted.double(), rtol=1e-3, atol=1e-2)
    for label in told:
        assert label.min() > 0.0999
        assert label.max() < 10.001
