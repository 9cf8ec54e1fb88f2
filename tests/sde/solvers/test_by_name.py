"""Solver: each method is its function, what it counts, and what it refuses before it runs."""

from __future__ import annotations

import pytest
import torch

from fastdiff import schedules
from fastdiff.sde import (
    EDM,
    VE,
    VP,
    Interpolated,
    Solver,
    Straight,
    SubVP,
    annealed_langevin,
    solve,
    solve_adaptive,
    solve_ode,
)
from fastdiff.sde.solvers.by_name import METHODS, names

pytestmark = pytest.mark.usefixtures("one_thread")

MEAN, STD = 0.3, 0.5
STEPPED = ("euler-maruyama", "reverse-diffusion", "ancestral", "probability-flow")


def gaussian(sde):
    def score(x, t):
        alpha, sigma = (level.view(-1, 1) for level in sde.levels(t))
        return (-(x - alpha * MEAN) / ((alpha * STD) ** 2 + sigma**2)).to(x.dtype)

    return score


def seeded():
    return torch.Generator().manual_seed(5)


def test_the_methods():
    assert names() == METHODS == ("ode", "adaptive", *STEPPED, "annealed-langevin")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "sde",
    [VP(), SubVP(), VE(0.01, 10), EDM(0.01, 20), Straight(), Interpolated(schedules.cosine(100))],
    ids=repr,
)
def test_every_way_leads_to_the_data(sde, method, generator):
    if method == "annealed-langevin" and not isinstance(sde, (VE, EDM)):
        with pytest.raises(ValueError, match="annealed-langevin needs the SDE VE or EDM"):
            Solver(sde, method)
        return
    steps = None if method in ("ode", "adaptive") else 400
    options = {"eps_rel": 0.05} if method == "adaptive" else {}
    solver = Solver(sde, method, steps, **options)
    x_T = solver.prior((1500, 2), generator=generator)
    assert x_T.std().item() == pytest.approx(sde.prior_std, rel=0.05)
    found = solver.sample(gaussian(sde), x_T, generator=generator, progress=False)
    assert found.x.shape == x_T.shape
    assert found.x.mean().item() == pytest.approx(MEAN, abs=0.05)
    assert found.x.std().item() == pytest.approx(STD, rel=0.12)
    assert (found.evaluations.dtype, found.evaluations.shape) == (torch.int64, (1500,))


def test_each_is_its_function(generator):
    sde = VE(0.02, 5.0)
    score, x_T = gaussian(sde), 5 * torch.randn(6, 2, generator=generator)
    run = {"generator": seeded(), "progress": False}

    def found(*arguments, **options):
        return Solver(sde, *arguments, **options).sample(
            score, x_T, generator=seeded(), progress=False
        )

    ode = found("ode", rtol=1e-3, atol=1e-4, pair="bosh3")
    wanted = solve_ode(score, sde, x_T, rtol=1e-3, atol=1e-4, method="bosh3")
    assert torch.equal(ode.x, wanted.x)
    assert torch.equal(ode.evaluations, wanted.evaluations)

    adaptive = found("adaptive", eps_rel=0.1, norm="linf")
    wanted = solve_adaptive(score, sde, x_T, eps_rel=0.1, norm="linf", **run)
    assert torch.equal(adaptive.x, wanted.x)
    assert torch.equal(adaptive.evaluations, wanted.evaluations)

    for method in STEPPED:
        options = {"corrector": "langevin", "snr": 0.1, "corrector_steps": 2, "denoise": False}
        run["generator"] = seeded()
        wanted = solve(score, sde, x_T, 7, method=method, **options, **run)
        again = found(method, 7, **options)
        assert torch.equal(again.x, wanted)
        assert again.evaluations.tolist() == [21] * 6
    assert found("ancestral", 7).evaluations.tolist() == [8] * 6

    run["generator"] = seeded()
    sigmas = torch.logspace(0, 1, 4, 5.0 / 0.02, dtype=torch.float64).flip(0) * 0.02
    options = {"steps_each": 3, "step": 1e-4}
    wanted = annealed_langevin(
        lambda x, sigma: score(x, sde.time_at(sigma)), sigmas, x_T, **options, **run
    )
    langevin = found("annealed-langevin", 12, **options)
    torch.testing.assert_close(langevin.x, wanted, rtol=1e-3, atol=1e-3)
    assert langevin.evaluations.tolist() == [13] * 6


