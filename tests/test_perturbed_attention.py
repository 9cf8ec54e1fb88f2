"""Weaker models by perturbed attention, which share the weights of a U-Net."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastdiff
from fastdiff import guidance, samplers, schedules
from fastdiff.guidance.perturbed import MIDDLE, _blur
from fastdiff.nn.image_unet import make_unet

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    model = make_unet(8, 1, widths=(8, 16), layers_per_block=1, attention=(1,)).eval()
    for part in model.modules():  # the last layers of blocks begin with 0
        for parameter in part.parameters(recurse=False):
            nn.init.normal_(parameter, std=0.3)
    return model


def test_each_pixel_attends_to_itself(unet, generator) -> None:
    weaker = guidance.perturbed_attention(unet)
    x = torch.randn(2, 16, 4, 4, generator=generator)
    perturbed = weaker.mid_block.attentions[0]
    own = unet.mid_block.attentions[0]
    h = own.group_norm(x).flatten(2).transpose(1, 2)
    wanted = x + own.to_out[0](own.to_v(h)).transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(perturbed(x), wanted)
    assert not torch.allclose(own(x), wanted, atol=1e-2)


@pytest.mark.parametrize("sigma", [0.7, math.inf])
def test_queries_are_blurred(unet, sigma, generator) -> None:
    weaker = guidance.smoothed_energy(unet, sigma)
    x = torch.randn(2, 16, 4, 4, generator=generator)
    own = unet.mid_block.attentions[0]
    h = own.group_norm(x).flatten(2).transpose(1, 2)
    heads = (own.heads, -1)
    q, k, v = (
        part(h).unflatten(2, heads).transpose(1, 2) for part in (own.to_q, own.to_k, own.to_v)
    )
    weights = torch.zeros(16, 16)
    for i in range(16):
        for j in range(16):
            away = (i // 4 - j // 4) ** 2 + (i % 4 - j % 4) ** 2
            weights[i, j] = math.exp(-away / (2 * sigma**2))
    weights /= weights.sum(1, keepdim=True)
    h = F.scaled_dot_product_attention(weights @ q, k, v).transpose(1, 2).flatten(2)
    wanted = x + own.to_out[0](h).transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(weaker.mid_block.attentions[0](x), wanted)


def test_a_narrow_blur_changes_nothing(unet, generator) -> None:
    x, t = torch.randn(1, 1, 8, 8, generator=generator), torch.tensor([5])
    with torch.no_grad():
        torch.testing.assert_close(guidance.smoothed_energy(unet, 1e-3)(x, t), unet(x, t))
    torch.testing.assert_close(_blur(3, 1e-3, x), torch.eye(3))


def test_weights_are_shared_and_the_model_is_not_changed(unet) -> None:
    before = [type(part) for part in unet.modules()]
    weaker = guidance.perturbed_attention(unet)
    assert {p.data_ptr() for p in weaker.parameters()} == {p.data_ptr() for p in unet.parameters()}
    assert [type(part) for part in unet.modules()] == before
    assert not weaker.training


def test_any_layers_may_be_perturbed(unet, generator) -> None:
    x, t = torch.randn(1, 1, 8, 8, generator=generator), torch.tensor([5])
    with torch.no_grad():
        middle, all_of_them, none = (
            guidance.perturbed_attention(unet, MIDDLE)(x, t),
            guidance.perturbed_attention(unet, ("down", "mid", "up"))(x, t),
            unet(x, t),
        )
    assert not torch.allclose(middle, all_of_them, atol=1e-4)
    assert not torch.allclose(middle, none, atol=1e-4)


def test_samples_are_guided_by_it(unet) -> None:
    schedule = schedules.cosine(100)
    sampler = samplers.make("ddim", schedule, 3)
    guided = guidance.autoguided(unet, guidance.perturbed_attention(unet), 3.0)
    plain, found = (
        fastdiff.sample(model, sampler, (2, 1, 8, 8), seed=0, progress=False)
        for model in (unet, guided)
    )
    assert bool(found.isfinite().all())
    assert not torch.allclose(plain, found, atol=1e-2)


def test_refusals(unet) -> None:
    with pytest.raises(TypeError, match="UNet2DModel, got Linear"):
        guidance.perturbed_attention(nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"with 'top'; the model's are down_blocks\.1.*mid_block"):
        guidance.perturbed_attention(unet, ["top"])
    with pytest.raises(ValueError, match="sigma must be positive, got 0"):
        guidance.smoothed_energy(unet, 0)
