"""Guidance away from weaker models, functions of x0, and shifts of a step's mean."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import fastdiff
from fastdiff import guidance, samplers, schedules, sde
from fastdiff.common.errors import InputError
from fastdiff.generation import Contrast
from fastdiff.process import KINDS

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEDULE = schedules.cosine(100)
SHAPE = (3, 2, 4, 4)


class Network(nn.Module):
    """Depends on all that it is given; with a learned variance if ``channels`` is 2."""

    def __init__(self, factor: float = 0.3, channels: int = 1) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))
        self.channels = channels

    def forward(self, x: Tensor, t: Tensor, shift: Tensor | float = 0.0) -> Tensor:
        shift = shift if isinstance(shift, float) else shift.view(-1, 1, 1, 1)
        out = self.factor * x * (1 + t.view(-1, 1, 1, 1) / 100) + shift * x.flip(-1)
        return torch.cat([out, 0.5 * torch.tanh(x)], 1) if self.channels == 2 else out


MODEL, WEAKER = Network(), Network(0.1)
SHIFT, NOTHING = torch.tensor([0.2, 0.1, -0.3]), torch.zeros(3)
COND = {"shift": fastdiff.PerImage(SHIFT), "without": {"shift": fastdiff.PerImage(NOTHING)}}


def drawn(model, name: str = "ddim", kind: str = "eps", **options) -> Tensor:
    sampler = samplers.make(name, SCHEDULE, 6, prediction=kind, clip=None)
    return fastdiff.sample(model, sampler, SHAPE, seed=0, progress=False, **options)


def test_a_weaker_model_is_guided_away_from(generator) -> None:
    x, t = torch.randn(SHAPE, generator=generator), torch.tensor([3, 50, 99])
    wanted = 2.5 * MODEL(x, t) - 1.5 * WEAKER(x, t)
    torch.testing.assert_close(guidance.autoguided(MODEL, WEAKER, 2.5)(x, t), wanted)
    torch.testing.assert_close(guidance.autoguided(MODEL, WEAKER, 1.0)(x, t), MODEL(x, t))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpmpp-2m", "heun"])
def test_projections_that_keep_all_are_classifier_free_guidance(kind: str, name: str) -> None:
    guided = guidance.adaptive_projected(MODEL, SCHEDULE, scale=3.0, kind=kind, eta=1.0)
    found = drawn(guided, name, kind, cond=COND, max_batch=2)
    plain = {"shift": fastdiff.PerImage(SHIFT)}, {"shift": fastdiff.PerImage(NOTHING)}
    wanted = drawn(MODEL, name, kind, cond=plain[0], uncond=plain[1], guidance=3.0)
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-3 * wanted.abs().max().item())


@pytest.mark.parametrize(
    "path", [SCHEDULE, schedules.flow(50), sde.discretize(sde.EDM())], ids=repr
)
def test_the_difference_of_x0_is_projected(path, generator) -> None:
    """Algorithm 1, with plain sums over one image."""
    x = torch.randn(1, 2, 4, 4, generator=generator, dtype=torch.float64)
    t, kind = torch.tensor([30.25], dtype=torch.float64), "v"
    rule = {"scale": 4.0, "eta": 0.25, "norm": 0.7}
    found = guidance.adaptive_projected(MODEL, path, weaker=WEAKER, kind=kind, **rule)(x, t)

    if isinstance(path, sde.DiscretizedSDE):
        alpha, sigma = (level.item() for level in path.sde.levels(path.time(t)))
    else:
        place = path.timestep(t).item()
        low, high = int(place), int(place) + 1
        lam = torch.lerp(path.lambda_t[low], path.lambda_t[high], place - low)
        alpha, sigma = (level.item() for level in path.levels(torch.exp(-lam)))
    power = alpha**2 + sigma**2
    own, other = ((alpha * x - sigma * f(x, t)) / power for f in (MODEL, WEAKER))
    difference = own - other
    length = difference.square().sum().sqrt().item()
    difference = difference * min(1, 0.7 / length)
    along = (difference * own).sum() / own.square().sum() * own
    x0 = own + 3.0 * (difference - along + 0.25 * along)
    torch.testing.assert_close(found, (alpha * x - power * x0) / sigma)


def test_momentum_sums_up_over_a_run(generator) -> None:
    guided = guidance.adaptive_projected(
        MODEL, SCHEDULE, scale=2.0, kind="x0", weaker=WEAKER, eta=1.0, momentum=-0.5
    )
    x, t = torch.randn(SHAPE, generator=generator), torch.tensor([3, 50, 99])
    first, second = MODEL(x, t) - WEAKER(x, t), MODEL(x, t - 1) - WEAKER(x, t - 1)
    guided.begin_sampling()
    torch.testing.assert_close(guided(x, t), MODEL(x, t) + first)
    torch.testing.assert_close(guided(x, t - 1), MODEL(x, t - 1) + second - 0.5 * first)
    # A run begins anew, and so does each slice of a batch.
    once = drawn(guided, kind="x0")
    assert torch.equal(drawn(guided, kind="x0"), once)
    torch.testing.assert_close(drawn(guided, kind="x0", max_batch=2), once)
    with pytest.raises(ValueError, match=r"keeps values .* auto or eager, got 'compile'"):
        drawn(guided, mode="compile")


def test_a_contrast_is_checked() -> None:
    diffusion = fastdiff.Diffusion(MODEL, SCHEDULE)
    sampler = diffusion.sampler("ddim", 3)
    twice = Contrast(guidance.Linear(2.0), WEAKER)
    with pytest.raises(InputError, match="a scale of its own, got guidance 3"):
        diffusion.generate(sampler, SHAPE, contrast=twice, guidance=3.0)
    with pytest.raises(InputError, match="needs a weaker model, or uncond"):
        diffusion.generate(sampler, SHAPE, contrast=Contrast(guidance.Linear(2.0)))


@pytest.mark.parametrize("method", ["dpmpp-2m", "ode", "euler-maruyama"])
def test_networks_of_continuous_time_are_guided_too(method: str) -> None:
    """By itself without its arguments, and by itself with them as the weaker one, which is none."""
    diffusion = fastdiff.Diffusion(MODEL, sde.VP())
    sampler = diffusion.sampler(method, None if method == "ode" else 4)

    def images(**options) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return diffusion.generate(
            sampler,
            SHAPE,
            generator=generator,
            progress=False,
            cond={"shift": fastdiff.PerImage(SHIFT)},
            **options,
        ).images

    marked = {"shift": fastdiff.PerImage(NOTHING)}
    plain = images(uncond=marked, guidance=2.0)
    rule = guidance.Projected(2.0, eta=1.0)
    options = {"rtol": 1e-3, "atol": 1e-3 * plain.abs().max().item()}
    torch.testing.assert_close(images(uncond=marked, contrast=Contrast(rule)), plain, **options)
    same = images(contrast=Contrast(guidance.Linear(5.0), MODEL))
    torch.testing.assert_close(same, images(), **options)
    assert not torch.allclose(plain, same, **options)


def test_a_learned_variance_is_the_models_own(generator) -> None:
    model, weaker = Network(channels=2), Network(0.1, channels=2)
    x, t = torch.randn(SHAPE, generator=generator), torch.tensor([3, 50, 99])
    clamp = guidance.denoised(model, lambda x0: x0.clamp(-1, 1), SCHEDULE)
    for guided in (guidance.autoguided(model, weaker, 2.0), clamp):
        assert torch.equal(guided(x, t)[:, 2:], model(x, t)[:, 2:])
        assert not torch.equal(guided(x, t)[:, :2], model(x, t)[:, :2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler"])
def test_a_function_of_x0_may_be_what_a_sampler_does_itself(kind: str, name: str) -> None:
    clipped = samplers.make(name, SCHEDULE, 6, prediction=kind, clip=(-0.8, 0.8))
    wanted = fastdiff.sample(MODEL, clipped, SHAPE, seed=0, progress=False)
    model = guidance.denoised(MODEL, lambda x0: x0.clamp(-0.8, 0.8), SCHEDULE, kind=kind)
    torch.testing.assert_close(drawn(model, name, kind), wanted, rtol=1e-4, atol=1e-4)


def of_x(x: Tensor, t: Tensor, target: Tensor | float = 0.3) -> Tensor:
    return -(x - target).square().sum((1, 2, 3)) * (1 + t / 10)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("kind", ["eps", "v"])
def test_a_means_shift_is_variance_times_gradient(variance: str, kind: str, generator) -> None:
    sampler = samplers.make("ddpm", SCHEDULE, 5, prediction=kind, clip=None, variance=variance)
    model = Network(channels=2 if variance == "learned_range" else 1)
    guided = guidance.condition_mean(model, of_x, sampler, scale=1.5, arguments=["target"])
    respaced = SCHEDULE.respaced(sampler.table.timesteps.long().flip(0))
    small, large = respaced.posterior_log_variance_clipped.exp(), respaced.betas
    x = torch.randn(SHAPE, generator=generator)
    for step in (0, 2, 4):
        table = sampler.starting_at(step).table
        t, back = table.timesteps[0].long().expand(3), 4 - step
        if variance == "learned_range":
            share = (model(x, t)[:, 2:] + 1) / 2
            spread = (share * large[back].log() + (1 - share) * small[back].log()).exp()
        elif variance == "fixed_large":
            spread = large[back]
        else:
            spread = respaced.posterior_variance[back]
        gradient = 1.5 * -2 * (x - 0.1) * (1 + t.view(-1, 1, 1, 1) / 10)
        row, noise = torch.tensor(0), torch.zeros_like(x)
        moved, plain = (
            fastdiff.ops.sampler_step(x, f, None, noise, table.values.float(), row)
            for f in (guided(x, t, target=0.1), model(x, t))
        )
        torch.testing.assert_close(moved - plain, (spread * gradient).float(), rtol=1e-4, atol=1e-5)


def test_a_guided_run_of_shifted_means() -> None:
    sampler = samplers.make("ddpm", SCHEDULE, 20, clip=None)
    pulled = guidance.condition_mean(MODEL, lambda x, t: -x.square().sum((1, 2, 3)), sampler)
    strengths = [
        fastdiff.sample(model, sampler, SHAPE, seed=0, progress=False).square().mean().item()
        for model in (MODEL, pulled)
    ]
    assert strengths[1] < strengths[0]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: guidance.autoguided(MODEL, WEAKER, math.inf), ValueError, "scale must be finite"),
        (lambda: guidance.Projected(2.0, norm=0.0), ValueError, "norm must be positive, got 0.0"),
        (lambda: guidance.Projected(2.0, momentum=1.0), ValueError, "momentum must .* got 1.0"),
        (
            lambda: guidance.adaptive_projected(MODEL, SCHEDULE, scale=2.0, kind="noise"),
            ValueError,
            "unknown prediction kind 'noise'",
        ),
        (
            lambda: guidance.denoised(
                MODEL, torch.tanh, schedules.rescale_zero_terminal_snr(SCHEDULE)
            ),
            ValueError,
            "eps says nothing of x0",
        ),
        (
            lambda: guidance.denoised(MODEL, lambda x0: x0[:1], SCHEDULE)(
                torch.zeros(SHAPE), torch.zeros(3)
            ),
            ValueError,
            r"must return x0 of shape \(3, 2, 4, 4\), got \(1, 2, 4, 4\)",
        ),
        (
            lambda: guidance.condition_mean(MODEL, of_x, samplers.make("ddim", SCHEDULE, 5)),
            TypeError,
            "for the sampler ddpm, got",
        ),
        (
            lambda: guidance.condition_mean(MODEL, of_x, samplers.make("ddpm", SCHEDULE, 5)),
            ValueError,
            "clip=None",
        ),
        (
            lambda: guidance.condition_mean(
                MODEL, of_x, samplers.make("ddpm", SCHEDULE, 5, clip=None)
            )(torch.zeros(SHAPE), torch.tensor([1, 2, 3])),
            ValueError,
            r"times \[1, 2, 3\] are not those",
        ),
    ],
)
def test_refusals(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
