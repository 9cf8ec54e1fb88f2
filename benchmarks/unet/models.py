"""The networks: diffusers' classes with seeded random weights; no layer's output is constant 0."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

CIFAR10: dict[str, Any] = {  # google/ddpm-cifar10-32
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 2,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "attention_head_dim": None,
}
TINY: dict[str, Any] = CIFAR10 | {
    "sample_size": 16,
    "layers_per_block": 1,
    "block_out_channels": (32, 64),
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
SD15: dict[str, Any] = {  # the U-Net of stable-diffusion-v1-5
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SD_VAE: dict[str, Any] = {  # the VAE of Stable Diffusion 1 and 2
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}


class Decoder(nn.Module):
    """An autoencoder's decoder: latents to images."""

    def __init__(self, autoencoder: Any) -> None:
        super().__init__()
        autoencoder.encoder = nn.Identity()
        self.autoencoder = autoencoder

    def forward(self, latents: Tensor) -> Tensor:
        return self.autoencoder.decode(latents, return_dict=False)[0]


def unet(config: dict[str, Any]) -> Any:
    from diffusers import UNet2DModel

    return UNet2DModel(**config)


def _conditional_unet(config: dict[str, Any]) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**config)


def _decoder(config: dict[str, Any]) -> nn.Module:
    from diffusers import AutoencoderKL

    return Decoder(AutoencoderKL(**config))


@dataclass(frozen=True)
class Network:
    """A network to time.

    Attributes:
        title: name in the report.
        build: makes the network from ``config``.
        config: argument of ``build``.
        parameters: number of parameters in millions, to check the configuration.
        shape: of one image or latent.
        context: shape of one image's text embedding; None if the network takes none.
        takes_time: whether the network takes a timestep for each image.
        batches, dtypes: defaults of the command line.
        heavy: whether only one process at a time may hold the network.
        peers: default peers of the command line; None for all.
    """

    title: str
    build: Callable[[dict[str, Any]], Any]
    config: dict[str, Any]
    parameters: float
    shape: tuple[int, ...]
    context: tuple[int, ...] | None = None
    takes_time: bool = True
    batches: tuple[int, ...] = (1, 8)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    heavy: bool = False
    peers: tuple[str, ...] | None = None

    def make(self) -> nn.Module:
        """The network in float32 and eval mode, with the same weights in every process."""
        torch.manual_seed(0)
        module: nn.Module = self.build(self.config).eval().requires_grad_(False)
        for part in module.modules():
            if isinstance(part, (nn.GroupNorm, nn.LayerNorm)):
                part.weight.uniform_(0.5, 1.5)
                part.bias.normal_(0.0, 0.1)
        millions = sum(p.numel() for p in module.parameters()) / 1e6
        if abs(millions - self.parameters) > 0.01 * self.parameters:
            raise ValueError(
                f"{self.title} must have {self.parameters} M parameters, got {millions:.2f} M"
            )
        return module

    def sized(self, size: int | None) -> Network:
        """The same network for images of another height and width; None leaves them."""
        return self if size is None else replace(self, shape=(self.shape[0], size, size))

    def inputs(self, batch: int) -> tuple[Tensor, ...]:
        """Float32 images, and int64 times [N] and float32 context where the network takes them."""
        generator = torch.Generator().manual_seed(batch)
        given = [torch.randn(batch, *self.shape, generator=generator)]
        if self.takes_time:
            given.append(torch.linspace(20, 980, batch).long())
        if self.context is not None:
            given.append(torch.randn(batch, *self.context, generator=generator))
        return tuple(given)

    def call(self, module: Callable[..., Any], *inputs: Tensor) -> Tensor:
        """The output of ``module``, the network itself or its compiled form."""
        if self.build is _decoder:
            return module(*inputs)
        return module(*inputs, return_dict=False)[0]


class Plain(nn.Module):
    """A network as a function of tensors, for exporters."""

    def __init__(self, network: Network, module: nn.Module) -> None:
        super().__init__()
        self.network, self.module = network, module

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.network.call(self.module, *inputs)


NETWORKS = {
    "cifar10": Network("DDPM CIFAR-10 U-Net", unet, CIFAR10, 35.75, (3, 32, 32)),
    "tiny": Network("tiny U-Net", unet, TINY, 0.70, (3, 16, 16), batches=(1, 2)),
    "sd15": Network(
        "Stable Diffusion 1.5 U-Net",
        _conditional_unet,
        SD15,
        859.5,
        (4, 64, 64),
        context=(77, 768),
        batches=(2,),
        dtypes=("float32",),
        heavy=True,
        peers=(
            "fastdiff",
            "fastdiff bf16",
            "inductor channels_last",
            "inductor channels_last, frozen",
            "openvino",
            "eager channels_last",
        ),
    ),
    "vae": Network(
        "Stable Diffusion VAE decoder, 256x256",
        _decoder,
        SD_VAE,
        49.5,
        (4, 32, 32),
        takes_time=False,
        batches=(1,),
        dtypes=("float32",),
    ),
}
