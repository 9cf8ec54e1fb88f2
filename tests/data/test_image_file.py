"""Image files of every depth and mode, with strange metadata, damaged, or no files at all."""

from __future__ import annotations

import io
import logging
import os
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff import data
from fastdiff.common.errors import DataError
from fastdiff.data import image_file, image_reader
from fastdiff.data.image_file import Reading

# EXIF's orientation 6, "its top is at the right", beside a ResolutionUnit that does not fit into
# the 16 bits that the tag has.
ODD_EXIF = (
    b"Exif\0\0MM\0*\0\0\0\x08\0\x02"
    + struct.pack(">HHII", 0x0112, 3, 1, 6 << 16)
    + struct.pack(">HHII", 0x0128, 4, 1, 100_000)
    + bytes(4)
)


def read(path, size=8, **options):
    return data.folder(path, size, progress=False, **options)


def png(values, *chunks):
    """A PNG file of 16 bits a value; Pillow writes such files in grey only.

    Args:
        values: uint16 [H, W, C]; C is 1 (grey), 2 (with opacity), 3 (colour) or 4.
        chunks: (name, content) to put before the pixels.
    """
    height, width, channels = values.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)

    def chunk(name, content):
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    body = b"".join(
        chunk(name, content)
        for name, content in (
            (b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b""),
        )
    )  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + body


def tiff(values, compression=1):
    """A TIFF file of 16 bits a value, big-endian, of grey or colour, uint16 [H, W] or [H, W, 3]."""
    pixels = values.astype(">u2").tobytes()
    if compression == 8:
        pixels = zlib.compress(pixels)
    height, width = values.shape[:2]
    channels = values[0, 0].size
    bits_at = 8 + 2 + 10 * 12 + 4
    entries = [
        (256, 4, 1, width), (257, 4, 1, height),
        (258, 3, channels, bits_at if channels > 1 else 16 << 16),
        (259, 3, 1, compression << 16), (262, 3, 1, (2 if channels > 1 else 1) << 16),
        (273, 4, 1, bits_at + 6), (277, 3, 1, channels << 16), (278, 4, 1, height),
        (279, 4, 1, len(pixels)), (284, 3, 1, 1 << 16),
    ]  # fmt: skip
    directory = struct.pack(">H", 10) + b"".join(struct.pack(">HHII", *e) for e in entries)
    bits = struct.pack(">HHH", 16, 16, 16)
    return b"MM\0*\0\0\0\x08" + directory + bytes(4) + bits + pixels


def save(path, values, mode=None):
    """Write an array, or a colour in ``mode``, as Pillow does."""
    image = Image.fromarray(values) if mode is None else Image.new(mode, (8, 8), values)
    image.save(path)


def raising(error):
    """A function that raises ``error``, whatever its arguments."""

    def raise_it(*args, **options):
        raise error

    return raise_it


def grey(value, dtype=np.uint16):
    return np.full((8, 8), value, dtype)


# More than 8 bits a value.

DEEP = {
    "PNG, grey": ("a.png", lambda v: png(v[..., :1])),
    "PNG, grey with opacity": ("a.png", lambda v: png(v[..., [0, 3]])),
    "PNG, colour": ("a.png", lambda v: png(v[..., :3])),
    "PNG, colour with opacity": ("a.png", png),
    "TIFF, grey": ("a.tif", lambda v: tiff(v[..., 0])),
    "TIFF, colour": ("a.tif", lambda v: tiff(v[..., :3])),
    "TIFF, colour, compressed": ("a.tif", lambda v: tiff(v[..., :3], compression=8)),
    "PGM": ("a.pgm", lambda v: b"P5 8 8 65535\n" + v[..., 0].astype(">u2").tobytes()),
}


def deep(factor):
    """Values that differ in all of 16 bits, times a factor, opaque: uint16 [8, 8, 4]."""
    values = (np.random.default_rng(0).random((8, 8, 4)) * factor).astype(np.uint16)
    values[..., 3] = 65535
    return values


