"""Sizes of images, batches and prompts that change: right, and with few graphs."""

from __future__ import annotations

import diffusers
import torch
from side_by_side import SideBySide, distance, graphs
from small_pipelines import BLOCKS, randomised, stable_diffusion

SIZES = [(16, 16), (16, 24), (24, 16), (24, 24), (40, 16), (32, 40), (48, 24), (16, 48), (56, 40)]


def test_twenty_sizes_of_a_pipeline():
    pipe = stable_diffusion()
    beside = SideBySide(pipe)
    first = graphs()
    for count, sizes in enumerate((SIZES, SIZES[::-1]), 1):
        for height, width in sizes:
            beside(height=height, width=width, steps=1, num_images_per_prompt=count)
    made = graphs()
    assert made - first <= 12
    for height, width in ((48, 56), (64, 16), (32, 32)):
        beside(height=height, width=width, steps=1, num_images_per_prompt=3)
    assert graphs() - made <= 2


@torch.no_grad()
def test_twenty_sizes_of_an_unconditional_model():
    """Odd ones among them, for which upsampling is told the size."""
    model = randomised(
        diffusers.UNet2DModel(
            **BLOCKS, sample_size=8, layers_per_block=1, attention_head_dim=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )
    )  # fmt: skip
    model.compile(backend="fastdiff", fullgraph=True)
    first = graphs()
    for i in range(20):
        x = torch.randn(1 + i % 3, 3, 8 + 2 * (i % 5), 16 - 2 * (i % 7))
        t = torch.full((x.shape[0],), 10 * i)
        with torch.compiler.set_stance("force_eager"):
            expected = model(x, t).sample
        assert distance(model(x, t).sample, expected) < 1e-4
    assert graphs() - first <= 12
