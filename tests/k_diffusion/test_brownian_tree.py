"""Noise of one Brownian path, whatever intervals are asked for, and in which order."""

from __future__ import annotations

import math
import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

import fastdiff.k_diffusion as K
from fastdiff.k_diffusion.brownian_tree import VirtualBrownianTree

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:torchsde is not installed"),
]

X = torch.zeros(2, 3, 100, 100)
ERRORS = 5  # standard errors


@pytest.fixture(autouse=True)
def without_torchsde(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchsde", None)  # whose import then fails


def test_increments_have_the_law_of_brownian_motion():
    """Over any partition they are independent and as large as their time."""
    tree = VirtualBrownianTree(X, 0.03, 14.6, 7)
    times = [0.03, 0.031, 0.1, 0.7, 2.5, 2.51, 9.0, 14.6]
    increments = torch.stack([tree(a, b).flatten() for a, b in pairwise(times)])
    widths = torch.tensor(times).diff()
    scaled = increments / widths.sqrt()[:, None]
    count = scaled.shape[1]
    covariance = scaled @ scaled.T / count
    torch.testing.assert_close(
        covariance, torch.eye(len(widths)), rtol=0, atol=ERRORS * math.sqrt(2 / count)
    )
    assert scaled.mean(1).abs().max() < ERRORS / math.sqrt(count)


def test_increments_add_up_in_any_order():
    whole = VirtualBrownianTree(X, 1.0, 9.0, 7)(2.0, 8.0)
    tree = VirtualBrownianTree(X, 1.0, 9.0, 7)
    later, earlier = tree(5.0, 8.0), tree(2.0, 5.0)
    torch.testing.assert_close(earlier + later, whole)
    assert torch.equal(tree(2.0, 8.0), whole)


def test_seeds():
    """One seed gives every image its own noise; of N seeds each image has its own path."""

    def draw(seed, images=2):
        return K.BrownianTreeNoiseSampler(X[:images], 0.1, 10.0, seed=seed)(3.0, 1.0)

    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))
    assert not torch.equal(draw(3)[0], draw(3)[1])
    assert torch.equal(draw([5, 6]).flip(0), draw([6, 5]))
    assert torch.equal(draw([5, 6])[:1], draw([5], images=1))
    torch.manual_seed(1)
    first = draw(None)
    torch.manual_seed(1)
    assert torch.equal(first, draw(None))
    assert not torch.equal(first, draw(None))


def test_noise_is_standard_and_a_step_up_is_the_opposite():
    noise = K.BrownianTreeNoiseSampler(X, 0.1, 10.0, seed=0)
    down, up = noise(torch.tensor(3.0), torch.tensor(1.0)), noise(1.0, 3.0)
    assert down.std().item() == pytest.approx(1, abs=ERRORS / math.sqrt(2 * X.numel()))
    assert torch.equal(down, -up)
    # Time that falls with sigma: the same path, the other way round.
    fallen = K.BrownianTreeNoiseSampler(X, 0.1, 10.0, seed=0, transform=lambda s: -s.log())
    assert torch.equal(fallen(3.0, 1.0), -fallen(1.0, 3.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_noise_is_like_the_images(dtype):
    x = X[:, :, :9, :7].to(dtype)
    found = K.BrownianTreeNoiseSampler(x, 0.1, 10.0, seed=0)(3.0, 1.0)
    assert (found.shape, found.dtype) == (x.shape, dtype)
    wanted = K.BrownianTreeNoiseSampler(x.float(), 0.1, 10.0, seed=0)(3.0, 1.0)
    torch.testing.assert_close(found.float(), wanted, rtol=0.01, atol=0.01)


def test_runs_with_more_steps_converge():
    """Along one path; with noise drawn anew for every step they do not."""

    def model(x, sigma):
        return x * 0.25 / (0.25 + sigma.view(-1, 1, 1, 1) ** 2)

    x = 10 * torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))

    def image(steps, noise):
        sigmas = K.get_sigmas_karras(steps, 0.05, 10.0)[:-1]
        return K.sample_dpmpp_2m_sde(model, x, sigmas, disable=True, noise_sampler=noise)

    def distance(make):
        return (image(200, make()) - image(400, make())).std().item()

    one_path = distance(lambda: K.BrownianTreeNoiseSampler(x, 0.05, 10.0, seed=1))
    assert one_path < 0.1 * distance(lambda: lambda a, b: torch.randn_like(x))


def test_what_is_refused():
    sampler = K.BrownianTreeNoiseSampler(X, 0.1, 10.0, seed=0)
    with pytest.raises(ValueError, match=r"from 0\.1 to 10, got 11"):
        sampler(11.0, 1.0)
    with pytest.raises(ValueError, match=r"two levels, got 3\.0 and 3\.0"):
        sampler(3.0, 3.0)
    with pytest.raises(ValueError, match="must have different times, got 2 and 2"):
        K.BrownianTreeNoiseSampler(X, 2.0, 2.0)
    with pytest.raises(ValueError, match="or 2, one an image, got 3"):
        K.BrownianTreeNoiseSampler(X, 0.1, 10.0, seed=[1, 2, 3])


def test_a_missing_torchsde_is_said():
    with pytest.warns(UserWarning, match="pip install torchsde"):
        K.BrownianTreeNoiseSampler(X, 0.1, 10.0, seed=0)


def test_an_installed_torchsde_is_used(monkeypatch):
    """Called as k-diffusion does: times in order, zeros at the first, one tree a seed."""
    calls = []

    def tree(t0, w0, t1, entropy):
        calls.append((t0, t1, entropy, tuple(w0.shape), w0.abs().sum().item()))
        return lambda a, b: torch.full_like(w0, (b - a) * entropy)

    monkeypatch.setitem(sys.modules, "torchsde", SimpleNamespace(BrownianTree=tree))
    found = K.BrownianTreeNoiseSampler(X, 0.1, 10.0, seed=5)(4.0, 1.0)
    torch.testing.assert_close(found, torch.full_like(X, -5 * math.sqrt(3)))
    found = K.BrownianTreeNoiseSampler(X, 0.1, 10.0, seed=[5, 7])(4.0, 1.0)
    torch.testing.assert_close(found[1], torch.full_like(X[1], -7 * math.sqrt(3)))
    shapes = [(2, 3, 100, 100), (3, 100, 100), (3, 100, 100)]
    ends = [pytest.approx(0.1), 10.0]
    for call, seed, shape in zip(calls, (5, 5, 7), shapes, strict=True):
        assert list(call) == [*ends, seed, shape, 0.0]
