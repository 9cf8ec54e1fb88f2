"""Configurations that the U-Net's tests share, and models and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

TINY: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}

# DDPM's CIFAR-10 checkpoint (google/ddpm-cifar10-32), an eighth as wide
CIFAR: dict[str, Any] = {
    "sample_size": 32,
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": (16, 32, 32, 32),
    "center_input_sample": False,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 8,
    "time_embedding_type": "positional",
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}

CASES: dict[str, dict[str, Any]] = {
    "tiny": TINY,
    "cifar": CIFAR,
    "default-types": {
        "sample_size": 16,
        "block_out_channels": (8, 16, 24, 32),
        "norm_num_groups": 8,
    },
    "one-level": {
        **TINY,
        "block_out_channels": (16,),
        "down_block_types": ("AttnDownBlock2D",),
        "up_block_types": ("AttnUpBlock2D",),
    },
    "grey-to-six-channels": {**TINY, "in_channels": 1, "out_channels": 6},
    "classes": {**TINY, "num_class_embeds": 10},
    "class-timestep": {**TINY, "class_embed_type": "timestep"},
    "class-identity": {**TINY, "class_embed_type": "identity"},
    "scale-shift": {**TINY, "resnet_time_scale_shift": "scale_shift"},
    "scale-shift-attention-norm": {
        **TINY,
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 2,
    },
    "attention-resnet-resampling": {
        **TINY,
        "down_block_types": ("AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
    },
    "resnet-resampling": {
        **TINY,
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("ResnetDownsampleBlock2D",) * 2 + ("AttnDownBlock2D",),
        "up_block_types": ("AttnUpBlock2D",) + ("ResnetUpsampleBlock2D",) * 2,
        "resnet_time_scale_shift": "scale_shift",
    },
    "resampling-option-without-attention": {
        **TINY,
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
    },
    "fourier": {**TINY, "time_embedding_type": "fourier"},
    "learned": {**TINY, "time_embedding_type": "learned", "num_train_timesteps": 1000},
    "embedding-dim": {**TINY, "time_embedding_dim": 24, "freq_shift": 1, "flip_sin_to_cos": False},
    "heads-of-4": {**TINY, "attention_head_dim": 4},
    "one-head": {**TINY, "attention_head_dim": None},
    "head-leaves-channels-over": {**TINY, "attention_head_dim": 6},
    "no-middle-attention": {**TINY, "add_attention": False},
    "no-middle": {**TINY, "mid_block_type": None},
    "middle-scale": {**TINY, "mid_block_scale_factor": 1.4142},
    "centered": {**TINY, "center_input_sample": True},
    "dropout-swish": {**TINY, "dropout": 0.3, "act_fn": "swish"},
    "old-block-names": {
        **TINY,
        "down_block_types": ("UNetResDownBlock2D", "UNetResAttnDownBlock2D"),
        "up_block_types": ("UNetResAttnUpBlock2D", "UNetResUpBlock2D"),
    },
    "not-square": {**TINY, "sample_size": (8, 12), "norm_eps": 1e-3},
}


def randomized(model: Any, seed: int = 0) -> Any:
    """The model with weights that no initialisation gives: biases and gains count."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                fan_in = parameter[0].numel()
                parameter.copy_(noise / fan_in**0.5)
            elif "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.2 * noise)
            elif name == "time_proj.weight":
                parameter.copy_(16 * noise)
            else:
                parameter.copy_(0.2 * noise)
    return model


def inputs(options: dict[str, Any], batch: int = 2, seed: int = 1) -> tuple[Any, ...]:
    """A sample, timesteps and class labels (or None) for a model of these options."""
    generator = torch.Generator().manual_seed(seed)
    size = options["sample_size"]
    height, width = size if isinstance(size, tuple) else (size, size)
    sample = torch.randn(batch, options.get("in_channels", 3), height, width, generator=generator)
    timesteps = torch.tensor([7, 981, 3, 500, 0, 999])[:batch]
    if options.get("time_embedding_type") == "fourier":
        timesteps = torch.tensor([0.3, 12.5, 0.01, 50.0])[:batch]
    return sample, timesteps, labels(options, batch, generator)


def labels(options: dict[str, Any], batch: int, generator: torch.Generator) -> Tensor | None:
    kind = options.get("class_embed_type")
    if kind == "identity":
        width = options.get("time_embedding_dim") or 4 * options["block_out_channels"][0]
        return torch.randn(batch, width, generator=generator)
    if kind == "timestep" or options.get("num_class_embeds"):
        return torch.arange(batch) * 4 + 1
    return None


def parameters_by_name(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}
