"""Samplers, solvers, losses and likelihoods take samples of any number of dimensions alike.

Of a model that treats every value alone, signals and videos are images of other shapes: the same
numbers must come out.
"""

from __future__ import annotations

import pytest
import torch

import fastdiff
from fastdiff import samplers, schedules, sde

SHAPES = {"signals": (2, 3, 8), "videos": (2, 3, 2, 2, 2)}
IMAGES = (2, 3, 4, 2)
any_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def model(x, t, **_):
    return torch.tanh(x) * 0.9


def seeded():
    return torch.Generator().manual_seed(0)


def equal(found, expected):
    torch.testing.assert_close(found.reshape(expected.shape), expected, rtol=1e-6, atol=1e-6)


@any_shape
@pytest.mark.parametrize("name", samplers.names())
def test_samplers(name, shape):
    sampler = samplers.make(name, schedules.cosine(60), 5)
    expected, found = (
        fastdiff.sample(model, sampler, s, generator=seeded(), progress=False)
        for s in (IMAGES, shape)
    )
    assert found.shape == shape
    equal(found, expected)


@any_shape
@pytest.mark.parametrize("method", ["ode", "adaptive", "euler-maruyama", "reverse-diffusion"])
def test_solvers(method, shape):
    process = sde.VP()
    solver = sde.Solver(process, method, *([] if method in ("ode", "adaptive") else [5]))
    drawn = []
    for s in (IMAGES, shape):
        x = process.prior_sample(s, generator=seeded())
        score = sde.score_fn(model, "eps", process)
        drawn.append(solver.sample(score, x, generator=seeded(), progress=False).x)
    assert drawn[1].shape == shape
    equal(drawn[1], drawn[0])


@any_shape
@pytest.mark.parametrize("forward", [schedules.cosine(60), sde.VP()], ids=["steps", "sde"])
def test_losses_and_likelihoods(forward, shape):
    diffusion = fastdiff.Diffusion(model, forward)
    x0 = torch.rand(IMAGES, generator=seeded()) * 2 - 1
    losses = [diffusion.loss(x, generator=seeded()) for x in (x0, x0.reshape(shape))]
    equal(losses[1], losses[0])
    bits = [diffusion.bits_per_dim(x) for x in (x0, x0.reshape(shape))]
    assert bits[0].shape == bits[1].shape
    assert bool(bits[1].isfinite().all())
