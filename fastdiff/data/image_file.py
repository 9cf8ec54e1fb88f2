"""Read an image file, of any mode, depth and metadata, as pixels of 8 bits."""

from __future__ import annotations

import io
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

from fastdiff.common.errors import DataError

_TO_UPRIGHT = {  # the turn that makes an image upright, by EXIF's tag Orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Of colours of 16 bits Pillow keeps only the high byte. Told the opposite byte order (L little, B
# big, N the processor's own), its decoders give the low byte.
_LOW_BYTE = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}
_DEEP_COLOURS = ("RGB;16", "RGBX;16", "RGBA;16", "CMYK;16")

CROPS = ("center", "random")
FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class Reading:
    """How image files become pixels.

    Attributes:
        size: height and width S of the images to train on.
        grayscale: one channel instead of three.
        value_range: the values that become 0 and 255 in a file with more than 8 bits a value. The
            range is divided into 256 bins of equal width; values outside are clipped. None takes
            the range of an unsigned integer of the file's width, so that the highest 8 bits are
            kept.
        crop: "center" keeps the largest centred square; "random" keeps the whole image, its
            shorter side resized to S, from which training cuts a square at a random place.
        resize: the filter, of ``FILTERS``. Each averages over the area that becomes a pixel
            when an image is made smaller; "box" is the plain mean of that area.

    Raises:
        DataError: a value that is not one of these.
    """

    size: int
    grayscale: bool = False
    value_range: tuple[float, float] | None = None
    crop: str = "center"
    resize: str = "bicubic"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise DataError(f"the size of the images must be at least 1, got {self.size}")
        for name, known in (("crop", CROPS), ("resize", tuple(FILTERS))):
            if getattr(self, name) not in known:
                raise DataError(
                    f"unknown {name} {getattr(self, name)!r}, wanted one of {', '.join(known)}"
                )
        if self.value_range is None:
            return
        low, high = self.value_range
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise DataError(
                f"value_range must be two finite numbers, the lower first, got {low:g} and {high:g}"
            )

    @property
    def channels(self) -> int:
        """C, of the pixels."""
        return 1 if self.grayscale else 3


@dataclass(frozen=True)
class Depth:
    """The value range of a file with more than 8 bits a value.

    Attributes:
        kind: format and mode as Pillow names them, such as "PNG I;16".
        white: the largest value that the file's type can hold.
        largest: the largest value in the file, opacity excluded.
    """

    kind: str
    white: int
    largest: float


def read(content: Path | bytes, reading: Reading, name: str) -> tuple[np.ndarray, Depth | None]:
    """Read the first frame of an image file, upright, and bring it to size.

    The orientation comes from the EXIF data; EXIF data that cannot be parsed is ignored.
    Transparency becomes white.

    Args:
        content: an image file of any format that Pillow reads, or its bytes.
        reading: the size, the colours and how they are reached.
        name: what the text of errors calls the file.

    Returns:
        Pixels uint8 [S, S, C], with ``crop="random"`` [H, W, C] with the shorter side S; and the
        depth of a file with more than 8 bits a value, else None.

    Raises:
        DataError: the file cannot be read, or its range is unknown; the text is ``name`` and the
            reason, in one line.
    """
    if isinstance(content, Path) and not content.is_file():
        what = "a link to nothing" if content.is_symlink() else "not a file"
        raise DataError(f"{name}: {what}")
    try:
        with _opened(content) as opened:
            image, depth = _with_8_bits(content, opened, reading.value_range)
            turn = _TO_UPRIGHT.get(_orientation(opened))
            image = image if turn is None else image.transpose(turn)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return pixels(image, reading), depth
    except Exception as error:  # damaged input can make a decoder raise anything
        raise DataError(f"{name}: {reason(error)}") from error


def pixels(image: Image.Image, reading: Reading) -> np.ndarray:
    """The pixels of an image of 8 bits a value, in the size and colours of ``reading``.

    Returns:
        uint8 [S, S, C], with ``crop="random"`` [H, W, C] with the shorter side S.
    """
    image = image.convert("L" if reading.grayscale else "RGB")
    size, method = reading.size, FILTERS[reading.resize]
    if reading.crop == "center":
        image = ImageOps.fit(image, (size, size), method=method)
    else:
        shorter = min(image.size)
        width, height = (max(size, round(side * size / shorter)) for side in image.size)
        if image.size != (width, height):
            image = image.resize((width, height), method)
    return np.asarray(image).reshape(image.height, image.width, -1)


