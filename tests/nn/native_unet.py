"""The U-Net for signals and videos written with PyTorch's own conv1d and conv3d, as an oracle.

It takes the model's weights, computes on samples in their own dimensions, and knows the kinds of
blocks that ``OPTIONS`` names.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from nn.unet_cases import TINY, randomized

from fastdiff.nn import UNet2DModel

LEVELS = {**TINY, "in_channels": 2, "out_channels": 2, "sample_size": None}
SHAPES = {1: (3, 2, 16), 3: (3, 2, 3, 8, 8)}
TIMES = torch.tensor([7, 981, 3])


def unet(dimensions, **options):
    return randomized(UNet2DModel(**{**LEVELS, "dimensions": dimensions, **options})).eval()


def sample(dimensions, batch=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, *SHAPES[dimensions][1:], generator=generator)


class Native:
    """The model's function of a sample and timesteps, by its weights alone."""

    def __init__(self, model, weights):
        self.config, self.w = model.config, weights
        self.groups, self.eps = model.config.norm_num_groups, model.config.norm_eps

    def __call__(self, x, t):
        emb = self.time(t, x.dtype)
        x = self.conv("conv_in", x)
        skips = [x]
        levels = len(self.config.block_out_channels)
        for i in range(levels):
            for j in range(self.config.layers_per_block):
                x = self.layer(f"down_blocks.{i}", j, x, emb)
                skips.append(x)
            if i + 1 < levels:
                x = self.conv(f"down_blocks.{i}.downsamplers.0.conv", x, step=2)
                skips.append(x)
        x = self.layer("mid_block", 0, x, emb)
        x = self.resnet("mid_block.resnets.1", x, emb)
        for i in range(levels):
            for j in range(self.config.layers_per_block + 1):
                x = self.layer(f"up_blocks.{i}", j, torch.cat([x, skips.pop()], 1), emb)
            if i + 1 < levels:
                factor = (1, 2, 2)[-self.config.dimensions :] if x.ndim == 5 else 2
                x = F.interpolate(x, scale_factor=factor, mode="nearest")
                x = self.conv(f"up_blocks.{i}.upsamplers.0.conv", x)
        return self.conv("conv_out", F.silu(self.norm("conv_norm_out", x)))

    def parameters(self, name):
        return self.w[f"{name}.weight"], self.w[f"{name}.bias"]

    def conv(self, name, x, step=1):
        weight, bias = self.parameters(name)
        side = weight.shape[-1] // 2
        if x.ndim == 3:
            return F.conv1d(x, weight.squeeze(2), bias, step, side)
        return F.conv3d(x, weight.unsqueeze(2), bias, (1, step, step), (0, side, side))

    def norm(self, name, x):
        """Each frame has its own statistics."""
        weight, bias = self.parameters(name)
        if x.ndim == 3:
            return F.group_norm(x, self.groups, weight, bias, self.eps)
        frames = [F.group_norm(f, self.groups, weight, bias, self.eps) for f in x.unbind(2)]
        return torch.stack(frames, 2)

    def time(self, t, dtype):
        width = self.config.block_out_channels[0]
        features = self.waves(t, width).flip(1).unflatten(1, (2, -1)).flip(2).flatten(1)
        h = F.linear(features.to(dtype), *self.parameters("time_embedding.linear_1"))
        return F.silu(F.linear(F.silu(h), *self.parameters("time_embedding.linear_2")))

    @staticmethod
    def waves(t, width):
        """Sines, then cosines."""
        exponents = torch.arange(width // 2, dtype=torch.float32) / (width // 2)
        angles = t.float()[:, None] * torch.exp(-torch.log(torch.tensor(10_000.0)) * exponents)
        return torch.cat([angles.sin(), angles.cos()], 1)

    def layer(self, level, number, x, emb):
        x = self.resnet(f"{level}.resnets.{number}", x, emb)
        if f"{level}.attentions.{number}.to_q.weight" in self.w:
            x = self.attention(f"{level}.attentions.{number}", x)
            if x.ndim == 5:
                x = self.attention(f"{level}.frame_attentions.{number}", x, over_frames=True)
        return x

    def resnet(self, name, x, emb):
        h = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)))
        rows = F.linear(emb, *self.parameters(f"{name}.time_emb_proj"))
        h = h + rows.view(*rows.shape, *[1] * (x.ndim - 2))
        h = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h)))
        shortcut = f"{name}.conv_shortcut"
        return h + (self.conv(shortcut, x) if f"{shortcut}.weight" in self.w else x)

    def attention(self, name, x, *, over_frames=False):
        h = self.norm(f"{name}.group_norm", x)
        if over_frames:
            positions = self.waves(torch.arange(x.shape[2]), x.shape[1]).to(x.dtype)
            h = (h + positions.T[:, :, None, None]).permute(0, 3, 4, 2, 1)  # [N, H, W, F, C]
        elif x.ndim == 5:
            h = h.permute(0, 2, 3, 4, 1).flatten(2, 3)  # [N, F, H W, C]
        else:
            h = h.transpose(1, 2)  # [N, L, C]
        q, k, v = (
            F.linear(h, *self.parameters(f"{name}.to_{part}")).unflatten(-1, (-1, 8))
            for part in "qkv"
        )
        scores = torch.einsum("...ihd,...jhd->...hij", q, k) / 8**0.5
        h = torch.einsum("...hij,...jhd->...ihd", scores.softmax(-1), v).flatten(-2)
        h = F.linear(h, *self.parameters(f"{name}.to_out.0"))
        if over_frames:
            return x + h.permute(0, 4, 3, 1, 2)
        h = h.transpose(-1, -2)
        return x + (h.unflatten(-1, x.shape[3:]).transpose(1, 2) if x.ndim == 5 else h)
