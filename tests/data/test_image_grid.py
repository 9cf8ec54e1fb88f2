"""Pixels, labelled grids, and image files that are written whole or not at all."""

from __future__ import annotations

import errno

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff.common.errors import InputError
from fastdiff.data import image_grid


def test_pixels_and_back():
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    floats = image_grid.from_uint8(values)
    assert floats.dtype == torch.float32
    assert floats.min() == -1
    assert floats.max() == 1
    assert np.array_equal(image_grid.to_uint8(floats), values.permute(0, 2, 3, 1).numpy())


def test_pixels_are_rounded_and_clipped():
    floats = torch.tensor([-7.0, -1.0, -0.999, 0.0, 0.5, 1.0, 7.0]).view(1, 1, 1, 7)
    assert image_grid.to_uint8(floats).ravel().tolist() == [0, 0, 0, 128, 191, 255, 255]
    colour = torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1)
    assert image_grid.to_uint8(colour).tolist() == [[[[0, 128, 255]]]]
    assert image_grid.to_uint8(torch.zeros(0, 3, 4, 4)).shape == (0, 4, 4, 3)
    assert image_grid.to_uint8(torch.ones(1, 1, 2, 2, dtype=torch.bfloat16)).max() == 255


@pytest.mark.parametrize("channels", [1, 3], ids=["grey", "colour"])
def test_a_grid_shows_each_image_in_its_place(channels):
    """Five images of one brightness each, in rows of two, enlarged three times."""
    levels = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0])
    tiles = levels.view(5, 1, 1, 1).expand(5, channels, 4, 6)
    picture = np.asarray(image_grid.grid(tiles, columns=2, scale=3, gap=1))
    assert picture.shape == (1 + 3 * 13, 1 + 2 * 19, 3)
    for i, level in enumerate(image_grid.to_uint8(tiles)[:, 0, 0, 0].tolist()):
        row, column = divmod(i, 2)
        top, left = 1 + row * 13, 1 + column * 19
        assert (picture[top : top + 12, left : left + 18] == level).all()
        assert (picture[top - 1, left : left + 18] == 40).all()  # the gap above
    assert (picture[1 + 2 * 13 :, 1 + 19 :] == 40).all()  # the sixth place is empty


def test_small_images_are_enlarged_by_default():
    assert image_grid.grid(torch.zeros(1, 1, 16, 16), 1, gap=0).size == (64, 64)
    assert image_grid.grid(torch.zeros(1, 1, 10, 10), 1, gap=0).size == (70, 70)
    assert image_grid.grid(torch.zeros(1, 1, 100, 100), 1, gap=0).size == (100, 100)


def test_labels_stand_at_the_left_of_their_rows():
    tiles = torch.full((4, 1, 16, 16), -1.0)
    plain = image_grid.grid(tiles, 2)
    labelled = image_grid.grid(tiles, 2, labels=["0", "seven"])
    assert labelled.height == plain.height
    margin = labelled.width - plain.width
    assert margin > 0
    written = np.asarray(labelled)[:, :margin].max(axis=(1, 2)) > 200
    middle = labelled.height // 2
    assert written[:middle].any()
    assert written[middle:].any()
    assert np.array_equal(np.asarray(labelled)[:, margin:], np.asarray(plain))


def test_a_picture_is_written_and_its_folder_made(tmp_path):
    path = tmp_path / "new" / "folder" / "grid.png"
    picture = image_grid.grid(torch.rand(1, 3, 8, 8), 1)
    image_grid.save(picture, path)
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(picture))
    image_grid.save(Image.new("RGB", (2, 2)), path)  # again: it is replaced
    assert Image.open(path).size == (2, 2)
    assert [entry.name for entry in path.parent.iterdir()] == ["grid.png"]


def test_a_picture_appears_whole(tmp_path, monkeypatch):
    """Nothing is ever written to the path itself: the file comes there by its new name."""
    path = tmp_path / "grid.png"
    written = []
    save = Image.Image.save

    def watched(self, file, *args, **kwargs):
        written.append(file)
        save(self, file, *args, **kwargs)
        assert not path.exists()

    monkeypatch.setattr(Image.Image, "save", watched)
    image_grid.save(Image.new("RGB", (4, 4)), path)
    assert path.exists()
    assert len(written) == 1


def test_a_full_disk_leaves_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "grid.png"
    image_grid.save(Image.new("RGB", (4, 4), "red"), path)
    before = path.read_bytes()

    def full(self, file, *args, **kwargs):
        with open(file, "wb") as stream:
            stream.write(b"half a pic")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(InputError, match=r"grid\.png: No space left on device"):
        image_grid.save(Image.new("RGB", (4, 4), "blue"), path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["grid.png"]


@pytest.mark.parametrize("suffix", ["webp", "jpg", "gif", "tga", "sgi"])
def test_an_image_too_large_for_its_format_is_an_input_error(suffix, tmp_path):
    """Each encoder has an error of its own for it."""
    path = tmp_path / f"grid.{suffix}"
    with pytest.raises(InputError, match=rf"cannot write .*grid\.{suffix}: ."):
        image_grid.save(Image.new("RGB", (70_000, 1)), path)
    assert list(tmp_path.iterdir()) == []


def test_checking_a_path_leaves_nothing_behind(tmp_path):
    image_grid.check_image_path(tmp_path / "a.png")
    image_grid.check_writable(tmp_path / "losses.jsonl")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param("picture", "end its name in .png", id="no suffix"),
        pytest.param("picture.mp4", "end its name in .png", id="a film"),
        pytest.param("picture.h5", "save handler not installed", id="no writer"),
        pytest.param("picture.xbm", "cannot write mode RGB as XBM", id="no colour"),
        pytest.param("picture.blp", "Unsupported BLP image mode", id="no colour, another error"),
        pytest.param("folder.png", "it is a folder", id="a folder"),
        pytest.param("file/picture.png", "cannot write", id="a file for a folder"),
    ],
)
def test_paths_that_cannot_be_written(name, message, tmp_path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=message):
        image_grid.check_image_path(tmp_path / name)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(
            lambda: image_grid.to_uint8(torch.zeros(3, 8, 8)), "shape", id="three dimensions"
        ),
        pytest.param(
            lambda: image_grid.to_uint8(torch.zeros(1, 2, 8, 8)), "1 or 3", id="two channels"
        ),
        pytest.param(
            lambda: image_grid.to_uint8(torch.full((1, 1, 2, 2), torch.nan)), "finite", id="NaN"
        ),
        pytest.param(lambda: image_grid.grid(torch.zeros(0, 1, 8, 8), 2), "got 0", id="no images"),
        pytest.param(lambda: image_grid.grid(torch.zeros(2, 1, 8, 8), 0), "and 0", id="no columns"),
        pytest.param(
            lambda: image_grid.grid(torch.zeros(4, 1, 8, 8), 2, labels=["one"]),
            "each of 2 rows, got 1",
            id="too few labels",
        ),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
