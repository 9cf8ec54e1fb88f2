"""The parts against torch's own modules and against the formulas, in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastdiff.nn import Attention, GroupNormSiLU, ResnetBlock2D, SinusoidalProjection


def test_group_norm_silu_is_group_norm_and_silu():
    fused, plain = GroupNormSiLU(4, 8, 1e-3).double(), nn.GroupNorm(4, 8, 1e-3).double()
    for parameter in fused.parameters():
        nn.init.normal_(parameter)
    plain.load_state_dict(fused.state_dict())
    x = torch.randn(2, 8, 3, 5, dtype=torch.float64)
    a, scale, shift = torch.randn(3, 2, 8, dtype=torch.float64).unbind()
    torch.testing.assert_close(fused(x), F.silu(plain(x)))
    torch.testing.assert_close(fused(x, add=a), F.silu(plain(x + a[:, :, None, None])))
    modulated = plain(x) * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    torch.testing.assert_close(fused(x, scale=scale, shift=shift), F.silu(modulated))
    fused.silu = False
    torch.testing.assert_close(fused(x), plain(x))


@pytest.mark.parametrize("shift", [0, 1, 0.5])
@pytest.mark.parametrize("channels", [2 * 8, 2 * 8 + 1], ids=["even", "odd"])
def test_sinusoids(channels, shift):
    t = torch.tensor([0, 1, 500])
    sin_first = SinusoidalProjection(channels, flip_sin_to_cos=False, freq_shift=shift)(t)
    cos_first = SinusoidalProjection(channels, flip_sin_to_cos=True, freq_shift=shift)(t)
    assert sin_first.shape == (3, channels)
    assert sin_first.dtype == torch.float32
    for row, time in enumerate(t.tolist()):
        for i in range(8):
            angle = time * 10_000 ** (-i / (8 - shift))
            expected = torch.tensor([math.sin(angle), math.cos(angle)])
            # One float32 rounding of an angle up to 500 is 3e-5.
            torch.testing.assert_close(sin_first[row, [i, 8 + i]], expected, atol=1e-4, rtol=0)
            torch.testing.assert_close(cos_first[row, [8 + i, i]], expected, atol=1e-4, rtol=0)
    assert not sin_first[:, 16:].any()


def test_attention_is_softmax_of_scaled_products():
    attention = Attention(12, head_dim=4, groups=3, eps=1e-5).double()
    x = torch.randn(2, 12, 3, 2, dtype=torch.float64)
    h = attention.group_norm(x).flatten(2).transpose(1, 2)
    q, k, v = attention.to_q(h), attention.to_k(h), attention.to_v(h)
    heads = []
    for i in range(0, 12, 4):
        scores = q[..., i : i + 4] @ k[..., i : i + 4].transpose(1, 2) / 4**0.5
        heads.append(scores.softmax(-1) @ v[..., i : i + 4])
    out = attention.to_out[0](torch.cat(heads, dim=2))
    torch.testing.assert_close(attention(x), x + out.transpose(1, 2).reshape(x.shape))


def test_residual_block_of_zero_weights_is_the_scaled_shortcut():
    x, emb = torch.randn(2, 8, 4, 4), torch.randn(1, 8)
    options = {"temb_channels": 16, "groups": 4, "eps": 1e-5}
    for name, expected in (
        ("plain", x),
        ("up", x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)),
        ("down", x.reshape(2, 8, 2, 2, 2, 2).mean(dim=(3, 5))),
    ):
        directions = {name: True} if name != "plain" else {}
        block = ResnetBlock2D(8, 8, **options, **directions, output_scale_factor=2.0)
        nn.init.zeros_(block.conv2.weight)
        nn.init.zeros_(block.conv2.bias)
        torch.testing.assert_close(block(x, emb), expected / 2)
