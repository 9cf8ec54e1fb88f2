"""Timesteps and continuous time: views of schedules, paths of SDEs, networks on them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fastdiff import sample, samplers, schedules
from fastdiff.samplers.grids import point_at_ratio, point_at_time
from fastdiff.sde import (
    EDM,
    VE,
    VP,
    DiscretizedSDE,
    Interpolated,
    Straight,
    SubVP,
    continuous,
    discretize,
    on_path,
    score_fn,
    time_grid,
)

SDES = [VP(), SubVP(), VE(), EDM(), Straight(), Interpolated(schedules.cosine(50))]
ALL = pytest.mark.parametrize("sde", SDES, ids=repr)


def float64(values):
    return torch.tensor(values, dtype=torch.float64)


def test_continuous():
    cosine, flow = schedules.cosine(20), schedules.flow(40, 3.0)
    seen = continuous(cosine)
    assert isinstance(seen, Interpolated)
    assert seen.schedule is cosine
    straight = continuous(flow)
    assert isinstance(straight, Straight)
    assert (straight.num_timesteps, straight.shift) == (40, 3.0)
    for sde in SDES:
        assert continuous(sde) is sde
        assert continuous(discretize(sde, 5)) is sde
    with pytest.raises(ValueError, match="'cosine' has no view in continuous time"):
        continuous("cosine")
    with pytest.raises(ValueError, match="zero terminal SNR"):
        continuous(schedules.make("linear", 10, zero_terminal_snr=True))


@ALL
def test_timesteps_are_the_solvers_times(sde):
    path = discretize(sde, 30)
    assert isinstance(path, DiscretizedSDE)
    assert path.num_timesteps == 30
    assert torch.equal(path.times, time_grid(sde, 29).flip(0))
    assert (path.times[0].item(), path.times[-1].item()) == (sde.smallest, sde.end)
    alpha, sigma = sde.levels(path.times)
    assert torch.equal(path.alpha_t, alpha)
    assert torch.equal(path.sigma_t, sigma)
    assert not path.has_zero_terminal_snr
    torch.testing.assert_close(path.time(torch.arange(30)), path.times, rtol=1e-10, atol=0)


@ALL
def test_fractions_are_those_of_the_samplers_grids(sde):
    """The network's time has the levels of the point that the sampler stands at."""
    path = discretize(sde, 30)
    for t in (0.0, 0.25, 3.5, 28.9, 29.0):
        at = point_at_time(path, t)
        alpha, sigma = sde.levels(path.time(float64(t)))
        assert [alpha.item(), sigma.item()] == pytest.approx([at.alpha, at.sigma], rel=1e-9)
        again = point_at_ratio(path, at.ratio)
        assert again.t == pytest.approx(t, abs=1e-9)


@ALL
def test_grids_of_sigmas_reach_the_ends(sde):
    path = discretize(sde, 30)
    for final in ("zero", "sigma_min"):
        spread = samplers.make("euler", path, 7, grid="logsnr", final=final)
        assert spread.timesteps[0].item() == pytest.approx(29)
        assert spread.table.levels[0].tolist() == pytest.approx(
            [path.alpha_t[-1].item(), path.sigma_t[-1].item()]
        )
        end = (1.0, 0.0) if final == "zero" else (path.alpha_t[0].item(), path.sigma_t[0].item())
        assert spread.table.levels[-1].tolist() == pytest.approx(end)
        assert spread.table.init_noise_sigma == pytest.approx(
            math.hypot(path.alpha_t[-1].item(), path.sigma_t[-1].item())
        )
    trailing = samplers.make("ddim", path, 7)
    assert trailing.timesteps[-1].item() == 0


def test_the_cosine_schedules_own_timesteps():
    schedule = schedules.cosine(50)
    path = discretize(continuous(schedule), 50)
    torch.testing.assert_close(path.alpha_t, schedule.alpha_t, rtol=1e-12, atol=0)
    label = path.sde.label(path.time(torch.arange(50)))
    torch.testing.assert_close(label, torch.arange(50).double(), rtol=0, atol=1e-8)


@ALL
@pytest.mark.parametrize("parametrisation", ["eps", "x0", "v", "score", "flow", "ncsn", "edm"])
def test_networks_say_on_a_path_what_they_say_in_continuous_time(sde, parametrisation, generator):
    """Their prediction implies the score that score_fn has."""
    if parametrisation == "edm" and not isinstance(sde, EDM):
        with pytest.raises(ValueError, match="'edm' needs the SDE EDM"):
            on_path(lambda x, label: x, parametrisation, discretize(sde))
        return

    def network(x, label, *, y):
        return torch.sin(x + label.view(-1, 1)) + y

    path = discretize(sde, 30)
    model, kind = on_path(network, parametrisation, path)
    assert kind == {"ncsn": "eps", "edm": "x0"}.get(parametrisation, parametrisation)
    x = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    t = float64([0.0, 7.25, 29.0])
    times = path.time(t)
    found = score_fn(lambda x, label: model(x, t, y=0.5), kind, sde)(x, times)
    wanted = score_fn(network, parametrisation, sde, y=0.5)(x, times)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_a_networks_own_label():
    seen = []

    def network(x, label):
        seen.append(label)
        return x

    model, _ = on_path(network, "eps", discretize(VP(), 5))
    model(torch.zeros(2, 3), torch.tensor([0, 4]))
    model(torch.zeros(2, 3, dtype=torch.bfloat16), torch.tensor([4, 4]))
    assert seen[0].tolist() == pytest.approx([0.999, 999])
    assert [label.dtype for label in seen] == [torch.float32] * 2


def test_modules_show_where_they_are():
    network = nn.Linear(3, 3)
    model, _ = on_path(network, "eps", discretize(VP(), 5))
    assert list(model.parameters()) == list(network.parameters())
    assert model.training
    assert not on_path(network.eval(), "eps", discretize(VP(), 5))[0].training


@ALL
def test_sampling_gives_the_data(sde, generator):
    """The whole way through fastdiff.sample, from its own noise, in single precision."""

    def network(x, label):
        alpha, sigma = sde.levels(times[label[0].item()])
        return (sigma * (x - alpha * 0.4) / ((alpha * 0.5) ** 2 + sigma**2)).to(x.dtype)

    path = discretize(sde, 40)
    times = {sde.label(t).float().item(): t for t in path.time(torch.arange(40))}
    model, kind = on_path(network, "eps", path)
    sampler = samplers.make("ddim", path, 40, prediction=kind, clip=None)
    images = sample(model, sampler, (2000, 1), generator=generator, progress=False)
    assert images.mean().item() == pytest.approx(0.4, abs=0.04)
    assert images.std().item() == pytest.approx(0.5, rel=0.08)


def test_refusals():
    with pytest.raises(ValueError, match="num_timesteps must be at least 2, got 1"):
        discretize(VP(), 1)
    with pytest.raises(TypeError, match="num_timesteps must be a whole number"):
        discretize(VP(), 2.5)
    with pytest.raises(ValueError, match="unknown parametrisation 'noise'"):
        on_path(lambda x, label: x, "noise", discretize(VP()))
