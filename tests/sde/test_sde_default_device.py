"""Continuous time under ``torch.set_default_device``: everything stays beside the caller's images.

The default device is "meta", whose tensors have no values: whatever is made there is seen.
"""

from __future__ import annotations

import pytest
import torch

from fastdiff import Diffusion, objectives, schedules
from fastdiff.losses import score_matching
from fastdiff.sde import (
    EDM,
    VE,
    VP,
    Interpolated,
    Solver,
    Straight,
    SubVP,
    dequantize,
    discretize,
    log_likelihood,
)
from fastdiff.sde.solvers.by_name import METHODS

pytestmark = pytest.mark.usefixtures("one_thread")
MAKERS = {
    "vp": VP,
    "sub-vp": SubVP,
    "ve": lambda: VE(0.5, 2.0),
    "edm": EDM,
    "straight": Straight,
    "interpolated": lambda: Interpolated(COSINE),
}
COSINE = schedules.cosine(50)
X = torch.linspace(-1, 1, 12, device="cpu").view(2, 6)


@pytest.fixture(autouse=True)
def elsewhere():
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def score(x, t):
    return (-x / (1 + t[:, None] ** 2)).to(x.dtype)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("method", METHODS)
def test_solvers(name, method, generator):
    sde = MAKERS[name]()
    if method == "annealed-langevin" and name not in ("ve", "edm"):
        pytest.skip("annealed Langevin dynamics is for VE and EDM")
    solver = Solver(sde, method, None if method in ("ode", "adaptive") else 10)
    x_T = solver.prior((2, 3), generator=generator)
    found = solver.sample(score, x_T, generator=generator, progress=False)
    assert found.x.device.type == found.evaluations.device.type == "cpu"
    assert bool(found.x.isfinite().all())


@pytest.mark.parametrize("trace", ["hutchinson", "exact"])
@pytest.mark.parametrize("name", MAKERS)
def test_likelihoods(name, trace):
    sde = MAKERS[name]()
    found = log_likelihood(score, sde, X, trace=trace, progress=False, rtol=1e-2)
    assert found.logp.device.type == "cpu"
    levels = (torch.arange(12, dtype=torch.uint8, device="cpu") * 20).view(2, 6)
    assert dequantize(levels).device.type == "cpu"


@pytest.mark.parametrize("name", MAKERS)
def test_paths(name):
    path = discretize(MAKERS[name](), 10)
    assert path.alpha_t.device.type == "cpu"
    at = path.time(torch.arange(10, device="cpu"))
    torch.testing.assert_close(at, path.times, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["vp", "sub-vp", "ve", "interpolated"])
def test_losses_of_given_times(name, generator):
    sde = MAKERS[name]()
    t = torch.tensor([0.3, 0.7], dtype=torch.float64, device="cpu")
    noise = torch.randn(X.shape, generator=generator, device="cpu")
    found = score_matching.denoising_score_matching(score, sde, X, t, noise)
    assert found.device.type == "cpu"
    assert bool(found.isfinite().all())


@pytest.mark.parametrize(
    ("name", "objective", "prediction"),
    [
        ("vp", "dsm", "eps"),
        ("sub-vp", "dsm", "v"),
        ("ve", "ncsn", "ncsn"),
        ("edm", "edm", "edm"),
        ("edm", "dsm", "eps"),
    ],
)
def test_objectives(name, objective, prediction, generator):
    made = objectives.make(objective, MAKERS[name](), prediction)
    for source in (generator, None):
        t, weights = made.draw(2, source)
        assert t.device.type == weights.device.type == "cpu"
    diffusion = Diffusion(lambda x, t: 0.1 * x, MAKERS[name](), prediction, objective=objective)
    loss = diffusion.loss(X)
    assert loss.device.type == "cpu"
    assert bool(loss.isfinite())


def test_score_matching():
    assert score_matching.log_normal_sigma(3).device.type == "cpu"
    assert score_matching.geometric_sigmas(10.0, 0.1, 4).device.type == "cpu"
    assert score_matching.sliced_score_matching(lambda x: -x, X).device.type == "cpu"
