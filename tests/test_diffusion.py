"""Diffusion: loss, samples and likelihood in one object, on Gaussian data with known answers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff import Diffusion, losses, process, samplers, schedules, sde

VARIANCE = 0.25
SCHEDULE = schedules.linear(400)
PROCESSES = {"vp": sde.VP(), "subvp": sde.SubVP(), "ve": sde.VE(sigma_max=20.0), "edm": sde.EDM()}


def score_of(alpha: Tensor, sigma: Tensor, x: Tensor) -> Tensor:
    shape = (-1, *[1] * (x.ndim - 1))
    return -x / (alpha**2 * VARIANCE + sigma**2).view(shape).to(x.dtype)


def exact_discrete(kind: str, calls: list | None = None):
    def model(x: Tensor, t: Tensor, **cond) -> Tensor:
        if calls is not None:
            calls.append(cond)
        score = score_of(SCHEDULE.alpha_t[t], SCHEDULE.sigma_t[t], x)
        a, b = (
            v[t].view(-1, *[1] * (x.ndim - 1)) for v in process.conversion(SCHEDULE, "score", kind)
        )
        return (a * x + b * score).to(x.dtype)

    return model


def exact_continuous(forward: sde.SDE):
    """Predicts the score, from the label that the process makes of a time."""

    def model(x: Tensor, label: Tensor, **cond) -> Tensor:
        label = label.double()
        t = (4 * label).exp() if isinstance(forward, sde.EDM) else label / 999
        return score_of(*forward.levels(t), x)

    return model


@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
def test_the_loss_with_a_schedule_is_the_simple_loss(kind, generator) -> None:
    x0 = torch.randn(6, 3, 4, generator=generator, dtype=torch.float64)
    model = exact_discrete(kind)

    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(5)

    found = Diffusion(model, SCHEDULE, kind, weighting="min_snr").loss(x0, generator=seeded())
    g = seeded()
    seed = int(torch.randint(2**63 - 1, (), generator=g))
    noise = torch.tensor([[seed, i] for i in range(6)])
    t, _ = losses.Uniform(400).draw(6, g)
    weight = losses.weighting(SCHEDULE, kind, "min_snr")
    wanted = losses.simple_loss(SCHEDULE, model, x0, t, noise, kind=kind, weight=weight).mean()
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", PROCESSES)
def test_the_loss_in_continuous_time_is_least_for_the_true_score(name, generator) -> None:
    forward = PROCESSES[name]
    x0 = VARIANCE**0.5 * torch.randn(20_000, 3, generator=generator, dtype=torch.float64)
    true = exact_continuous(forward)

    def loss(factor: float) -> float:
        diffusion = Diffusion(lambda x, t: factor * true(x, t), forward, "score")
        return diffusion.loss(x0, generator=torch.Generator().manual_seed(1)).item()

    assert loss(1.0) < loss(0.9)
    assert loss(1.0) < loss(1.1)


def test_the_loss_of_edms_network(generator) -> None:
    """For Gaussian data of its sigma_data the best F is 0, and its target has variance 1."""
    x0 = 0.5 * torch.randn(20_000, 3, generator=generator, dtype=torch.float64)
    diffusion = Diffusion(lambda x, label: torch.zeros_like(x), sde.EDM(), "edm")
    assert diffusion.loss(x0, generator=generator).item() == pytest.approx(1.0, abs=0.02)


def test_gradients_reach_the_model(tiny_unet, generator) -> None:
    model = tiny_unet(num_classes=3)
    x0, labels = torch.randn(2, 1, 8, 8, generator=generator), torch.tensor([0, 2])
    for forward, prediction in ((SCHEDULE, "v"), (sde.VP(), "eps"), (sde.EDM(), "edm")):
        model.zero_grad()
        Diffusion(model, forward, prediction).loss(x0, class_labels=labels).backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.filterwarnings("ignore:fastdiff. .* never reaches noise")
def test_samples_with_a_schedule_are_those_of_fastdiff_sample() -> None:
    calls: list = []
    diffusion = Diffusion(exact_discrete("v", calls), SCHEDULE, "v")
    seeded = torch.Generator().manual_seed(3)
    found = diffusion.sample((5, 2, 3), generator=seeded, cond={"y": 1}, progress=False)
    assert calls == [{"y": 1}] * 20
    sampler = samplers.make("unipc-2", SCHEDULE, 20, prediction="v")
    wanted = fastdiff.sample(
        exact_discrete("v"), sampler, (5, 2, 3), generator=torch.Generator().manual_seed(3),
        progress=False,
    )  # fmt: skip
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize(
    ("method", "options"),
    [("ode", {"rtol": 1e-3, "atol": 1e-3}), ("adaptive", {}), ("ancestral", {"steps": 400})],
)
def test_samples_in_continuous_time_have_the_datas_deviation(name, method, options) -> None:
    diffusion = Diffusion(exact_continuous(PROCESSES[name]), PROCESSES[name], "score")
    seeded = torch.Generator().manual_seed(0)
    shape = (200, 64)
    images = diffusion.sample(shape, method=method, generator=seeded, progress=False, **options)
    deviation, count = VARIANCE**0.5, math.prod(shape)
    assert images.shape == shape
    bias = 0.02 if method == "ancestral" else 0.01  # of its steps, in which it is of order 1
    assert abs(images.std().item() - deviation) < 3 * deviation / math.sqrt(2 * count) + bias
    assert abs(images.mean().item()) < 3 * deviation / math.sqrt(count)


def test_images_that_leave_the_batch_take_their_conditions_along() -> None:
    """Image i is drawn from N(y_i, .): whatever order they finish in, its mean is its own."""
    forward = sde.VP()

    def model(x: Tensor, label: Tensor, y: Tensor) -> Tensor:
        alpha, sigma = forward.levels(label.double() / 999)
        spread = (alpha**2 * 1e-4 + sigma**2).view(-1, 1).to(x.dtype)
        return -(x - alpha.view(-1, 1).to(x.dtype) * y.view(-1, 1)) / spread

    y = torch.linspace(-3, 3, 7)
    diffusion = Diffusion(model, forward, "score")
    for method in ("ode", "adaptive"):
        images = diffusion.sample((7, 4), method=method, cond={"y": y}, progress=False)
        torch.testing.assert_close(images.mean(1), y, rtol=0, atol=0.1)


@pytest.mark.parametrize("forward", [SCHEDULE, *PROCESSES.values()], ids=["ddpm", *PROCESSES])
def test_the_likelihood_is_the_data_density(forward, generator) -> None:
    discrete = forward is SCHEDULE
    model = interpolated(forward) if discrete else exact_continuous(forward)
    diffusion = Diffusion(model, forward, "score")
    x = VARIANCE**0.5 * torch.randn(4, 3, generator=generator, dtype=torch.float64)
    found = diffusion.log_likelihood(x, trace="exact", rtol=1e-6, atol=1e-6, progress=False)
    continuous = diffusion.continuous
    alpha, sigma = continuous.levels(torch.tensor(continuous.smallest, dtype=torch.float64))
    deviation = (alpha**2 * VARIANCE + sigma**2).sqrt()
    wanted = torch.distributions.Normal(0.0, deviation).log_prob(x).sum(1)
    # The prior is a standard normal, the last marginal only nearly.
    torch.testing.assert_close(found.logp, wanted, rtol=0, atol=0.05)


def interpolated(schedule):
    continuous = sde.Interpolated(schedule)

    def model(x: Tensor, label: Tensor) -> Tensor:
        t = (label.double() + 1) / schedule.num_timesteps
        return score_of(*continuous.levels(t), x)

    return model


def test_bits_per_dim_by_both_methods() -> None:
    """On 8-bit values the bound is above what the ODE says, by less than a bit."""
    levels = (torch.randn(16, 2, 4, generator=torch.Generator().manual_seed(0)) * 0.5).clamp(-1, 1)
    x0 = ((levels + 1) * 127.5).round() / 127.5 - 1
    schedule = schedules.cosine(1000)
    diffusion = Diffusion(lambda x, t: predicted(schedule, x, t), schedule, "eps")
    bound = diffusion.bits_per_dim(x0, progress=False, batch_size=16)
    assert bound.shape == (16,)
    assert bound.dtype == torch.float64
    ode = diffusion.bits_per_dim(
        x0, method="ode", progress=False, trace="exact", rtol=1e-3, atol=1e-3
    )
    assert 0 < (bound.mean() - ode.mean()).item() < 1
    # A normal density of deviation 1/2 over levels 2/255 apart.
    entropy = math.log2(0.5 * math.sqrt(2 * math.pi * math.e) * 127.5)
    assert ode.mean().item() == pytest.approx(entropy, abs=0.3)


def predicted(schedule, x: Tensor, t: Tensor) -> Tensor:
    """eps for N(0, VARIANCE) at times that may lie between timesteps."""
    alpha, sigma = sde.Interpolated(schedule).levels((t.double() + 1) / schedule.num_timesteps)
    shape = (-1, *[1] * (x.ndim - 1))
    return -sigma.view(shape).to(x.dtype) * score_of(alpha, sigma, x)


def test_what_does_not_fit_is_refused() -> None:
    model = exact_discrete("eps")
    with pytest.raises(TypeError, match="forward must be a schedule or an SDE, got float"):
        Diffusion(model, 0.5)
    with pytest.raises(ValueError, match="unknown prediction kind 'noise'"):
        Diffusion(model, SCHEDULE, "noise")
    with pytest.raises(ValueError, match="unknown parametrisation 'noise'"):
        Diffusion(model, sde.VP(), "noise")
    with pytest.raises(ValueError, match="edm needs the process EDM, got VP"):
        Diffusion(model, sde.VP(), "edm")
    with pytest.raises(ValueError, match="says nothing of x0 at zero signal"):
        Diffusion(model, schedules.rescale_zero_terminal_snr(SCHEDULE), "eps")
    with pytest.raises(ValueError, match="'min_snr', wanted one of sigma, likelihood"):
        Diffusion(model, sde.VP(), weighting="min_snr")
    zero_snr = Diffusion(model, schedules.rescale_zero_terminal_snr(SCHEDULE), "v")
    with pytest.raises(ValueError, match="zero terminal SNR has no continuous view"):
        zero_snr.log_likelihood(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="method must be ode with VP"):
        Diffusion(model, sde.VP()).bits_per_dim(torch.zeros(1, 2), method="bound")
    with pytest.raises(ValueError, match="unknown method 'huen'"):
        Diffusion(model, sde.VP()).sample((1, 2), method="huen", progress=False)
