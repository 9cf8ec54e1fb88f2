"""The networks by the names that their config.json has for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastdiff.nn import pretrained
from fastdiff.nn.image_network import ImageNetwork
from fastdiff.nn.karras_unet import KarrasUNet
from fastdiff.nn.unet import UNet2DModel

NETWORKS: dict[str, type[ImageNetwork]] = {
    kind.config_class.network: kind for kind in (UNet2DModel, KarrasUNet)
}


def from_pretrained(
    folder: str | Path, *, subfolder: str | None = None, **options: Any
) -> ImageNetwork:
    """Read a model folder of any of the networks, see ``ImageNetwork.from_pretrained``.

    Raises:
        ValueError: config.json describes another class.
    """
    path = pretrained.model_folder(Path(folder), subfolder)
    kind = pretrained.network_of(path)
    if kind not in NETWORKS:
        raise ValueError(
            f"{path / pretrained.CONFIG} describes a {kind}, wanted a {' or a '.join(NETWORKS)}"
        )
    return NETWORKS[kind].from_pretrained(folder, subfolder=subfolder, **options)
