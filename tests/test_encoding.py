"""Images to noise and back, and noise between two noises."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastdiff import Diffusion, PerImage, schedules, sde
from fastdiff.generation import slerp

pytestmark = pytest.mark.usefixtures("one_thread")

PROCESSES = [schedules.cosine(100), schedules.flow(100), sde.VP(), sde.VE(sigma_max=20.0)]


def model(x: Tensor, t: Tensor, shift: Tensor | float = 0.0) -> Tensor:
    shift = shift if isinstance(shift, float) else shift.view(-1, 1)
    return torch.tanh(x / 2 + shift)


@pytest.mark.parametrize("forward", PROCESSES, ids=repr)
def test_images_are_drawn_again_from_their_noise(forward, generator) -> None:
    diffusion = Diffusion(
        model, forward, "flow" if isinstance(forward, schedules.FlowSchedule) else "eps"
    )
    x = torch.rand(3, 4, generator=generator, dtype=torch.float64) * 2 - 1
    cond = {"shift": PerImage(torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64))}
    tight = {"rtol": 1e-7, "atol": 1e-7}
    noise = diffusion.encode(x, cond=cond, **tight)
    sampler = diffusion.sampler("ode", **tight)
    again = diffusion.generate(sampler, x.shape, x_T=noise, cond=cond, progress=False).images
    torch.testing.assert_close(again, x, rtol=1e-4, atol=1e-4)
    other = diffusion.encode(x, **tight)
    assert not torch.allclose(other, noise, atol=1e-2)


def test_the_noise_of_gaussian_data_is_known(generator) -> None:
    """Data of deviation d is scaled: x / d, but for what the prior leaves out."""
    d, vp = 0.6, sde.VP()

    def exact(x: Tensor, label: Tensor) -> Tensor:
        alpha, sigma = (level.view(-1, 1) for level in vp.levels(label / 999))
        return sigma / (alpha**2 * d**2 + sigma**2) * x

    x = d * torch.randn(5, 3, generator=generator, dtype=torch.float64)
    noise = Diffusion(exact, vp).encode(x, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(noise, x / d, rtol=1e-3, atol=0)


def test_the_way_is_a_great_circle() -> None:
    a, b = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    found = slerp(a, b, torch.tensor([0.0, 1 / 3, 0.5, 1.0]))
    angle = torch.tensor([0.0, 1 / 6, 1 / 4, 1 / 2], dtype=torch.float64) * math.pi
    wanted = 3 * torch.stack([angle.cos(), angle.sin()], 1).float()[:, None]
    torch.testing.assert_close(found, wanted)


def test_noise_between_noises_keeps_its_length(generator) -> None:
    a, b = torch.randn(2, 3, 16, 16, generator=generator)
    between = slerp(a, b, torch.linspace(0, 1, 5))
    assert torch.equal(between[[0, -1]], torch.stack([a, b]))
    lengths = between.flatten(1).norm(dim=1)
    assert (lengths / lengths[0] - 1).abs().max() < 0.1
    straight = torch.lerp(a, b, 0.5).norm() / lengths[0]
    assert straight < 0.8


def test_ends_of_one_direction_are_joined_by_a_line() -> None:
    a = torch.tensor([1.0, 2.0])
    torch.testing.assert_close(slerp(a, 2 * a, torch.tensor([0.5])), 1.5 * a[None])
    torch.testing.assert_close(slerp(0 * a, a, torch.tensor([0.5])), 0.5 * a[None])
    with pytest.raises(ValueError, match=r"second must have shape \(2,\), got \(1,\)"):
        slerp(a, a[:1], torch.tensor([0.5]))
