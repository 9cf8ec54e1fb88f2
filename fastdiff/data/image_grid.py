"""Show images: convert tensors in [-1, 1] to pixels, lay them out in labelled grids, save them."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, features
from torch import Tensor

from fastdiff.common.errors import InputError

TILE = 64  # pixels; smaller images are enlarged to at least this height


def to_uint8(images: Tensor) -> np.ndarray:
    """Images [N, C, H, W] in [-1, 1] as pixels, uint8 [N, H, W, C]; values outside are clipped.

    Raises:
        ValueError: another number of dimensions, channels other than 1 or 3, or values that are not
            finite.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must have shape [N, 1 or 3, H, W], got {tuple(images.shape)}")
    if not bool(torch.isfinite(images).all()):
        raise ValueError("images must be finite, got NaN or infinity")
    pixels = (images.detach().cpu().float().clamp(-1, 1) + 1) * 127.5
    return pixels.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def from_uint8(pixels: Tensor) -> Tensor:
    """Pixels, uint8 of any shape, as float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def grid(
    images: Tensor,
    columns: int,
    *,
    labels: Sequence[str] | None = None,
    scale: int | None = None,
    gap: int = 4,
) -> Image.Image:
    """Lay images out in rows of ``columns``, enlarged by whole pixels.

    Args:
        images: [N, C, H, W] in [-1, 1], C 1 or 3, N at least 1.
        columns: number of images in a row.
        labels: for each row a text, printed at its left.
        scale: factor of enlargement; None for the least that makes images TILE pixels high.
        gap: pixels between images and around them.

    Raises:
        ValueError: there are no images, columns are below 1, or there are not as many labels as
            rows.
    """
    if len(images) == 0 or columns < 1:
        raise ValueError(f"a grid needs images and columns, got {len(images)} and {columns}")
    pixels = to_uint8(images)
    count, height, width, channels = pixels.shape
    rows = -(-count // columns)
    if labels is not None and len(labels) != rows:
        raise ValueError(f"labels must name each of {rows} rows, got {len(labels)}")
    scale = scale or max(1, -(-TILE // height))
    font = ImageFont.load_default(18) if features.check("freetype2") else ImageFont.load_default()
    left = gap
    if labels:
        left += int(max(font.getlength(label) for label in labels)) + 2 * gap
    step_x, step_y = width * scale + gap, height * scale + gap
    canvas = Image.new("RGB", (left + columns * step_x, gap + rows * step_y), (40, 40, 40))
    for i, tile in enumerate(pixels):
        picture = Image.fromarray(tile[:, :, 0] if channels == 1 else tile)
        picture = picture.resize((width * scale, height * scale), Image.Resampling.NEAREST)
        row, column = divmod(i, columns)
        canvas.paste(picture, (left + column * step_x, gap + row * step_y))
    if labels:
        draw = ImageDraw.Draw(canvas)
        for row, label in enumerate(labels):
            middle = gap + row * step_y + height * scale // 2
            top, bottom = font.getbbox(label)[1::2]
            position = (2 * gap, middle - (top + bottom) // 2)
            draw.text(position, label, font=font, fill=(255, 255, 255))
    return canvas


def check_image_path(path: Path) -> None:
    """Make sure, before any long work, that an image can be written at ``path``.

    The folder of ``path`` is created if it is missing.

    Raises:
        InputError: the image format is unknown, this Pillow cannot write it or it has no colours,
            ``path`` is a folder, or its folder cannot be written to.
    """
    kind = _format_of(path)
    try:
        Image.new("RGB", (8, 8)).save(io.BytesIO(), kind)
    except Exception as error:  # Pillow's encoders have no common exception
        raise InputError(f"cannot write {path} as {kind} ({error}); end its name in .png") from None
    check_writable(path)


def _format_of(path: Path) -> str:
    """Pillow's name of the format by the suffix of ``path``; InputError for an unknown suffix."""
    Image.init()
    kind = Image.registered_extensions().get(path.suffix.lower(), "")
    if kind not in Image.SAVE:
        raise InputError(f"cannot tell the image format of {str(path)!r}; end its name in .png")
    return kind


def check_writable(path: Path) -> None:
    """InputError unless a file can be written at ``path``; a missing folder of it is created."""
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None


def save(image: Image.Image, path: Path) -> None:
    """Write an image to a file; after an error ``path`` is as it was before.

    Raises:
        InputError: the image format is unknown or cannot hold the image (for example, for its
            size), or the file cannot be written.
    """
    kind = _format_of(path)
    check_writable(path)
    partial = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        image.save(partial, kind)
        os.replace(partial, path)
    except Exception as error:  # Pillow's encoders have no common exception
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot write {path}: {reason}") from error
    finally:
        partial.unlink(missing_ok=True)
