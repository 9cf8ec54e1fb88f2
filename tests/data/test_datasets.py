"""Training images: the digits, folders of image files, and the order they are drawn in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_digits

from fastdiff.common.errors import DataError, InputError
from fastdiff.data import order
from fastdiff.data.datasets import (
    ImageSet,
    batch_indices,
    digits,
    folder,
    stream_generator,
    stream_seed,
)


def write(path, color=(200, 100, 50), size=(8, 8), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, **options)
    return path


def read(path, size=8, **options):
    return folder(path, size, progress=False, **options)


# The digits.


def test_digits_are_those_of_scikit_learn():
    bunch = load_digits()
    train, test = digits("train", size=8), digits("test", size=8)
    assert len(train) + len(test) == len(bunch.target) == 1797
    assert train.images.dtype == torch.float32
    assert train.images.shape[1:] == (1, 8, 8)
    assert train.classes == test.classes == tuple("0123456789")
    assert train.name == "digits"
    fifth = (bunch.target == 3).nonzero()[0][4]
    of_test = test.images[test.labels == 3]
    wanted = torch.from_numpy(bunch.images[fifth] / 8 - 1).float()
    assert torch.equal(of_test[0, 0], wanted)
    assert torch.equal(
        train.images[train.labels == 3][:4, 0],
        torch.from_numpy(bunch.images[bunch.target == 3][:4] / 8 - 1).float(),
    )


def test_held_out_digits_are_a_fifth_of_each_class():
    train, test = digits("train"), digits("test")
    for digit in range(10):
        held_out, kept = int((test.labels == digit).sum()), int((train.labels == digit).sum())
        assert held_out == (held_out + kept) // 5
    seen = {image.numpy().tobytes() for image in train.images}
    assert not any(image.numpy().tobytes() in seen for image in test.images)


def test_digits_are_enlarged_within_range():
    large = digits("test", size=16)
    assert large.size == 16
    assert large.channels == 1
    assert large.images.min() >= -1
    assert large.images.max() <= 1
    small = digits("test", size=8).images
    shrunk = torch.nn.functional.avg_pool2d(large.images, 2)
    assert (shrunk - small).abs().mean() < 0.1


# Folders.


def test_a_folder_of_images(tmp_path):
    write(tmp_path / "b.png", (0, 0, 255))
    write(tmp_path / "a.jpg", (255, 255, 255), quality=100)
    write(tmp_path / "c.BMP", (255, 0, 0))
    write(tmp_path / ".hidden.png")
    (tmp_path / "notes.txt").write_text("not an image")
    found = read(tmp_path)
    assert found.images.dtype == torch.uint8
    assert found.images.shape == (3, 3, 8, 8)
    assert found.images[:, :, 4, 4].tolist() == [[255, 255, 255], [0, 0, 255], [255, 0, 0]]
    assert found.labels is None
    assert found.classes == ()
    assert found.name == tmp_path.name


def test_sub_folders_are_classes(tmp_path):
    write(tmp_path / "zebra" / "1.png", (1, 1, 1))
    write(tmp_path / "ant" / "2.png", (2, 2, 2))
    write(tmp_path / "ant" / "deeper" / "3.png", (3, 3, 3))
    write(tmp_path / ".cache" / "4.png")
    found = read(tmp_path)
    assert found.classes == ("ant", "zebra")
    assert found.labels.tolist() == [0, 0, 1]
    assert found.images[:, 0, 0, 0].tolist() == [2, 3, 1]
    plain = found.without_labels()
    assert plain.labels is None
    assert plain.classes == ()
    assert torch.equal(plain.images, found.images)


def test_the_largest_centred_square_is_resized(tmp_path):
    wide = Image.new("RGB", (30, 10), "red")
    wide.paste("lime", (10, 0, 20, 10))
    wide.save(tmp_path / "wide.png")
    wide.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "tall.png")
    for size in (10, 5):
        found = read(tmp_path, size=size)
        assert found.images.shape == (2, 3, size, size)
        inside = found.images[:, :, 1:-1, 1:-1]  # bicubic filtering may look over the edge
        assert (inside[:, 0] == 0).all()
        assert (inside[:, 1] == 255).all()


def test_grey_images(tmp_path):
    write(tmp_path / "grey.png", 77, mode="L")
    assert read(tmp_path).images[0, :, 0, 0].tolist() == [77, 77, 77]
    grey = read(tmp_path, grayscale=True)
    assert grey.channels == 1
    assert grey.images[0, :, 0, 0].tolist() == [77]
    write(tmp_path / "grey.png", (255, 0, 0))
    assert read(tmp_path, grayscale=True).images[0, 0, 0, 0] == 76  # 0.299 of 255


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bit_images_keep_their_high_byte(suffix, tmp_path):
    """Pillow's own conversion to 8 bits cuts everything off at 255."""
    values = np.full((8, 8), 0x8123, dtype=np.uint16)
    values[0, 0] = 0x00FF
    path = tmp_path / f"deep.{suffix}"
    if suffix == "pgm":
        path.write_bytes(b"P5 8 8 65535\n" + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values).save(path)
    found = read(tmp_path, grayscale=True).images[0, 0]
    assert found[4, 4] == 0x81
    assert found[0, 0] == 0


