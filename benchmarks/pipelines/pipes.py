"""Pipelines of Stable Diffusion's shape with seeded random weights, and their calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

STEPS = 20  # of the scheduler, each with two evaluations of the U-Net as one batch (guidance)
GUIDANCE = 7.5
TOKENS = 77
UNET: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "attention_head_dim": 8,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
VAE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
SCHEDULER: dict[str, Any] = {  # Stable Diffusion's noise schedule
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


@dataclass(frozen=True)
class Shape:
    """The sizes of a pipeline.

    Attributes:
        title: in tables.
        unet, vae: channels of each level.
        layers: residual blocks in a level.
        context: channels of the text's embedding.
        latents: height and width of the latents; the image is 8 times as large.
        groups: of the norms.
    """

    title: str
    unet: tuple[int, ...]
    vae: tuple[int, ...]
    layers: int
    context: int
    latents: int
    groups: int = 32

    def make(self) -> Any:
        """The pipeline in float32, the same in every process.

        It has no text encoder, tokenizer or safety checker: a call gets the text's embeddings.
        """
        from diffusers import (
            AutoencoderKL,
            DPMSolverMultistepScheduler,
            StableDiffusionPipeline,
            UNet2DConditionModel,
        )

        torch.manual_seed(0)
        sizes = {"layers_per_block": self.layers, "norm_num_groups": self.groups}
        unet = UNet2DConditionModel(
            sample_size=self.latents, block_out_channels=self.unet,
            cross_attention_dim=self.context, **sizes, **UNET,
        )  # fmt: skip
        vae = AutoencoderKL(
            sample_size=8 * self.latents, block_out_channels=self.vae, **sizes, **VAE
        )
        for part in (*unet.modules(), *vae.modules()):
            if isinstance(part, (nn.GroupNorm, nn.LayerNorm)):
                nn.init.uniform_(part.weight, 0.5, 1.5)
                nn.init.normal_(part.bias, 0.0, 0.1)
        pipe = StableDiffusionPipeline(
            vae=vae.eval(), unet=unet.eval(), scheduler=DPMSolverMultistepScheduler(**SCHEDULER),
            text_encoder=None, tokenizer=None, safety_checker=None, feature_extractor=None,
            requires_safety_checker=False,
        )  # fmt: skip
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def inputs(self, batch: int) -> dict[str, Tensor]:
        """Float32 arguments of a call for ``batch`` images: embeddings of texts, and latents."""
        generator = torch.Generator().manual_seed(batch)
        text, nothing = torch.randn(2, batch, TOKENS, self.context, generator=generator)
        noise = torch.randn(batch, 4, self.latents, self.latents, generator=generator)
        return {"prompt_embeds": text, "negative_prompt_embeds": nothing, "latents": noise}


def call(pipe: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The images [N, 3, H, W] in [0, 1] of a whole call."""
    images: Tensor = pipe(
        **inputs, num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="pt"
    ).images
    return images


PIPES = {
    "small": Shape(
        "small Stable Diffusion, 256x256", (128, 256, 512, 512), (64, 128, 256, 256), 1, 512, 32
    ),
    "tiny": Shape("tiny Stable Diffusion, 64x64", (32, 32, 64, 64), (16, 16, 32, 32), 1, 32, 8, 8),
}