def _opened(content: Path | bytes) -> Image.Image:
    return Image.open(io.BytesIO(content) if isinstance(content, bytes) else content)


def reason(error: Exception) -> str:
    """An exception's text in one line, with the name of its type if the text alone says little."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if text and isinstance(error, (OSError, ValueError, SyntaxError, Image.DecompressionBombError)):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _orientation(image: Image.Image) -> Any:
    """EXIF's tag Orientation; 1 (upright) if it is missing or cannot be parsed."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF data can make the parser raise anything
        return 1


def _with_8_bits(
    content: Path | bytes, opened: Image.Image, value_range: tuple[float, float] | None
) -> tuple[Image.Image, Depth | None]:
    """The image in a mode of 8 bits a value, and the depth of a file that has more, else None."""
    raw = _raw_mode(opened)
    values = _deep_values(content, opened, raw)  # [H, W] or [H, W, C]
    if values is None:
        opened.load()  # so that errors of the pixels are not taken for ignored errors of EXIF data
        return opened, None
    seen = values[..., :3] if opened.mode == "RGBA" else values
    low, high = float(seen.min()), float(seen.max())
    white = 4095 if raw == "I;12" else 65535
    if value_range is None:
        advice = "give the values of black and white by value_range (--value-range)"
        if opened.mode == "F":
            raise ValueError(
                f"it holds floating-point values ({low:g} to {high:g}), whose range is unknown: "
                + advice
            )
        if low < 0 or high > white:
            raise ValueError(f"its values ({low:g} to {high:g}) lie outside 0 to {white}: {advice}")
    elif not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("it holds values that are not finite")
    bins = _in_bins(values, value_range or (0, white))
    transparent = opened.info.get("transparency")  # one value, or one a channel
    if transparent is not None:
        bins[values == transparent if values.ndim == 2 else (seen == transparent).all(2)] = 255
    mode = "L" if values.ndim == 2 else opened.mode
    image = Image.frombytes(mode, opened.size, bins.tobytes())
    return image, Depth(f"{opened.format} {opened.mode}", white, high)


def _in_bins(values: np.ndarray, value_range: tuple[float, float]) -> np.ndarray:
    """For each value the number 0..255 of its bin, of 256 bins of equal width, uint8.

    An integer k counts as the interval [k, k + 1), so the range 0..65535 gives the high byte.
    """
    low, high = value_range
    span = high - low + (values.dtype.kind in "iu")
    bins: np.ndarray = np.subtract(values, low, dtype=np.float64)
    bins *= 256 / span
    return bins.clip(0, 255, out=bins).astype(np.uint8)


def _raw_mode(opened: Image.Image) -> str:
    """Pillow's name of how a file stores its pixels (raw mode); "" if Pillow does not tell."""
    for *_, arguments in getattr(opened, "tile", [])[:1]:
        raw = arguments[0] if isinstance(arguments, (tuple, list)) and arguments else arguments
        return raw if isinstance(raw, str) else ""
    return ""


def _deep_values(content: Path | bytes, opened: Image.Image, raw: str) -> np.ndarray | None:
    """The values of a file with more than 8 bits a value, [H, W] or [H, W, C]; None for others."""
    if opened.mode.startswith(("I", "F")):
        return np.asarray(opened)
    if raw[:-1] in _DEEP_COLOURS and raw[-1] in _LOW_BYTE:
        high, low = np.asarray(opened), _decoded(content, raw[:-1] + _LOW_BYTE[raw[-1]])
    elif raw == "LA;16B":  # read as RGBA, its four bytes are high and low of L, high and low of A
        quads = _decoded(content, "RGBA")
        high, low = quads[..., [0, 0, 0, 2]], quads[..., [1, 1, 1, 3]]
    else:
        return None
    return high.astype(np.uint16) << 8 | low


def _decoded(content: Path | bytes, raw: str) -> np.ndarray:
    """A file's pixels decoded as if its raw mode were ``raw``, uint8 [H, W, C]."""
    with _opened(content) as opened:
        tiles: list[Any] = getattr(opened, "tile", [])
        for i, tile in enumerate(tiles):
            arguments = raw if isinstance(tile[3], str) else (raw, *tile[3][1:])
            named = hasattr(tile, "_replace")  # a plain tuple in Pillow 10
            tiles[i] = tile._replace(args=arguments) if named else (*tile[:3], arguments)
        return np.asarray(opened)