@pytest.mark.parametrize("name", DEEP)
@pytest.mark.parametrize("bits", [12, 16])
def test_a_range_is_cut_into_256_equal_bins(name, bits, tmp_path):
    """Every bit of a file counts, also where Pillow by itself keeps the high byte only."""
    file, encode = DEEP[name]
    values = deep(2**bits)
    (tmp_path / file).write_bytes(encode(values))
    found = read(tmp_path, value_range=(0, 2**bits - 1)).images[0]
    wanted = values[..., :3] if "colour" in name else values[..., [0, 0, 0]]
    assert np.array_equal(found.permute(1, 2, 0), wanted >> (bits - 8))


@pytest.mark.parametrize("name", DEEP)
def test_twelve_bits_in_sixteen_are_told(name, tmp_path):
    file, encode = DEEP[name]
    values = deep(4096).clip(0, 3999)
    values[0, 0] = 4000
    values[..., 3] = 65535
    (tmp_path / file).write_bytes(encode(values))
    message = rf"is 4000, in .*{file}; .* brightest pixel is 15 of 255\. .*\(0, 4095\)"
    with pytest.warns(UserWarning, match=message):
        found = read(tmp_path)
    assert found.images.max() == 15


def test_a_whole_folder_is_judged_not_one_dark_image(tmp_path):
    """A folder of 16 bits may hold dark images; it has a bright one as well."""
    save(tmp_path / "dark.png", grey(300))
    save(tmp_path / "darker.png", grey(3))
    with pytest.warns(UserWarning, match=r"is 300, in .*dark\.png.*\(0, 511\)"):
        read(tmp_path)
    save(tmp_path / "bright.png", grey(40_000))
    found = read(tmp_path, grayscale=True)  # pytest is configured to fail on fastdiff's warnings
    assert found.images[:, 0, 0, 0].tolist() == [40_000 >> 8, 1, 0]


