"""Objectives: the times that they draw, the losses that they give, and what does not fit."""

from __future__ import annotations

import json

import pytest
import torch

from fastdiff import Diffusion, losses, objectives, schedules, sde
from fastdiff.common.errors import InputError
from fastdiff.losses import score_matching

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEDULE, FLOW = schedules.cosine(50), schedules.flow(50)
ZERO_SNR = schedules.rescale_zero_terminal_snr(SCHEDULE)
VP, VE, EDM = sde.VP(), sde.VE(sigma_max=20.0), sde.EDM()


def linear(channels: int = 2):
    """A model that depends on all that it is given, of 2 channels or 4."""

    def model(x: torch.Tensor, t: torch.Tensor, shift: float = 0.0) -> torch.Tensor:
        out = 0.3 * x + 0.01 * t.to(x.dtype).view(-1, 1, 1) + shift
        return torch.cat([out, 0.5 * x], 1) if channels == 4 else out

    return model


@pytest.fixture
def batch(generator):
    x0, noise = (torch.randn(5, 2, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    return x0.clamp(-1, 1), noise


# What is drawn.


@pytest.mark.parametrize("times", ["uniform", "low-discrepancy"])
def test_times_of_an_sde_cover_it(times, generator):
    made = objectives.make("dsm", VP, timesteps=times)
    t, weights = made.draw(2000, generator)
    assert t.dtype == torch.float64
    assert bool((weights == 1).all())
    share = ((t - VP.trained_from) / (VP.end - VP.trained_from)).sort().values
    even = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    # Kolmogorov's statistic: 1.63 / sqrt(n) is exceeded once in a hundred.
    limit = 1.63 / 2000**0.5 if times == "uniform" else 1.01 / 2000
    assert (share - even).abs().max().item() < limit


def test_times_of_edm_are_log_normal(generator):
    t, weights = objectives.make(None, EDM, "edm").draw(4000, generator)
    assert t.log().mean().item() == pytest.approx(-1.2, abs=0.06)
    assert t.log().std().item() == pytest.approx(1.2, abs=0.04)
    assert bool((weights == 1).all())


@pytest.mark.parametrize("name", objectives.DENSITIES)
@pytest.mark.parametrize("forward", [VP, VE, EDM, sde.LinearLogSNR()], ids=repr)
def test_times_follow_a_density_of_the_log_snr(name, forward, generator):
    kind = "edm" if forward is EDM else "eps"
    t, weights = objectives.make(None, forward, kind, timesteps=name).draw(2000, generator)
    alpha, sigma = forward.levels(t)
    density = objectives.DENSITIES[name]
    ends = torch.tensor([forward.end, forward.trained_from], dtype=torch.float64)
    low, high = density.cumulative(-2 * (forward.levels(ends)[1] / forward.levels(ends)[0]).log())
    share = (density.cumulative(2 * (alpha / sigma).log()).sort().values - low) / (high - low)
    even = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    assert (share - even).abs().max().item() < 1.63 / 2000**0.5  # Kolmogorov's, once in a hundred
    assert bool((weights == 1).all())


def test_times_of_ncsn_are_those_of_a_geometric_ladder(generator):
    made = objectives.make("ncsn", VE, "ncsn", levels=7)
    sigma = VE.levels(made.draw(500, generator)[0])[1].unique()
    ladder = score_matching.geometric_sigmas(VE.sigma_max, VE.sigma_min, 7)
    torch.testing.assert_close(sigma, ladder.flip(0))


@pytest.mark.parametrize("name", objectives.DISCRETE)
def test_timesteps_are_those_of_the_sampler_named(name):
    for forward, prediction in ((SCHEDULE, "v"), (FLOW, "flow")):
        kind = objectives.DISCRETE[name](forward)
        made = objectives.make(None, forward, prediction, timesteps=name)
        found, wanted = (x.draw(9, torch.Generator().manual_seed(1)) for x in (made, kind))
        assert torch.equal(found[0], wanted[0])
        assert torch.equal(found[1], wanted[1])


# What is lost.


def test_losses_with_a_schedule(batch):
    x0, noise = batch
    t = torch.tensor([0, 10, 20, 30, 49])
    weight = losses.weighting(SCHEDULE, "v", "min_snr")
    for made, channels, wanted in (
        (
            objectives.make("ddpm", SCHEDULE, "v", weighting="min_snr"),
            2,
            lambda m: losses.simple_loss(
                SCHEDULE, m, x0, t, noise, kind="v", weight=weight, shift=0.2
            ),
        ),
        (
            objectives.make("hybrid", SCHEDULE),
            4,
            lambda m: losses.hybrid_loss(SCHEDULE, m, x0, t, noise, shift=0.2),
        ),
        (
            objectives.make("vlb", SCHEDULE),
            4,
            lambda m: losses.rescaled_kl(SCHEDULE, m, x0, t, noise, shift=0.2),
        ),
        (
            objectives.make("flow", FLOW, "flow"),
            2,
            lambda m: losses.simple_loss(FLOW, m, x0, t, noise, kind="flow", shift=0.2),
        ),
    ):
        model = linear(channels)
        found = made.losses(model, x0, t, noise, shift=0.2)
        torch.testing.assert_close(found, wanted(model))
        weights = torch.arange(1.0, 6.0, dtype=torch.float64)
        mean = made.loss(model, x0, t, weights, noise, shift=0.2)
        torch.testing.assert_close(mean, (weights * found).mean())


def test_losses_in_continuous_time(batch):
    x0, noise = batch
    t = torch.tensor([0.01, 0.2, 0.4, 0.7, 1.0], dtype=torch.float64)
    model = linear()
    score = sde.score_fn(model, "x0", VP, shift=0.2)
    made = objectives.make("dsm", VP, "x0", weighting="likelihood")
    torch.testing.assert_close(
        made.losses(model, x0, t, noise, shift=0.2),
        score_matching.denoising_score_matching(score, VP, x0, t, noise, weighting="likelihood"),
    )
    made = objectives.make(None, EDM, "edm")
    torch.testing.assert_close(
        made.losses(model, x0, t, noise, shift=0.2),
        score_matching.edm_loss(model, EDM, x0, t, noise, shift=0.2),
    )
    # Of ncsn by its formula: the model's output over sigma is the score.
    sigma = VE.levels(t)[1]
    level = sigma.view(-1, 1, 1)
    output = model(x0 + level * noise, sigma, shift=0.2)
    wanted = ((output + noise) ** 2).mean(dim=(1, 2)) / 2
    made = objectives.make("ncsn", VE, "ncsn")
    torch.testing.assert_close(
        made.losses(model, x0, t, noise, shift=0.2), wanted, rtol=1e-6, atol=0
    )


def test_loss_second_moment_learns_and_is_taken_up_again(generator):
    x0 = torch.randn(64, 2, 3, generator=generator).clamp(-1, 1)
    made = objectives.make("vlb", schedules.cosine(4))
    noise = torch.randn(x0.shape, generator=generator)
    for _ in range(8):
        t, weights = made.draw(64, generator)
        made.loss(linear(4), x0, t, weights, noise)
    assert not torch.equal(made.times.probabilities, torch.full((4,), 0.25, dtype=torch.float64))
    again = objectives.make("vlb", schedules.cosine(4))
    again.load_state_dict(json.loads(json.dumps(made.state_dict())))
    assert torch.equal(again.times.probabilities, made.times.probabilities)
    # A loss that is not finite ends the training; it is not for the sampler to say so.
    bad = made.loss(lambda x, t: torch.cat([x, x], 1) * torch.nan, x0, t, weights, noise)
    assert bool(bad.isnan())
    assert objectives.make("ddpm", SCHEDULE).state_dict() == {}
    with pytest.raises(ValueError, match="ddpm keeps no losses of timesteps"):
        objectives.make("ddpm", SCHEDULE).load_state_dict(made.state_dict())


# What is natural, and what does not fit.


@pytest.mark.parametrize(
    ("forward", "prediction", "options", "name"),
    [
        pytest.param(SCHEDULE, "v", {}, "ddpm", id="schedule"),
        pytest.param(SCHEDULE, "eps", {"variance": "learned"}, "hybrid", id="learned variance"),
        pytest.param(FLOW, "flow", {}, "flow", id="flow"),
        pytest.param(VP, "eps", {}, "dsm", id="vp"),
        pytest.param(EDM, "x0", {}, "dsm", id="edm's process"),
        pytest.param(EDM, "edm", {}, "edm", id="edm"),
        pytest.param(VE, "ncsn", {}, "dsm", id="ve"),
    ],
)
def test_the_natural_objective(forward, prediction, options, name):
    made = objectives.make(None, forward, prediction, **options)
    assert made.name == name
    assert made.learned == ("variance" in options)


@pytest.mark.parametrize(
    ("name", "forward", "options", "message"),
    [
        ("dpm", SCHEDULE, {}, "unknown objective 'dpm', wanted one of ddpm, hybrid"),
        ("ddpm", VP, {}, "ddpm needs the process NoiseSchedule, got VP"),
        ("ddpm", FLOW, {"prediction": "flow"}, "ddpm needs the process NoiseSchedule, got Flow"),
        ("flow", SCHEDULE, {}, "flow needs the process FlowSchedule"),
        ("dsm", SCHEDULE, {}, "dsm needs an SDE, got NoiseSchedule"),
        ("ncsn", VP, {"prediction": "ncsn"}, "ncsn needs the process VE, got VP"),
        ("edm", VP, {"prediction": "edm"}, "edm needs the process EDM, got VP"),
        ("ddpm", SCHEDULE, {"prediction": "noise"}, "unknown prediction kind 'noise'"),
        ("ddpm", SCHEDULE, {"prediction": "ncsn"}, "unknown prediction kind 'ncsn'"),
        ("dsm", VP, {"prediction": "noise"}, "unknown parametrisation 'noise'"),
        ("dsm", EDM, {"prediction": "edm"}, "edm is trained by the objective edm, not dsm"),
        ("ncsn", VE, {}, "ncsn trains the prediction ncsn, got eps"),
        ("edm", EDM, {}, "edm trains the prediction edm, got eps"),
        ("ddpm", ZERO_SNR, {}, "eps says nothing of x0 at zero signal-to-noise ratio"),
        ("flow", FLOW, {"prediction": "score"}, "score says nothing of x0 at zero signal"),
        ("ddpm", SCHEDULE, {"weighting": "sigma"}, "unknown weighting 'sigma'"),
        ("vlb", SCHEDULE, {"weighting": "p2"}, "vlb has weights of its own, .* 'p2'"),
        ("dsm", VP, {"weighting": "min_snr"}, "unknown weighting 'min_snr', wanted .* likelihood"),
        ("edm", EDM, {"prediction": "edm", "weighting": "sigma"}, "edm has weights of its own"),
        ("ddpm", SCHEDULE, {"timesteps": "log-normal"}, "unknown timestep sampler 'log-normal'"),
        ("dsm", VP, {"timesteps": "loss-second-moment"}, "in continuous time 'loss-second-moment'"),
        ("dsm", VP, {"timesteps": "logit-normal"}, "in continuous time 'logit-normal'"),
        ("edm", EDM, {"prediction": "edm", "timesteps": "uniform"}, "'uniform', .* log-normal"),
        ("ncsn", VE, {"prediction": "ncsn", "timesteps": "low-discrepancy"}, "with ncsn 'low-dis"),
        ("ddpm", SCHEDULE, {"variance": "learned_range"}, "ddpm does not train a learned_range"),
        ("hybrid", SCHEDULE, {"variance": "fixed_small"}, "hybrid trains a learned variance"),
        ("vlb", SCHEDULE, {"variance": "small"}, "unknown variance 'small'"),
        ("dsm", VP, {"variance": "learned"}, "VP.* has no steps whose variance could be learned"),
        ("flow", FLOW, {"prediction": "flow", "variance": "fixed_small"}, "has no steps whose"),
        ("dsm", VP, {"levels": 10}, "levels are for the objective ncsn, not dsm"),
        ("ncsn", VE, {"prediction": "ncsn", "levels": 1}, "levels must be at least 2, got 1"),
    ],
)
def test_what_does_not_fit_is_refused(name, forward, options, message):
    with pytest.raises(InputError, match=message):
        objectives.make(name, forward, **options)
    with pytest.raises(InputError, match=message):
        Diffusion(linear(), forward, objective=name, **options)


def test_a_forward_process_of_no_kind_is_refused():
    with pytest.raises(TypeError, match="forward must be a schedule or an SDE, got str"):
        objectives.make("ddpm", "cosine")
