"""The features of the FID: the Inception network that Heusel et al. used, by torch-fidelity."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fastdiff.common.errors import InputError, require

SIZE = 299  # height and width of the network's input
FEATURES = 2048
RESIZES = ("tf", "clean")


class Inception:
    """Features of the last pooling layer of the FID's Inception-v3, 2048 for each image.

    The network is torch-fidelity's, which gives TensorFlow's numbers for the weights of Heusel et
    al. 2017 (arXiv:1706.08500). Grey images are read as colours of three equal channels.

    Args:
        path: the weights, a file of tensors by name as torch-fidelity and pytorch-fid publish it
            (``weights-`` or ``pt_inception-2015-12-05-6726825d.pth``). Nothing but tensors is read
            from it.
        resize: how images are brought to 299x299. ``tf`` is the bilinear resizing of the network's
            own TensorFlow graph, which most published figures were computed with; it leaves pixels
            out where an image shrinks. ``clean`` is the antialiased bicubic resizing of Parmar et
            al. 2022 (arXiv:2104.11222), as in clean-fid.
        device: where the network runs.

    Attributes:
        description: of the features, with the beginning of the file's SHA-256.

    Raises:
        InputError: torch-fidelity or the torchvision that it imports is missing, or the file is
            missing, damaged, or holds other weights.
    """

    def __init__(
        self, path: str | Path, *, resize: str = "tf", device: torch.device | str = "cpu"
    ) -> None:
        if resize not in RESIZES:
            raise InputError(f"resize must be one of {', '.join(RESIZES)}, got {resize!r}")
        network_file = _fidelity("feature_extractor_inceptionv3")
        self._enlarge = _fidelity("interpolate_compat_tensorflow")
        content = _content(Path(path))
        network = _network(network_file, content, Path(path))
        # Its own forward() takes whole numbers alone, which clean-fid's resizing does not give. Its
        # layers stand in the order in which they are called, the classifier last.
        layers = [layer for name, layer in network.named_children() if name != "fc"]
        self._layers = nn.Sequential(*layers).to(device)
        self._resize, self._device = resize, torch.device(device)
        digest = hashlib.sha256(content).hexdigest()[:12]
        self.description = f"Inception-v3 features (weights {digest}, {resize} resizing)"

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> np.ndarray:
        """Features float32 [B, 2048] of pixels uint8 [B, 1 or 3, H, W]."""
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
            raise ValueError(
                f"pixels must be uint8 [B, 1 or 3, H, W], got {pixels.dtype} {tuple(pixels.shape)}"
            )
        colours = pixels.expand(-1, 3, -1, -1)
        if self._resize == "clean":
            resized = clean_resize(colours).to(self._device)
        else:
            resized = self._enlarge.interpolate_bilinear_2d_like_tensorflow1x(
                colours.to(self._device).float(), size=(SIZE, SIZE), align_corners=False
            )
        features: Tensor = self._layers((resized - 128) / 128)
        return features.flatten(1).float().cpu().numpy()


def clean_resize(pixels: Tensor, size: int = SIZE) -> Tensor:
    """Resize as clean-fid does (Parmar et al. 2022, arXiv:2104.11222): Pillow's bicubic, unrounded.

    Pillow widens its filter where an image shrinks, so that no pixel is left out.

    Args:
        pixels: uint8 [B, C, H, W].
        size: height and width of the result.

    Returns:
        float32 [B, C, size, size] in 0..255.
    """
    count, channels = pixels.shape[:2]
    planes = pixels.float().flatten(0, 1).numpy()
    resized = np.empty((len(planes), size, size), dtype=np.float32)
    for place, plane in enumerate(planes):
        image = Image.fromarray(plane).resize((size, size), Image.Resampling.BICUBIC)
        resized[place] = np.asarray(image)
    return torch.from_numpy(resized).clamp(0, 255).view(count, channels, size, size)


def _fidelity(name: str) -> ModuleType:
    """A module of torch-fidelity, which imports torchvision whatever is asked of it."""
    try:
        return require(f"torch_fidelity.{name}", "fid")
    except ModuleNotFoundError as error:
        raise InputError(
            f"torch-fidelity cannot be imported without {error.name}: pip install 'fastdiff[fid]'"
        ) from None


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None


def _network(module: ModuleType, content: bytes, path: Path) -> nn.Module:
    """The network with the weights of a file."""
    try:
        weights: Any = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can make the reader raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path} is no file of weights by torch.save: {reason}") from None
    if not isinstance(weights, dict) or not all(isinstance(w, Tensor) for w in weights.values()):
        raise InputError(f"{path} must hold tensors by name, got {type(weights).__name__}")
    # The constructor reads a file in which it would run any code. So it is given one made here, of
    # the tensors alone.
    safe = io.BytesIO()
    torch.save(dict(weights), safe)
    safe.seek(0)
    try:
        network: nn.Module = module.FeatureExtractorInceptionV3(
            "inception", ["2048"], feature_extractor_weights_path=safe
        )
    except RuntimeError as error:  # load_state_dict names what is missing
        text = " ".join(str(error).split())
        raise InputError(f"{path} has not the weights of the FID's network: {text[:500]}") from None
    return network