def test_transparency_becomes_white(tmp_path):
    write(tmp_path / "a.png", (10, 20, 30, 0), mode="RGBA")
    write(tmp_path / "b.png", (0, 0, 0, 128), mode="RGBA")
    write(tmp_path / "c.png", (50, 0), mode="LA")
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([9, 9, 9, 200, 0, 0])
    palette.save(tmp_path / "d.gif", transparency=0)
    corner = read(tmp_path).images[:, :, 0, 0].tolist()
    assert corner == [[255] * 3, [127] * 3, [255] * 3, [255] * 3]


def test_cameras_orientation_is_heeded(tmp_path):
    """EXIF orientation 6: the camera was turned, the picture's top is at the right."""
    upright = Image.new("RGB", (8, 8), "black")
    upright.paste("white", (0, 0, 8, 4))
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    stored.save(tmp_path / "turned.png", exif=exif)
    assert ImageOps.exif_transpose(Image.open(tmp_path / "turned.png")).getpixel((4, 1))[0] == 255
    found = read(tmp_path).images[0, 0]
    assert (found[:4] == 255).all()
    assert (found[4:] == 0).all()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        pytest.param("text.png", b"these are no pixels", id="text"),
        pytest.param("empty.jpg", b"", id="empty"),
        pytest.param("cut.png", None, id="truncated"),
    ],
)
def test_an_unreadable_image_is_named(name, content, tmp_path):
    write(tmp_path / "good.png")
    if content is None:
        noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / name)
        content = (tmp_path / name).read_bytes()[:2000]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"cannot read the image .*{name}"):
        read(tmp_path)


