"""Pipelines of diffusers without a prompt, small and with random weights."""

from __future__ import annotations

from typing import Any

import diffusers
import small_pipelines as small

UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "attention_head_dim": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}


def unet(**changes: Any) -> diffusers.UNet2DModel:
    """A U-Net as DDPM's, changed where ``changes`` say so."""
    return small.randomised(diffusers.UNet2DModel(**{**UNET, **changes}), 1)


def ddpm() -> Any:
    """A pipeline with noise in every step."""
    return small.finished(diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler()))


def ddim() -> Any:
    """A pipeline without noise in its steps."""
    return small.finished(diffusers.DDIMPipeline(unet(), diffusers.DDIMScheduler()))


def score_sde_ve() -> Any:
    """A pipeline of predictor and corrector, whose U-Net is told sigma by Fourier features."""
    return small.finished(
        diffusers.ScoreSdeVePipeline(
            unet(time_embedding_type="fourier"), diffusers.ScoreSdeVeScheduler(sigma_max=5.0)
        )
    )