def test_kinds_of_files_are_judged_apart(tmp_path):
    """Files of another source beside them do not hide 8-bit data that became black."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    save(tmp_path / "a" / "bright.png", grey(60_000))
    save(tmp_path / "b" / "eight.tif", grey(255, np.int32))
    with pytest.warns(UserWarning, match=r"TIFF I \(1 of them\) is 255, in .*\(0, 255\)"):
        read(tmp_path)


def test_a_range_that_is_given_is_not_doubted(tmp_path):
    save(tmp_path / "a.png", grey(4000))
    assert read(tmp_path, value_range=(0, 65535)).images.max() == 15
    assert read(tmp_path, value_range=(3000, 5000)).images.max() == 1000 * 256 // 2001
    assert read(tmp_path, value_range=(0, 1000)).images.min() == 255
    assert read(tmp_path, value_range=(4001, 5000)).images.max() == 0


def test_black_images_are_not_doubted(tmp_path):
    save(tmp_path / "a.png", grey(0))
    assert read(tmp_path).images.max() == 0


def test_integers_of_32_bits(tmp_path):
    save(tmp_path / "a.tif", grey(-1000, np.int32))
    save(tmp_path / "b.tif", grey(3000, np.int32))
    message = r"a\.tif: its values \(-1000 to -1000\) lie outside 0 to 65535: .*--value-range"
    with pytest.raises(DataError, match=message):
        read(tmp_path)
    found = read(tmp_path, value_range=(-1024, 3071)).images
    assert found[:, 0, 0, 0].tolist() == [24 * 256 // 4096, 4024 * 256 // 4096]
    save(tmp_path / "a.tif", grey(70_000, np.int32))
    with pytest.raises(DataError, match=r"70000 to 70000\) lie outside"):
        read(tmp_path)


def test_floating_point_values(tmp_path):
    ramp = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    save(tmp_path / "a.tif", ramp)
    with pytest.raises(DataError, match=r"\(0 to 1\), whose range is unknown: .*--value-range"):
        read(tmp_path)
    found = read(tmp_path, value_range=(0, 1), grayscale=True).images[0, 0]
    assert torch.equal(found, torch.from_numpy((ramp * 256).clip(0, 255).astype(np.uint8)))
    ramp[0, 0] = np.nan
    save(tmp_path / "a.tif", ramp)
    with pytest.raises(DataError, match="not finite"):
        read(tmp_path, value_range=(0, 1))


def test_a_file_that_says_it_has_twelve_bits(tmp_path):
    """TIFF has a type of 12 bits, two values in three bytes: 4095 is white."""
    pairs = bytes.fromhex("fff800") * 4  # 4095 and 2048
    file = bytearray(tiff(grey(0)))
    file = file.replace(
        struct.pack(">HHII", 258, 3, 1, 16 << 16), struct.pack(">HHII", 258, 3, 1, 12 << 16)
    )
    little = _little_endian(file[:-128]) + pairs * 8
    (tmp_path / "a.tif").write_bytes(little)
    found = read(tmp_path, grayscale=True).images[0, 0]
    assert found[0].tolist() == [255, 128] * 4


def _little_endian(file):
    """The head of a file by ``tiff`` in the other order of bytes."""
    entries = [struct.unpack_from(">HHII", file, 10 + 12 * i) for i in range(10)]
    small = [(t, k, n, v >> 16 if k == 3 and n == 1 else v) for t, k, n, v in entries]
    directory = struct.pack("<H", 10) + b"".join(struct.pack("<HHII", *e) for e in small)
    return b"II*\0\x08\0\0\0" + directory + bytes(file[130:])


def test_a_transparent_value_of_16_bits_becomes_white(tmp_path):
    values = deep(65536)[..., :3]
    values[0, 0] = 1000
    key = struct.pack(">HHH", 1000, 1000, 1000)
    (tmp_path / "a.png").write_bytes(png(values, (b"tRNS", key)))
    (tmp_path / "b.png").write_bytes(png(values[..., :1], (b"tRNS", key[:2])))
    found = read(tmp_path).images
    assert found[:, :, 0, 0].tolist() == [[255] * 3] * 2
    assert np.array_equal(found[0, :, 1:].permute(1, 2, 0), values[1:] >> 8)


@pytest.mark.parametrize(
    ("value_range", "message"),
    [
        ((5, 5), "the lower first, got 5 and 5"),
        ((1, 0), "the lower first, got 1 and 0"),
        ((0, float("inf")), "two finite numbers, the lower first, got 0 and inf"),
        ((0, 255), "for files of more than 8 bits a value; .* has none"),
    ],
)
def test_unusable_ranges(value_range, message, tmp_path):
    save(tmp_path / "a.png", 7, "L")
    with pytest.raises(DataError, match=message):
        read(tmp_path, value_range=value_range)


@pytest.mark.parametrize(
    ("mode", "color", "suffix", "wanted"),
    [
        ("1", 1, "png", [255] * 3),
        ("L", 7, "png", [7] * 3),
        ("LA", (7, 0), "tif", [255] * 3),
        ("PA", (3, 0), "tif", [255] * 3),
        ("RGBA", (1, 2, 3, 0), "webp", [255] * 3),
        ("CMYK", (0, 0, 0, 255), "jpg", [0] * 3),
        ("CMYK", (0, 0, 0, 0), "tif", [255] * 3),
        ("YCbCr", (90, 128, 128), "jpg", [90] * 3),
    ],
)
def test_modes(mode, color, suffix, wanted, tmp_path):
    save(tmp_path / f"a.{suffix}", color, mode)
    assert read(tmp_path).images[0, :, 4, 4].tolist() == wanted


# Strange files.


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_odd_metadata_do_not_stop_the_reading(suffix, tmp_path):
    """The orientation is heeded although other tags beside it hold nonsense."""
    upright = Image.new("RGB", (16, 16), "black")
    upright.paste("white", (0, 0, 16, 8))
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    stored.save(tmp_path / f"turned.{suffix}", exif=ODD_EXIF, quality=100)
    found = read(tmp_path, 16).images[0, 0]
    assert found[:6].min() > 240
    assert found[10:].max() < 15


def test_metadata_that_cannot_be_parsed_are_passed_over(tmp_path, monkeypatch):
    save(tmp_path / "a.png", (9, 9, 9), "RGB")
    error = struct.error("unpack requires a buffer of 8 bytes")
    monkeypatch.setattr(Image.Image, "getexif", raising(error))
    assert read(tmp_path).images[0, 0, 0, 0] == 9


def test_the_first_frame_is_read(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ((200, 0, 0), (0, 0, 0), (9, 9, 9))]
    for name in ("a.gif", "b.png", "c.tif", "d.webp"):
        options = {"lossless": True} if name.endswith("webp") else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
    assert read(tmp_path).images[:, :, 4, 4].tolist() == [[200, 0, 0]] * 4


@pytest.mark.parametrize(
    "error",
    [
        struct.error("bad"), ValueError("bad"), KeyError(7), IndexError("bad"), TypeError("bad"),
        OverflowError("bad"), EOFError("bad"), zlib.error("bad"), RecursionError("bad"),
        MemoryError(), AssertionError(), Image.DecompressionBombError("bad"), OSError("bad"),
        SyntaxError("bad"), OSError(5, "Input/output error"),
    ],
    ids=repr,
)  # fmt: skip
def test_whatever_a_decoder_raises_names_the_file(error, tmp_path, monkeypatch):
    save(tmp_path / "a.png", (9, 9, 9), "RGB")
    monkeypatch.setattr(Image.Image, "convert", raising(error))
    with pytest.raises(DataError, match=r"cannot read the image .*a\.png: \w"):
        read(tmp_path)


def test_an_interrupt_is_no_bad_file(tmp_path, monkeypatch):
    save(tmp_path / "a.png", (9, 9, 9), "RGB")
    monkeypatch.setattr(Image.Image, "convert", raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        read(tmp_path, skip_bad=True)


def _encoded(suffix):
    """A small file of a format."""
    noise = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    if suffix == "png of 16 bits":
        return png(noise.astype(np.uint16) * 257)
    buffer = io.BytesIO()
    exif = {"exif": ODD_EXIF} if suffix in ("jpeg", "png", "webp") else {}
    Image.fromarray(noise).save(buffer, suffix, **exif)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "suffix", ["png", "png of 16 bits", "jpeg", "webp", "gif", "bmp", "tiff", "ppm"]
)
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_files_are_read_or_named(suffix, tmp_path):
    """Cut short, bits flipped, a part taken out: an image or a DataError in one line."""
    sound, rng = _encoded(suffix), np.random.default_rng(0)
    path = tmp_path / f"image.{suffix.split()[0]}"
    refused = []
    for i in range(60):
        file = bytearray(sound)
        first, last = sorted(rng.integers(0, len(file), 2))
        if i % 3 == 0:
            del file[first:]
        elif i % 3 == 1:
            del file[first:last]
        else:
            for position in rng.integers(0, len(file), 8):
                file[position] ^= 1 << rng.integers(8)
        path.write_bytes(bytes(file))
        try:
            image, _ = image_file.read(path, Reading(8, value_range=(0, 65535)), str(path))
        except DataError as error:
            refused.append(str(error))
        else:
            assert image.shape == (8, 8, 3)
    assert len(refused) >= 10
    assert all(text.startswith(f"{path}: ") and "\n" not in text for text in refused)


def test_a_size_beyond_all_bounds_is_refused_before_it_is_decoded(tmp_path):
    huge = png(np.zeros((1, 1, 1), np.uint16))
    (tmp_path / "a.png").write_bytes(
        huge[:16] + struct.pack(">II", 2**31 - 1, 2**31 - 1) + huge[24:]
    )
    with pytest.raises(DataError, match=r"a\.png: "):
        read(tmp_path)


# Several bad files.


def _spoil(folder, count, name="bad{}.png"):
    for i in range(count):
        (folder / name.format(i)).write_bytes(b"these are no pixels")


def test_all_bad_files_are_told_at_once(tmp_path):
    save(tmp_path / "good.png", (9, 9, 9), "RGB")
    _spoil(tmp_path, 3)
    (tmp_path / "empty.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"^cannot read 4 of 5 images: .*skip_bad=True") as caught:
        read(tmp_path)
    for name in ("bad0.png", "bad1.png", "bad2.png", "empty.jpg"):
        assert f"{tmp_path / name}: cannot identify" in str(caught.value)
    _spoil(tmp_path, 30)
    with pytest.raises(DataError, match=r"cannot read 31 of 32 images: .*; and 21 more") as caught:
        read(tmp_path)
    assert str(caught.value).count("cannot identify") == image_reader.NAMED_FILES


def test_bad_files_are_left_out_on_demand(tmp_path, caplog):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        _spoil(tmp_path / name, 2)
    save(tmp_path / "cat" / "good.png", (9, 9, 9), "RGB")
    save(tmp_path / "dog" / "a.png", (1, 1, 1), "RGB")
    save(tmp_path / "dog" / "z.png", (2, 2, 2), "RGB")
    with caplog.at_level(logging.WARNING):
        found = read(tmp_path, skip_bad=True)
    assert found.images[:, 0, 0, 0].tolist() == [9, 1, 2]
    assert found.labels.tolist() == [0, 1, 1]
    assert found.classes == ("cat", "dog")
    assert len(caplog.records) == 1
    assert "left out 4 of 7 images that cannot be read: " in caplog.text
    assert str(tmp_path / "dog" / "bad1.png") in caplog.text


def test_a_class_of_bad_files_alone_is_refused(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
    save(tmp_path / "cat" / "good.png", (9, 9, 9), "RGB")
    _spoil(tmp_path / "dog", 2)
    with pytest.raises(DataError, match=r"none of the images in .*dog can be read: .*bad0"):
        read(tmp_path, skip_bad=True)


def test_a_folder_of_bad_files_alone_is_refused(tmp_path):
    _spoil(tmp_path, 2)
    with pytest.raises(DataError, match=rf"none of the images in {tmp_path} can be read"):
        read(tmp_path, skip_bad=True)


def test_nothing_is_said_of_good_files(tmp_path, caplog):
    save(tmp_path / "good.png", (9, 9, 9), "RGB")
    assert len(read(tmp_path, skip_bad=True)) == 1
    assert not caplog.records


# What is in a folder beside files.


@pytest.mark.skipif(sys.platform == "win32", reason="links and pipes")
def test_links_and_pipes(tmp_path):
    """A link to nothing is a bad file, and so is a pipe, which is not opened: that would wait."""
    save(tmp_path / "good.png", (9, 9, 9), "RGB")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "linked.png").symlink_to("good.png")
    assert len(read(tmp_path)) == 2
    (tmp_path / "dangling.png").symlink_to("nowhere.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(DataError, match="cannot read 3 of 5 images") as caught:
        read(tmp_path)
    assert f"{tmp_path / 'dangling.png'}: a link to nothing" in str(caught.value)
    assert f"{tmp_path / 'pipe.png'}: not a file" in str(caught.value)
    assert len(read(tmp_path, skip_bad=True)) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="links")
def test_a_folder_that_is_linked_into_itself_is_read_once(tmp_path):
    (tmp_path / "cat" / "more").mkdir(parents=True)
    save(tmp_path / "cat" / "more" / "good.png", (9, 9, 9), "RGB")
    (tmp_path / "cat" / "more" / "back").symlink_to(tmp_path / "cat")
    assert len(read(tmp_path)) == 1


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    """Tests may run as root, who may read all; so the refusal is made here."""
    save(tmp_path / "a.png", (9, 9, 9), "RGB")
    refuse = raising(PermissionError(13, "Permission denied", str(tmp_path / "a.png")))
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", refuse)
        with pytest.raises(DataError, match=r"a\.png: Permission denied"):
            read(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("os.scandir", refuse)
        with pytest.raises(DataError, match=r"cannot list the folder .*: Permission denied"):
            read(tmp_path)


@pytest.mark.parametrize("name", ["with space.png", "größe.png", "日本.png", "new\nline.png"])
def test_names(name, tmp_path):
    save(tmp_path / name, (9, 9, 9), "RGB")
    assert read(tmp_path).images[0, 0, 0, 0] == 9
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match="cannot read the image"):
        read(tmp_path)
