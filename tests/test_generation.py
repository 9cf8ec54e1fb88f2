"""Drawing with either kind of sampler: guidance of both sorts, learned variances, what it took."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastdiff import Diffusion, sample, samplers, schedules, sde
from fastdiff.generation import Guide

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEDULE = schedules.linear(200, 5e-4, 0.1)
VARIANCE = 0.25
MEANS = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)


def beside(value: Tensor, x: Tensor) -> Tensor:
    return value.view(-1, *[1] * (x.ndim - 1)).to(x.dtype)


def gaussian(continuous: sde.SDE, time_of, calls=None):
    """eps of data N(MEANS[y], VARIANCE), at what a network is given for its time."""

    def model(x: Tensor, label: Tensor, y: Tensor) -> Tensor:
        if calls is not None:
            calls.append((len(x), label))
        alpha, sigma = (beside(v, x) for v in continuous.levels(time_of(label.double())))
        return sigma * (x - alpha * beside(MEANS[y], x)) / (alpha**2 * VARIANCE + sigma**2)

    return model


VP = sde.VP()
ON_SCHEDULE = Diffusion(
    gaussian(sde.Interpolated(SCHEDULE), lambda label: (label + 1) / 200), SCHEDULE
)
ON_SDE = Diffusion(gaussian(VP, lambda label: label / 999), VP)
BOTH = pytest.mark.parametrize("diffusion", [ON_SCHEDULE, ON_SDE], ids=["schedule", "sde"])
# Of samplers and solvers that follow the same ODE nearly exactly.
METHODS = (
    ("unipc-2", {"steps": 100}),
    ("ode", {"rtol": 1e-3, "atol": 1e-3}),
    ("probability-flow", {"steps": 600, "denoise": False}),
)


@BOTH
def test_samplers_and_solvers_meet(diffusion, generator):
    x_T = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    cond = {"y": torch.tensor([0, 1, 2])}
    found = {}
    for method, options in METHODS:
        sampler = diffusion.sampler(method, **options)
        drawn = diffusion.generate(sampler, (3, 4), x_T=x_T, cond=cond, progress=False)
        found[method] = drawn.images
    # A sampler ends without noise, a solver at the smallest time: on these data, nearly the same.
    for method, _ in METHODS[1:]:
        torch.testing.assert_close(found[method], found["unipc-2"], rtol=0, atol=0.02)


@BOTH
def test_classifier_free_guidance_is_the_same_both_ways(diffusion, generator):
    """Scores of Gaussians of one variance: guidance g moves the mean to u + g (c - u)."""
    x_T = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    cond = {"y": torch.tensor([0, 1, 2])}
    uncond = {"y": torch.tensor([1, 1, 1])}
    plain = diffusion.generate(
        diffusion.sampler("unipc-2", 100), (3, 4), x_T=x_T, cond=cond, progress=False
    ).images
    for method, options in METHODS:
        guided = diffusion.generate(
            diffusion.sampler(method, **options), (3, 4), x_T=x_T, cond=cond, uncond=uncond,
            guidance=3.0, progress=False, max_batch=2,
        ).images  # fmt: skip
        wanted = plain + 2 * MEANS.view(3, 1)
        torch.testing.assert_close(guided, wanted, rtol=0, atol=0.05)


@BOTH
def test_a_classifier_guides_both_ways(diffusion, generator):
    """log p(label | x, t) = +-slope(t) sum x tilts a Gaussian: the guided score stays one."""
    seen = []

    def classifier(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        up = torch.logit(torch.sigmoid(x.sum(1)))
        return torch.stack([-up, up], 1) / 2

    x_T = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    found = {}
    for method, options in (("unipc-2", {"steps": 100}), ("ode", {"rtol": 1e-3, "atol": 1e-3})):
        seen.clear()
        guide = Guide(classifier, torch.tensor([0, 1]), 0.5)
        found[method] = diffusion.generate(
            diffusion.sampler(method, **options), (2, 4), x_T=x_T,
            cond={"y": torch.tensor([1, 1])}, guide=guide, progress=False,
        ).images  # fmt: skip
        # The classifier is given what the network is: timesteps of the schedule, or 999 t.
        last = 199 if diffusion is ON_SCHEDULE else 999
        assert seen[0].double().max().item() == pytest.approx(last, abs=1e-3)
    torch.testing.assert_close(found["ode"], found["unipc-2"], rtol=0, atol=0.03)
    plain = diffusion.generate(
        diffusion.sampler("unipc-2", 100), (2, 4), x_T=x_T, cond={"y": torch.tensor([1, 1])},
        progress=False,
    ).images  # fmt: skip
    moved = found["unipc-2"] - plain
    assert bool((moved[0] < -0.02).all())
    assert bool((moved[1] > 0.02).all())


def test_what_it_took(generator):
    calls: list = []
    diffusion = Diffusion(gaussian(VP, lambda label: label / 999, calls), VP)
    cond = {"y": torch.tensor([0, 1, 2])}
    for method, options, wanted in (
        ("heun", {"steps": 4}, 7),
        ("probability-flow", {"steps": 4}, 5),
        ("ancestral", {"steps": 4, "corrector": "langevin"}, 9),
    ):
        calls.clear()
        sampler = diffusion.sampler(method, **options)
        drawn = diffusion.generate(sampler, (3, 4), cond=cond, progress=False)
        assert drawn.evaluations.tolist() == [wanted] * 3
        assert len(calls) == wanted
    calls.clear()
    drawn = diffusion.generate(diffusion.sampler("ode"), (3, 4), cond=cond, progress=False)
    assert int(drawn.evaluations.sum()) == sum(count for count, _ in calls)
    assert drawn.evaluations.dtype == torch.int64


def test_a_learned_variance_is_for_ddpm_alone(tiny_unet, generator):
    model = tiny_unet(learned_variance=True)
    diffusion = Diffusion(model, schedules.cosine(20), objective="vlb")
    assert diffusion.sampler("ddpm", 5).learned_variance
    x_T = torch.randn(2, 1, 8, 8, generator=generator)

    def first(x, t):
        return model(x, t)[:, :1]

    ddim = diffusion.sampler("ddim", 3)
    wanted = sample(first, ddim, x_T.shape, x_T=x_T, progress=False)
    plain = {"x_T": x_T, "mode": "eager", "progress": False}
    torch.testing.assert_close(diffusion.generate(ddim, x_T.shape, **plain).images, wanted)
    ode = diffusion.sampler("probability-flow", 3)
    fixed = Diffusion(first, schedules.cosine(20))
    torch.testing.assert_close(
        diffusion.generate(ode, x_T.shape, **plain).images,
        fixed.generate(ode, x_T.shape, **plain).images,
    )
    with pytest.raises(ValueError, match="needs a learned variance, the model has none"):
        fixed.generate(diffusion.sampler("ddpm", 5), x_T.shape, progress=False)
    # A classifier moves the mean, and leaves the variance as it is.
    guide = Guide(lambda x, t: torch.stack([-x.sum((1, 2, 3)), x.sum((1, 2, 3))], 1),
                  torch.tensor([0, 1]), 0.1)  # fmt: skip
    guided = diffusion.network.for_sampler(diffusion.sampler("ddpm", 5), guide)
    t = torch.tensor([3, 3])
    with torch.no_grad():
        moved = guided(x_T, t, labels=torch.tensor([0, 1])) - model(x_T, t)
    assert bool((moved[0, 0] > 0).all())  # eps is minus the score
    assert bool((moved[1, 0] < 0).all())
    assert bool((moved[:, 1] == 0).all())


def test_what_cannot_be_drawn():
    cond, ode = {"y": torch.tensor([0])}, ON_SDE.sampler("ode")
    with pytest.raises(TypeError, match="a solver has no option 'seed'"):
        ON_SDE.generate(ode, (1, 2), cond=cond, seed=3)
    with pytest.raises(ValueError, match="a solver takes one number for its guidance"):
        ON_SDE.generate(ode, (1, 2), cond=cond, guidance=[1.0, 2.0])
    with pytest.raises(ValueError, match=r"guidance 2\.0 needs the arguments without"):
        ON_SDE.generate(ode, (1, 2), cond=cond, guidance=2.0)
    with pytest.raises(ValueError, match="uncond must have the keys of cond"):
        ON_SDE.generate(ode, (1, 2), cond=cond, uncond={}, guidance=2.0)
    with pytest.raises(ValueError, match="made for v, the model predicts eps"):
        ON_SCHEDULE.generate(samplers.DDIM(SCHEDULE, 2, prediction="v"), (1, 2), cond=cond)
    with pytest.raises(ValueError, match="ode chooses its own steps"):
        ON_SDE.sampler("ode", 10)
    with pytest.raises(ValueError, match="annealed-langevin needs the SDE VE or EDM"):
        ON_SDE.sampler("annealed-langevin")
    with pytest.raises(TypeError, match="ancestral has no option 'eta'"):
        ON_SCHEDULE.sampler("ancestral", eta=1.0)