def test_damaged_images_are_data_errors(tmp_path):
    """Whatever a few wrong bytes do to Pillow, it is reported as a bad file, not as a crash."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)
    refused = 0
    for suffix in ("png", "jpg", "gif", "bmp", "webp", "ppm"):
        path = tmp_path / f"image.{suffix}"
        Image.fromarray(noise).save(path)
        sound = path.read_bytes()
        for _ in range(60):
            damaged = bytearray(sound)
            for position in rng.integers(0, min(len(damaged), 100), 6):
                damaged[position] = rng.integers(256)
            path.write_bytes(bytes(damaged))
            try:
                assert read(tmp_path).images.shape == (1, 3, 8, 8)
            except DataError:
                refused += 1
        path.unlink()
    assert refused > 100


def test_floating_point_images_are_refused(tmp_path):
    Image.fromarray(np.full((8, 8), 0.5, dtype=np.float32)).save(tmp_path / "range.tif")
    with pytest.raises(DataError, match="range is unknown"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        pytest.param([], "has no images", id="empty folder"),
        pytest.param(["notes.txt"], "has no images", id="no image among the files"),
        pytest.param([".hidden.png"], "has no images", id="hidden files only"),
        pytest.param(["a.png", "cats/b.png"], "both in itself and in sub-folders", id="mixed"),
        pytest.param(["cats/b.png", "dogs/notes.txt"], "dogs has no images", id="empty class"),
    ],
)
def test_unusable_folders(files, message, tmp_path):
    for name in files:
        if name.endswith(".png"):
            write(tmp_path / name)
        else:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text("words")
    with pytest.raises(DataError, match=message):
        read(tmp_path)


def test_folders_that_are_none(tmp_path):
    with pytest.raises(DataError, match=r"no .*nowhere"):
        read(tmp_path / "nowhere")
    with pytest.raises(DataError, match="not a folder of images"):
        read(write(tmp_path / "a.png"))
    with pytest.raises(DataError, match="at least 1, got 0"):
        read(tmp_path, size=0)


def test_reading_shows_progress_on_standard_error(tmp_path, capsys):
    write(tmp_path / "a.png")
    folder(tmp_path, 8)
    out, err = capsys.readouterr()
    assert out == ""
    assert "reading images" in err


def test_errors_of_data_are_input_errors():
    assert issubclass(DataError, InputError)
    assert issubclass(InputError, ValueError)


# Batches.


def test_a_batch_is_scaled_to_floats():
    pixels = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1) * 51
    found = ImageSet(pixels, torch.tensor([0, 1, 0, 1, 0, 1]), ("a", "b"))
    x0, labels = found.batch(torch.tensor([5, 0, 3]))
    assert x0.dtype == torch.float32
    torch.testing.assert_close(x0.flatten(), torch.tensor([1.0, -1.0, 0.2]))
    assert labels.tolist() == [1, 0, 1]
    assert ImageSet(pixels).batch(torch.tensor([0]))[1] is None


def test_a_random_half_is_mirrored(generator):
    image = torch.tensor([[-1.0, 1.0], [-1.0, 1.0]]).view(1, 1, 2, 2)
    found = ImageSet(image, flip=True)
    everywhere = torch.zeros(1000, dtype=torch.int64)
    x0, _ = found.batch(everywhere, generator)
    mirrored = x0[:, 0, 0, 0] > 0
    assert 400 < int(mirrored.sum()) < 600
    assert torch.equal(x0[mirrored][0, 0], image[0, 0].flip(-1))
    again, _ = found.batch(everywhere, torch.Generator().manual_seed(0))
    assert torch.equal(again, x0)
    unflipped, _ = ImageSet(image).batch(everywhere, generator)
    assert torch.equal(unflipped, image.expand(1000, 1, 2, 2))


@pytest.mark.parametrize(
    ("count", "batch_size"), [(7, 3), (5, 5), (4, 9), (1, 2)], ids=["7x3", "5x5", "4x9", "1x2"]
)
def test_every_epoch_visits_every_image_once(count, batch_size):
    steps = 5 * count
    stream = torch.cat([batch_indices(count, batch_size, step, seed=1) for step in range(steps)])
    assert len(stream) == steps * batch_size
    epochs = stream[: len(stream) // count * count].view(-1, count)
    assert torch.equal(epochs.sort(1).values, torch.arange(count).expand_as(epochs))
    if count > 4:
        assert len({tuple(epoch.tolist()) for epoch in epochs}) > 1


def test_the_order_depends_on_the_seed_and_the_step_alone():
    late = batch_indices(100, 10, 37, seed=0)
    batch_indices(50, 7, 3, seed=5)
    order._permutation.cache_clear()
    assert torch.equal(batch_indices(100, 10, 37, seed=0), late)
    assert not torch.equal(batch_indices(100, 10, 37, seed=1), late)


def test_streams_are_apart():
    seeds = {
        stream_seed(seed, stream, index)
        for seed in range(3)
        for stream in ("step", "order", "dropout")
        for index in range(50)
    }
    assert len(seeds) == 3 * 3 * 50
    a, b = (torch.rand(3, generator=stream_generator(0, "step", 4)) for _ in range(2))
    assert torch.equal(a, b)


GREY = torch.zeros(2, 1, 4, 4)
LABELS = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda: ImageSet(GREY[0]), r"\[N, C, S, S\]", id="three dimensions"),
        pytest.param(lambda: ImageSet(GREY[:0]), "N >= 1", id="no images"),
        pytest.param(lambda: ImageSet(GREY[..., :2]), "shape", id="not square"),
        pytest.param(lambda: ImageSet(GREY.double()), "torch.float64", id="float64"),
        pytest.param(lambda: ImageSet(GREY + torch.nan), "finite, got NaN", id="NaN"),
        pytest.param(lambda: ImageSet(GREY - torch.inf), "finite", id="infinity"),
        pytest.param(lambda: ImageSet(GREY, LABELS), "labels must be", id="no class names"),
        pytest.param(lambda: ImageSet(GREY, LABELS, ("a",)), r"0\.\.0", id="label too large"),
        pytest.param(lambda: ImageSet(GREY, -LABELS, ("a", "b")), "labels", id="label negative"),
        pytest.param(lambda: ImageSet(GREY, LABELS[:1], ("a",)), "labels", id="too few labels"),
        pytest.param(
            lambda: ImageSet(GREY, LABELS.int(), ("a", "b")), "int64", id="labels of int32"
        ),
        pytest.param(lambda: ImageSet(GREY, None, ("a",)), "no labels", id="names without labels"),
        pytest.param(lambda: digits("validation"), "unknown split", id="unknown split"),
        pytest.param(lambda: digits(size=0), "at least 1, got 0", id="digits of no size"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(DataError, match=message):
        make()


def test_floats_of_another_scale_are_warned_of():
    with pytest.warns(UserWarning, match=r"in \[-1, 1\], got 0 to 255; .* as uint8"):
        ImageSet(torch.linspace(0, 255, 32).view(2, 1, 4, 4))
    ImageSet(torch.linspace(-1, 1, 32).view(2, 1, 4, 4))


def test_digits_without_scikit_learn(monkeypatch):
    """The message says what to install."""
    import sys

    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(InputError, match=r"'sklearn': pip install 'fastdiff\[train\]'"):
        digits()


def test_every_fifth_of_a_class_is_held_out():
    labels = torch.tensor([0, 1] * 6 + [2])
    images = torch.arange(13, dtype=torch.uint8).view(13, 1, 1, 1)
    whole = ImageSet(images, labels, ("a", "b", "c"), "letters", flip=True)
    train, rest = whole.split()
    assert rest is not None
    assert rest.images.flatten().tolist() == [8, 9]  # the fifth of a and of b; c has one
    assert train.images.flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12]
    for part in (train, rest):
        assert (part.classes, part.name, part.flip) == (whole.classes, "letters", True)
        assert part.labels is not None
        assert torch.equal(part.labels, labels[part.images.flatten().long()])
    few = ImageSet(images[:4], labels[:4], ("a", "b"))
    assert few.split() == (few, None)
    with pytest.raises(DataError, match="without labels cannot be split"):
        whole.without_labels().split()
