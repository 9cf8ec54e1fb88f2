"""Layouts that are recognised and refused, each with the reasons: what UNet2DModel has not."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NoReturn

from fastdiff.checkpoints.layouts.layout import Layout, State
from fastdiff.common.errors import CheckpointError

# Of a layout: an ending of a tensor's name, and what a model with such a tensor does. The reasons
# of all endings that are found are given; the ending "" is always found.
_LUCIDRAINS = (
    ("", "its first convolution is 7x7"),
    (".norm.g", "it normalises by the root mean square over channels, not by GroupNorm"),
    (".block1.norm.weight", "its convolutions are weight-standardised, in its older versions"),
    ("mem_kv", "its attention has learned keys and values besides those of the image"),
    (".to_out.1.g", "at some levels its attention is linear in the number of pixels"),
    ("time_mlp.3.weight", "its time embedding has a GELU"),
    (".res_conv.weight", "its levels change their channels where they change the resolution"),
)
_EDM = (
    ("", "its residual blocks and preconditioning are those of EDM (arXiv:2206.00364)"),
    ("map_augment.weight", "it is conditioned on the augmentation of its training images"),
    (".resample_filter", "it resamples inside its convolutions"),
)
_EDM2 = (("", "its layers preserve magnitudes and have no biases (EDM2, arXiv:2312.02696)"),)
_TRANSFORMER = (("", "it is a transformer of patches, not a U-Net"),)


def _refuse(
    reasons: tuple[tuple[str, str], ...], state: State, options: Mapping[str, Any]
) -> NoReturn:
    texts = [text for ending, text in reasons if any(name.endswith(ending) for name in state)]
    raise CheckpointError(
        f"cannot be a UNet2DModel: {'; '.join(texts)}. Load it with the program that wrote it: "
        "fastdiff's samplers take any network, and fastdiff's compiler any module"
    )


def _layout(name: str, marks: tuple[str, ...], reasons: tuple[tuple[str, str], ...]) -> Layout:
    return Layout(name, marks, partial(_refuse, reasons), {})


UNREADABLE = (
    _layout(
        "lucidrains' denoising-diffusion-pytorch",
        ("init_conv.weight", "time_mlp.1.weight", "final_conv.weight"),
        _LUCIDRAINS,
    ),
    _layout("EDM", ("map_layer0.weight", "map_layer1.weight"), _EDM),
    _layout("EDM2", ("emb_fourier.freqs", "emb_noise.weight"), _EDM2),
    _layout("DiT", ("x_embedder.proj.weight", "t_embedder.mlp.0.weight"), _TRANSFORMER),
)
