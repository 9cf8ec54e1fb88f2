"""Pipelines of diffusers with random weights, small enough that a whole call takes a moment.

The components are built from configurations: nothing is downloaded. Latents are half as high and as
wide as images, where the usual autoencoder's are an eighth.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

TOKENS = 16  # in a prompt, the first and the last among them
WIDTH = 16  # of the text encoders' states
CHANNELS = (16, 32)
LETTERS = "abcdefghijklmnopqrstuvwxyz"
BLOCKS: dict[str, Any] = {"block_out_channels": CHANNELS, "norm_num_groups": 8}
UNET: dict[str, Any] = {
    **BLOCKS,
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 4,
}
# SDXL's: both text encoders' states side by side, sizes of the image, linear projections.
UNET_XL: dict[str, Any] = {
    **UNET,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 2 * WIDTH,
    "attention_head_dim": (2, 4),
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": WIDTH + 6 * 8,
}
AUTOENCODER: dict[str, Any] = {
    **BLOCKS,
    "latent_channels": 4,
    "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "sample_size": 16,
}


def randomised(module: Any, seed: int = 0) -> Any:
    """The module in eval mode, with weights that no initialisation gives: none of them is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            values = torch.randn(weight.shape, generator=generator)
            if weight.ndim > 1:
                weight.copy_(values / weight[0].numel() ** 0.5)
            else:
                weight.copy_(0.1 * values + name.endswith("weight"))
    return module.eval()


def unet(**changes: Any) -> diffusers.UNet2DConditionModel:
    """A U-Net as Stable Diffusion's, changed where ``changes`` say so."""
    return randomised(diffusers.UNet2DConditionModel(**{**UNET, **changes}), 1)


def unet_xl(**changes: Any) -> diffusers.UNet2DConditionModel:
    """A U-Net as Stable Diffusion XL's, changed where ``changes`` say so."""
    return randomised(diffusers.UNet2DConditionModel(**{**UNET_XL, **changes}), 1)


def autoencoder() -> diffusers.AutoencoderKL:
    """The autoencoder, whose latents are half as high and as wide as images."""
    return randomised(diffusers.AutoencoderKL(**AUTOENCODER), 2)


def controlnet(**changes: Any) -> diffusers.ControlNetModel:
    """A ControlNet of ``unet``, for images twice as high and as wide as latents."""
    names = ("sample_size", "out_channels", "up_block_types")
    config = {name: value for name, value in UNET.items() if name not in names}
    config["conditioning_embedding_out_channels"] = (8, 16)
    return randomised(diffusers.ControlNetModel(**{**config, **changes}), 3)


def t2i_adapter() -> diffusers.T2IAdapter:
    """A T2I-Adapter of ``unet``."""
    return randomised(
        diffusers.T2IAdapter(
            in_channels=3, channels=list(CHANNELS), num_res_blocks=1, downscale_factor=2
        ),
        4,
    )


def tokenizer() -> CLIPTokenizer:
    """A tokenizer that makes a token of each letter."""
    words = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{x}</w>" for x in LETTERS)]
    vocabulary = {word: i for i, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TOKENS)


def text_encoder(projected: bool = False) -> Any:
    """A text encoder; ``projected``: SDXL's second, which has a projection."""
    config = CLIPTextConfig(
        vocab_size=2 + 2 * len(LETTERS), hidden_size=WIDTH, intermediate_size=2 * WIDTH,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=TOKENS,
        projection_dim=WIDTH, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    return randomised(kind(config), 5)


def scheduler() -> diffusers.DDIMScheduler:
    """Stable Diffusion's own."""
    return diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip


def finished(pipe: Any) -> Any:
    """The pipeline without a progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stable_diffusion(kind: Any = diffusers.StableDiffusionPipeline, **components: Any) -> Any:
    """A pipeline of Stable Diffusion's components, text to image by default."""
    given = {
        "vae": autoencoder(), "text_encoder": text_encoder(), "tokenizer": tokenizer(),
        "unet": unet(), "scheduler": scheduler(), "safety_checker": None,
        "feature_extractor": None, **components,
    }  # fmt: skip
    return finished(kind(**given, requires_safety_checker=False))


def stable_diffusion_xl(kind: Any = diffusers.StableDiffusionXLPipeline, **components: Any) -> Any:
    """A pipeline of Stable Diffusion XL's components, text to image by default."""
    given = {
        "vae": autoencoder(), "text_encoder": text_encoder(),
        "text_encoder_2": text_encoder(projected=True), "tokenizer": tokenizer(),
        "tokenizer_2": tokenizer(), "unet": unet_xl(), "scheduler": scheduler(), **components,
    }  # fmt: skip
    return finished(kind(**given, add_watermarker=False))


def arguments(steps: int = 2, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """Arguments of a call of a pipeline, which gives an array [N, H, W, 3] in [0, 1]."""
    return {
        "prompt": "a cat", "num_inference_steps": steps, "output_type": "np",
        "generator": torch.Generator().manual_seed(seed), **changes,
    }  # fmt: skip


def save_lora(
    folder: Path, model: nn.Module, seed: int, *, rank: int = 2, convolutions: bool = False
) -> Path:
    """Save random LoRA weights for a U-Net's attention, and return the file.

    Args:
        folder: where the file is made.
        model: the U-Net, without adapters.
        seed: of the weights.
        rank: of each product.
        convolutions: whether convolutions of the residual blocks have LoRA too.
    """
    generator = torch.Generator().manual_seed(seed)
    targets = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.2", *(["conv1"] * convolutions))
    layers: dict[str, Tensor] = {}
    for name, part in model.named_modules():
        if not name.endswith(targets):
            continue
        out, into, *kernel = part.weight.shape
        a = torch.randn(rank, into, *kernel, generator=generator)
        b = torch.randn(out, rank, *[1] * len(kernel), generator=generator)
        layers[f"{name}.lora_A.weight"] = a / a[0].numel() ** 0.5
        layers[f"{name}.lora_B.weight"] = b / rank**0.5
    file = f"lora_{seed}.safetensors"
    diffusers.StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=layers, weight_name=file
    )
    return folder / file


def ip_adapter(model: Any, seed: int, images: int = 4) -> dict[str, dict[str, Tensor]]:
    """Random weights of an IP-Adapter for a U-Net, as ``load_ip_adapter`` takes them.

    Args:
        model: the U-Net.
        seed: of the weights.
        images: how many tokens stand for an image.
    """
    generator = torch.Generator().manual_seed(seed)

    def weight(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator) / sizes[-1] ** 0.5

    depth = model.config.cross_attention_dim
    projection = {
        "proj.weight": weight(images * depth, WIDTH), "proj.bias": weight(images * depth),
        "norm.weight": 1 + weight(depth), "norm.bias": weight(depth),
    }  # fmt: skip
    # The keys count by two, as if each cross-attention's processor came behind a self-attention's.
    attention: dict[str, Tensor] = {}
    crossing = [name for name in model.attn_processors if name.endswith("attn2.processor")]
    for i, name in enumerate(crossing):
        keys = model.get_submodule(name.removesuffix(".processor")).to_k.weight
        for part in ("k", "v"):
            attention[f"{2 * i + 1}.to_{part}_ip.weight"] = weight(*keys.shape)
    return {"image_proj": projection, "ip_adapter": attention}
