"""Write the images that the emoji model is trained on: Noto Color Emoji's bitmaps, by group.

    python -m tools.emoji_images --out data/emoji

A folder for each of Unicode's groups of emoji (faces, animals, flags, ...) holds an image for each
emoji of the group, named by its code points in hexadecimal. Every fifth emoji of a group, in
Unicode's order, goes into a second folder, data/emoji-held-out, that training never sees. An image
is the font's own bitmap in the middle of a white square.

Left out are the emoji with a skin tone: each is a copy of one without, and together they would be
about half of all images. The font is licensed under the SIL Open Font License 1.1. On Debian and
Ubuntu it comes with the package fonts-noto-color-emoji, and the list of groups with unicode-data.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from fastdiff.common.errors import InputError

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
GROUPS = Path("/usr/share/unicode/emoji/emoji-test.txt")
HELD_OUT = 5  # every fifth emoji of a group is held out
SKIN_TONES = range(0x1F3FB, 0x1F3FF + 1)
EMOJI_STYLE = 0xFE0F  # the selector that asks for a picture; the font's ligatures do without it
FULLY_QUALIFIED = re.compile(r"([0-9A-F]+(?: [0-9A-F]+)*)\s*;\s*fully-qualified\b")

Emoji = tuple[int, ...]  # code points


class Bitmaps:
    """The colour bitmaps of a font, by emoji.

    An emoji of several code points is one glyph, into which the font's ligatures join the glyphs
    of the code points.

    Args:
        path: an OpenType font with the tables CBDT and CBLC, in one size.

    Raises:
        InputError: fontTools is not installed, the file is no such font.
    """

    def __init__(self, path: Path) -> None:
        try:
            from fontTools.ttLib import TTFont, TTLibError
        except ModuleNotFoundError:
            raise InputError("fonts are read by fontTools: pip install fonttools") from None
        try:
            font = TTFont(path)
        except (TTLibError, OSError) as error:
            raise InputError(f"cannot read {path} as a font: {error}") from None
        with font:
            if "CBDT" not in font:
                raise InputError(
                    f"{path} has no table of colour bitmaps (CBDT); "
                    "the font of Debian's package fonts-noto-color-emoji has one"
                )
            sizes = font["CBDT"].strikeData
            if len(sizes) != 1:
                raise InputError(f"wanted a font with bitmaps in one size, {path} has {len(sizes)}")
            self._images = {name: glyph.imageData for name, glyph in sizes[0].items()}
            self._glyphs: dict[int, str] = font.getBestCmap()
            self._ligatures = dict(_ligatures(font)) if "GSUB" in font else {}

    def __getitem__(self, emoji: Emoji) -> bytes:
        """The PNG file of an emoji.

        Raises:
            KeyError: the font has no bitmap for it.
        """
        parts = tuple(self._glyphs[code] for code in emoji if code != EMOJI_STYLE)
        return self._images[parts[0] if len(parts) == 1 else self._ligatures[parts]]


def _ligatures(font: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    """Names of glyphs in a row, and the name of the glyph that takes their place."""
    for lookup in font["GSUB"].table.LookupList.Lookup:
        for table in lookup.SubTable:
            table = getattr(table, "ExtSubTable", table)
            for first, ligatures in getattr(table, "ligatures", {}).items():
                for ligature in ligatures:
                    yield (first, *ligature.Component), ligature.LigGlyph


def read_groups(text: str) -> dict[str, list[Emoji]]:
    """The emoji of each group, in their order, without those that have a skin tone.

    Args:
        text: the content of Unicode's emoji-test.txt (UTS 51, "Emoji Ordering and Data Files").

    Returns:
        Code points by the group's name in small letters and hyphens: ``smileys-emotion``.
    """
    groups: dict[str, list[Emoji]] = {}
    name = ""
    for line in text.splitlines():
        if line.startswith("# group:"):
            name = re.sub("[^a-z0-9]+", "-", line.partition(":")[2].lower()).strip("-")
        elif found := FULLY_QUALIFIED.match(line):
            emoji = tuple(int(code, 16) for code in found[1].split())
            if not any(code in SKIN_TONES for code in emoji):
                groups.setdefault(name, []).append(emoji)
    return groups


def in_white_square(png: bytes) -> Image.Image:
    """An image in the middle of a white square as high or wide as it, in RGB."""
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    side = max(image.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square.convert("RGB")


def write(bitmaps: Bitmaps, groups: dict[str, list[Emoji]], out: Path) -> list[str]:
    """Write every image below ``out`` or the folder of the held-out images beside it.

    Returns:
        Lines that say how many images each group has, and how many the font does not have.
    """
    lines = []
    for group, emoji in groups.items():
        counts, missing = [0, 0], 0
        for index, one in enumerate(emoji):
            try:
                image = in_white_square(bitmaps[one])
            except KeyError:
                missing += 1
                continue
            held_out = index % HELD_OUT == HELD_OUT - 1
            counts[held_out] += 1
            folder = (held_out_folder(out) if held_out else out) / group
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / ("_".join(f"{code:x}" for code in one) + ".png"))
        line = "{:<16} {:>4} images, {:>3} held out".format(group, *counts)
        lines.append(line + (f"; the font lacks {missing}" if missing else ""))
    return lines


def held_out_folder(out: Path) -> Path:
    """The folder of the images that are held out from those in ``out``."""
    return out.with_name(f"{out.name}-held-out")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the images, print how many there are, and return the exit code."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--out", type=Path, required=True, help="the folder to create")
    options.add_argument("--font", type=Path, default=FONT, help=f"NotoColorEmoji.ttf ({FONT})")
    options.add_argument(
        "--groups", type=Path, default=GROUPS, help=f"Unicode's emoji-test.txt ({GROUPS})"
    )
    args = options.parse_args(argv)
    try:
        for folder in (args.out, held_out_folder(args.out)):
            if folder.exists():
                raise InputError(f"{folder} exists already; delete it to write the images anew")
        _check_file(args.font, "--font", "fonts-noto-color-emoji")
        _check_file(args.groups, "--groups", "unicode-data")
        groups = read_groups(args.groups.read_text(encoding="utf-8"))
        if not groups:
            raise InputError(f"{args.groups} names no emoji; wanted Unicode's emoji-test.txt")
        lines = write(Bitmaps(args.font), groups, args.out)
    except (InputError, OSError, UnicodeDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(lines))
    return 0


def _check_file(path: Path, option: str, package: str) -> None:
    if not path.is_file():
        raise InputError(
            f"no {path}; install Debian's package {package}, or say where the file is: {option}"
        )


if __name__ == "__main__":
    sys.exit(main())