@pytest.mark.parametrize("method", METHODS)
def test_a_conditioned_score_is_told_its_images(method):
    """The images of each place have a mean of their own."""
    sde = VE(0.01, 10.0)
    means = torch.tensor([-2.0, 0.0, 2.0])

    def score(x, t, index):
        _, sigma = sde.levels(t)
        return (-(x - means[index, None]) / sigma[:, None] ** 2).to(x.dtype)

    solver = Solver(sde, method, None if method in ("ode", "adaptive") else 200)
    x_T = solver.prior((3, 4), generator=seeded())
    found = solver.sample(score, x_T, conditioned=True, generator=seeded(), progress=False)
    torch.testing.assert_close(found.x, means[:, None].expand(3, 4), rtol=0, atol=0.1)


def test_the_generator_decides(generator):
    sde = VP()
    solver = Solver(sde, "euler-maruyama", 5)
    x_T = solver.prior((2, 3), generator=generator)
    one, two, other = (
        solver.sample(gaussian(sde), x_T, generator=g, progress=False).x
        for g in (seeded(), seeded(), generator)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_steps_and_repr():
    assert Solver(VP()).steps is None
    assert Solver(VP(), "ancestral").steps == 500
    assert repr(Solver(VP(), "ode", rtol=1e-3)) == (
        "Solver(VP(beta_min=0.1, beta_max=20.0), 'ode', rtol=0.001)"
    )
    assert repr(Solver(VE(), "ancestral", 9)) == (
        "Solver(VE(sigma_min=0.01, sigma_max=50.0), 'ancestral', steps=9)"
    )


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("heun",), {}, ValueError, "unknown method 'heun', wanted one of ode, adaptive, euler-"),
        (("ode", 5), {}, ValueError, "ode chooses its own steps, got steps=5"),
        (("adaptive", 5), {}, ValueError, "adaptive chooses its own steps"),
        (("ode",), {"snr": 1}, TypeError, "ode has no option 'snr', it has rtol, atol, pair"),
        (("ode",), {"rtol": -1.0}, ValueError, "rtol must not be negative, nor infinite, got -1"),
        (("ode",), {"atol": 0}, ValueError, "atol must be positive and finite, got 0"),
        (("ode",), {"atol": "small"}, TypeError, "atol must be a number, got 'small'"),
        (("ode",), {"pair": "rk4"}, ValueError, "unknown pair 'rk4', wanted one of heun21"),
        (("ode",), {"max_evaluations": 0}, ValueError, "max_evaluations must be at least 1"),
        (("adaptive",), {"norm": "l1"}, ValueError, "unknown norm 'l1', wanted one of l2, linf"),
        (("adaptive",), {"denoise": 1}, TypeError, "denoise must be True or False, got 1"),
        (("adaptive",), {"h_init": True}, TypeError, "h_init must be a number, got True"),
        (("ancestral", 0), {}, ValueError, "steps must be at least 1, got 0"),
        (("ancestral", 2.5), {}, TypeError, "steps must be a whole number, got 2.5"),
        (("ancestral",), {"corrector": "mala"}, ValueError, "unknown corrector 'mala'"),
        (("ancestral",), {"corrector_steps": 1.5}, TypeError, "corrector_steps must be a whole"),
        (("annealed-langevin", 12), {}, ValueError, "a multiple of 5 from 10 on, got 12"),
        (("annealed-langevin", 5), {}, ValueError, "a multiple of 5 from 10 on, got 5"),
        (("annealed-langevin",), {"step": 0.0}, ValueError, "step must be positive"),
    ],
)
def test_refusals(arguments, options, error, message):
    with pytest.raises(error, match=message):
        Solver(VE(), *arguments, **options)
