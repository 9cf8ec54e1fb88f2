"""The emoji's images: which there are, which bitmap each has, and which are held out."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from tools import emoji_images

pytest.importorskip("fontTools")

FACE, HEART, WOMAN, ROCKET = 0x1F600, 0x2764, 0x1F469, 0x1F680
JOINER, EMOJI_STYLE = 0x200D, 0xFE0F
COLOURS = {
    "face": "yellow",
    "heart": "red",
    "woman": "green",
    "rocket": "gray",
    "astronaut": "blue",
}
GROUPS = """\
# emoji-test.txt
# group: Smileys & Emotion
# subgroup: heart
1F600         ; fully-qualified     # 😀 E1.0 grinning face
2764 FE0F     ; fully-qualified     # ❤️ E0.6 red heart
2764          ; unqualified         # ❤ E0.6 red heart
# group: People & Body
1F469         ; fully-qualified     # 👩 E0.6 woman
1F469 1F3FD   ; fully-qualified     # 👩🏽 E1.0 woman: medium skin tone
1F469 200D 1F680 ; fully-qualified  # 👩‍🚀 E4.0 woman astronaut
# group: Component
1F3FD         ; component           # 🏽 E1.0 medium skin tone
"""


def png(colour: str, width: int = 4, height: int = 2) -> bytes:
    """An image of one colour whose first pixel is transparent."""
    image = Image.new("RGBA", (width, height), colour)
    image.putpixel((0, 0), (0, 0, 0, 0))
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def make_font(path: Path, *, bitmaps: bool = True) -> Path:
    """A font with a bitmap of one colour for each of ``COLOURS``, and a ligature."""
    from fontTools.feaLib.builder import addOpenTypeFeaturesFromString
    from fontTools.fontBuilder import FontBuilder
    from fontTools.misc.sstruct import getformat
    from fontTools.ttLib import newTable
    from fontTools.ttLib.tables import E_B_L_C_
    from fontTools.ttLib.tables._g_l_y_f import Glyph
    from fontTools.ttLib.tables.BitmapGlyphMetrics import SmallGlyphMetrics
    from fontTools.ttLib.tables.C_B_D_T_ import cbdt_bitmap_format_17

    names = [".notdef", "joiner", *COLOURS]
    builder = FontBuilder(1024, isTTF=True)
    builder.setupGlyphOrder(names)
    characters = {FACE: "face", HEART: "heart", WOMAN: "woman", ROCKET: "rocket", JOINER: "joiner"}
    builder.setupCharacterMap(characters)
    builder.setupGlyf({name: Glyph() for name in names})
    builder.setupHorizontalMetrics({name: (1024, 0) for name in names})
    builder.setupHorizontalHeader()
    builder.setupPost()
    addOpenTypeFeaturesFromString(
        builder.font, "feature ccmp { sub woman joiner rocket by astronaut; } ccmp;"
    )
    if bitmaps:
        data, places = newTable("CBDT"), newTable("CBLC")
        data.version, places.version = 3.0, 3.0
        data.strikeData = [{}]
        for name, colour in COLOURS.items():
            glyph = cbdt_bitmap_format_17(b"", builder.font)
            glyph.metrics = SmallGlyphMetrics()
            for field, value in (("height", 2), ("width", 4), ("Advance", 4)):
                setattr(glyph.metrics, field, value)
            glyph.metrics.BearingX = glyph.metrics.BearingY = 0
            glyph.imageData = png(colour)
            data.strikeData[0][name] = glyph
        table = E_B_L_C_.eblc_index_sub_table_1(b"", builder.font)
        table.names, table.indexFormat, table.imageFormat = list(COLOURS), 1, 17
        strike = E_B_L_C_.Strike()
        strike.bitmapSizeTable = size = E_B_L_C_.BitmapSizeTable()
        strike.indexSubTables = [table]
        for direction in ("hori", "vert"):
            line = E_B_L_C_.SbitLineMetrics()
            for field in getformat(E_B_L_C_.sbitLineMetricsFormat)[1]:
                setattr(line, field, 0)
            setattr(size, direction, line)
        size.colorRef, size.ppemX, size.ppemY, size.bitDepth, size.flags = 0, 4, 4, 32, 1
        size.startGlyphIndex, size.endGlyphIndex = 2, len(names) - 1
        places.strikes = [strike]
        builder.font["CBDT"], builder.font["CBLC"] = data, places
    builder.save(path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    """A font and a list of groups."""
    folder = tmp_path_factory.mktemp("font")
    groups = folder / "emoji-test.txt"
    groups.write_text(GROUPS, encoding="utf-8")
    return make_font(folder / "font.ttf"), groups


def test_groups_have_their_emoji_without_skin_tones() -> None:
    assert emoji_images.read_groups(GROUPS) == {
        "smileys-emotion": [(FACE,), (HEART, EMOJI_STYLE)],
        "people-body": [(WOMAN,), (WOMAN, JOINER, ROCKET)],
    }


def test_a_sequence_has_the_bitmap_of_its_ligature(files) -> None:
    bitmaps = emoji_images.Bitmaps(files[0])
    assert bitmaps[(WOMAN,)] == png("green")
    assert bitmaps[(HEART, EMOJI_STYLE)] == png("red")
    assert bitmaps[(WOMAN, JOINER, ROCKET)] == png("blue")
    for missing in [(WOMAN, ROCKET), (0x41,), (JOINER,)]:
        with pytest.raises(KeyError):
            bitmaps[missing]


def test_images_are_centred_on_white(files, tmp_path) -> None:
    font, groups = files
    out = tmp_path / "data" / "emoji"
    arguments = ["--out", str(out), "--font", str(font), "--groups", str(groups)]
    assert emoji_images.main(arguments) == 0
    assert {path.relative_to(out).as_posix() for path in out.rglob("*.png")} == {
        "smileys-emotion/1f600.png", "smileys-emotion/2764_fe0f.png",
        "people-body/1f469.png", "people-body/1f469_200d_1f680.png",
    }  # fmt: skip
    image = Image.open(out / "smileys-emotion" / "1f600.png")
    white, yellow = (255, 255, 255), (255, 255, 0)
    assert (image.mode, image.size) == ("RGB", (4, 4))
    rows = [[image.getpixel((x, y)) for x in range(4)] for y in range(4)]
    assert rows == [[white] * 4, [white, *[yellow] * 3], [yellow] * 4, [white] * 4]


def test_every_fifth_of_a_group_is_held_out(files, tmp_path) -> None:
    """Whether or not the font has those before it; what it lacks is counted."""
    emoji = [(FACE,), (0x41,), (HEART,), (WOMAN,), (ROCKET,), (FACE, FACE), (WOMAN, JOINER, ROCKET)]
    bitmaps = emoji_images.Bitmaps(files[0])
    lines = emoji_images.write(bitmaps, {"some": emoji}, tmp_path / "emoji")
    held_out = tmp_path / "emoji-held-out"
    assert [path.name for path in held_out.rglob("*.png")] == ["1f680.png"]
    assert len(list((tmp_path / "emoji").rglob("*.png"))) == 4
    assert " ".join(lines[0].split()) == "some 4 images, 1 held out; the font lacks 2"


def test_errors_say_what_is_wanted(files, tmp_path, capsys) -> None:
    font, groups = files
    empty = tmp_path / "empty.txt"
    empty.write_text("nothing here")
    plain = make_font(tmp_path / "plain.ttf", bitmaps=False)
    there = tmp_path / "there"
    there.mkdir()
    new = tmp_path / "new"
    for out, this_font, these_groups, text in [
        (there, font, groups, "exists already"),
        (new, tmp_path / "no.ttf", groups, "fonts-noto-color-emoji"),
        (new, font, tmp_path / "no.txt", "unicode-data"),
        (new, plain, groups, "CBDT"),
        (new, groups, groups, "as a font"),
        (new, font, empty, "names no emoji"),
    ]:
        arguments = ["--out", out, "--font", this_font, "--groups", these_groups]
        assert emoji_images.main([str(one) for one in arguments]) == 1
        assert text in capsys.readouterr().err
        assert not new.exists()


@pytest.mark.skipif(
    not (emoji_images.FONT.is_file() and emoji_images.GROUPS.is_file()),
    reason="needs Debian's packages fonts-noto-color-emoji and unicode-data",
)
def test_the_real_font_has_nearly_all_emoji() -> None:
    """A flag of two letters, one of tags, a family: whatever kind of sequence there is."""
    groups = emoji_images.read_groups(emoji_images.GROUPS.read_text(encoding="utf-8"))
    bitmaps = emoji_images.Bitmaps(emoji_images.FONT)
    assert len(groups) == 9
    found = {}
    for name, emoji in groups.items():
        for one in emoji:
            try:
                found[one] = bitmaps[one]
            except KeyError:  # newer than the font
                continue
        assert sum(one in found for one in emoji) > 0.9 * len(emoji), name
    assert len(found) > 1800
    images = set(found.values())
    # Of one picture are a few flags of islands and of the countries that they belong to.
    assert len(images) > 0.98 * len(found)
