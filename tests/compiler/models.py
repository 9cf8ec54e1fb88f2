"""The models that the compiler's tests share: small U-Nets and decoders of several families, with
weights that no initialisation gives, and inputs for them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from guided_unet import GuidedUNet
from lucid_unet import LucidUNet
from plain_decoder import PlainDecoder
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import fastdiff.nn

DOWN_UP = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
TINY: dict[str, Any] = {
    **DOWN_UP,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 8,
    "downsample_padding": 0,
}
# all that DDPM's CIFAR-10 model has (two layers, four levels, one head), an eighth as wide
MEDIUM: dict[str, Any] = {
    "block_out_channels": (16, 32, 32, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "norm_num_groups": 8,
    "norm_eps": 1e-6,
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
}
CROSS: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
}
# SDXL's conditioning and linear projections, with its two transformer layers at the lower level
XL: dict[str, Any] = {
    **CROSS,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 10 + 6 * 8,
    "attention_head_dim": (2, 4),
}
AUTOENCODER: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "latent_channels": 4,
}


class Sample(nn.Module):
    """A model of diffusers, called for its tensor alone."""

    def __init__(self, model: nn.Module, method: str = "forward") -> None:
        super().__init__()
        self.model, self.method = model, method

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return getattr(self.model, self.method)(*args, **kwargs, return_dict=False)[0]


@dataclass(frozen=True)
class Case:
    """A model and what it is called with.

    Attributes:
        build: makes it, weights as they come.
        channels: of its first argument.
        time: whether its second is a timestep for each image.
        odd: height and width that have an odd level, or are odd where the model allows it.
        even: another size, for a larger batch.
        extra: makes the arguments behind those from (batch, dtype, generator).
    """

    build: Callable[[], nn.Module]
    channels: int = 3
    time: bool = True
    odd: tuple[int, int] = (10, 14)
    even: tuple[int, int] = (16, 16)
    extra: Callable[[int, torch.dtype, torch.Generator], dict[str, Any]] = lambda *_: {}


def text(batch: int, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    return {"encoder_hidden_states": torch.randn(batch, 5, 12, generator=generator).to(dtype)}


def text_and_sizes(batch: int, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    added = {
        "text_embeds": torch.randn(batch, 10, generator=generator).to(dtype),
        "time_ids": torch.tensor([[64.0, 48, 0, 0, 64, 64]]).to(dtype).expand(batch, 6),
    }
    return {**text(batch, dtype, generator), "added_cond_kwargs": added}


CASES: dict[str, Case] = {
    "guided": Case(GuidedUNet),
    "improved": Case(lambda: GuidedUNet(scale_shift=False, resblock_updown=False)),
    "lucid": Case(LucidUNet),
    "plain-decoder": Case(PlainDecoder, 4, time=False, odd=(5, 3), even=(8, 6)),
    "diffusers": Case(lambda: Sample(diffusers.UNet2DModel(**TINY))),
    "diffusers-cifar": Case(
        lambda: Sample(diffusers.UNet2DModel(**MEDIUM)), odd=(24, 8), even=(32, 32)
    ),
    "conditional": Case(
        lambda: Sample(diffusers.UNet2DConditionModel(**CROSS)), 4, odd=(9, 13), extra=text
    ),
    "conditional-xl": Case(
        lambda: Sample(diffusers.UNet2DConditionModel(**XL)), 4, odd=(9, 13), extra=text_and_sizes
    ),
    "autoencoder": Case(
        lambda: Sample(diffusers.AutoencoderKL(**AUTOENCODER), "decode"),
        4,
        time=False,
        odd=(7, 5),
        even=(8, 12),
    ),
    "fastdiff": Case(lambda: fastdiff.nn.UNet2DModel(**TINY)),
}


def make(name: str, seed: int = 0) -> Any:
    """The model of a case in eval mode, its weights always the same."""
    return randomized(CASES[name].build(), seed).eval()


def inputs(
    name: str,
    batch: int = 2,
    size: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
    layout: torch.memory_format = torch.contiguous_format,
    seed: int = 1,
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Positional and keyword arguments for the model of a case."""
    case, generator = CASES[name], torch.Generator().manual_seed(seed)
    x = torch.randn(batch, case.channels, *(size or case.even), generator=generator)
    args: tuple[Tensor, ...] = (x.to(dtype).contiguous(memory_format=layout),)
    if case.time:
        t = torch.tensor([7, 981, 3, 500, 0, 999])[:batch]
        args += (t.to(dtype) if name == "lucid" else t,)
    return args, case.extra(batch, dtype, generator)


def randomized(model: Any, seed: int = 0) -> Any:
    """The model with every weight drawn: biases and gains count, and no layer is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            gain = name.endswith(".g") or (parameter.ndim == 1 and name.endswith("weight"))
            if gain:
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.ndim > 1 and "mem_kv" not in name:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.2 * noise)
    return model


def cast(model: Any, dtype: torch.dtype) -> Any:
    """A copy of the model in ``dtype``, as its own family casts it."""
    model = copy.deepcopy(model)
    return model.convert_torso(dtype) if hasattr(model, "convert_torso") else model.to(dtype)


def in_float64(
    model: nn.Module, args: Any, kwargs: Any, moved_by: torch.Generator | None = None
) -> Tensor:
    """What the model would return if all its arithmetic were float64: the oracle.

    With a generator each number of the weights and arguments is moved up or down by a unit of
    float32 first, which shows what such a rounding does to the result.
    """
    model = wide(model)
    with torch.no_grad(), KeepFloat64():
        for parameter in model.parameters() if moved_by else ():
            parameter.copy_(doubled(parameter, moved_by))
        return model(*doubled(args, moved_by), **doubled(kwargs, moved_by))


def wide(model: nn.Module) -> nn.Module:
    """A copy of the model in float64."""
    model = copy.deepcopy(model).double()
    if hasattr(model, "convert_torso"):
        model.convert_torso(torch.float64)
    return model


def doubled(value: Any, moved_by: torch.Generator | None = None) -> Any:
    """Arguments with their floating-point tensors in float64, channels-first.

    Channels-last, PyTorch subtracts E[x]^2 from E[x^2], which costs digits even in float64.
    """
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            return value
        signs = torch.randint(2, value.shape, generator=moved_by) * 2 - 1 if moved_by else 0
        return value.double().contiguous() * (1 + torch.finfo(torch.float32).eps * signs)
    if isinstance(value, dict):
        return {key: doubled(item, moved_by) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(doubled(item, moved_by) for item in value)
    return value


class KeepFloat64(TorchFunctionMode):
    """``x.float()`` of a float64 tensor is x: a norm that computes in float32 is exact as well."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is Tensor.float and args[0].dtype is torch.float64:
            return args[0]
        return func(*args, **(kwargs or {}))
