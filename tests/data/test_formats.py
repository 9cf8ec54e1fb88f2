"""Data sets in their own formats, made here: what is found in them, and what is wrong with them."""

from __future__ import annotations

import gzip
import io
import os
import struct
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

from fastdiff.common.errors import DataError
from fastdiff.data import open_images, tar_shards
from fastdiff.data.image_file import Reading
from fastdiff.data.image_set import ImageSet
from fastdiff.data.lazy_images import LazyImages
from fastdiff.data.recognition import find_source


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """What is found in tar files is kept in a folder of this test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def images(data, size=8, **options):
    return open_images(data, size, progress=False, **options)


def lazy_and_whole(data, size, **options):
    """The images of ``data``, once in memory and once read when wanted: they must be the same."""
    whole = images(data, size, **options)
    lazy = images(data, size, cache=0, workers=1, **options)
    assert isinstance(whole, ImageSet)
    assert isinstance(lazy, LazyImages)
    everything = torch.arange(len(whole))
    for ours, theirs in zip(lazy.read(everything), whole.read(everything), strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)
    assert (lazy.classes, lazy.name, lazy.channels) == (whole.classes, whole.name, whole.channels)
    return whole


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


# CIFAR.


def write_cifar(root, count=3, hundred=False):
    root.mkdir()
    files = ["train.bin"] if hundred else [f"data_batch_{i}.bin" for i in range(1, 6)]
    pixels = {}
    for number, name in enumerate([*files, "test.bin" if hundred else "test_batch.bin"]):
        pixels[name] = noise(count, 3, 32, 32, seed=number)
        heads = [bytes([9, i]) if hundred else bytes([i]) for i in range(count)]
        records = [head + x.tobytes() for head, x in zip(heads, pixels[name], strict=True)]
        (root / name).write_bytes(b"".join(records))
    names = "fine_label_names.txt" if hundred else "batches.meta.txt"
    (root / names).write_text(
        "\n".join(f"class{i}" for i in range(100 if hundred else 10)) + "\n\n"
    )
    return pixels


@pytest.mark.parametrize("hundred", [False, True], ids=["CIFAR-10", "CIFAR-100"])
def test_cifar(hundred, tmp_path):
    root = tmp_path / "cifar-binary"
    pixels = write_cifar(root, hundred=hundred)
    whole = lazy_and_whole(root, 32)
    last = list(pixels)[-2]
    assert len(whole) == 3 * (1 if hundred else 5)
    assert torch.equal(whole.images[-3:], torch.from_numpy(pixels[last]))
    assert whole.labels.tolist() == [0, 1, 2] * (len(whole) // 3)
    assert whole.classes[:2] == ("class0", "class1")
    assert len(whole.classes) == (100 if hundred else 10)
    test = images(root, 32, split="test")
    assert torch.equal(test.images, torch.from_numpy(list(pixels.values())[-1]))
    assert images(root, 16, grayscale=True).images.shape[1:] == (1, 16, 16)
    with pytest.raises(DataError, match="the splits train and test, not 'validation'"):
        images(root, split="validation")


def test_damaged_cifar(tmp_path):
    root = tmp_path / "cifar"
    write_cifar(root)
    batch = root / "data_batch_3.bin"
    whole = batch.read_bytes()
    batch.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"data_batch_3\.bin: 9218 bytes are no whole number of"):
        images(root)
    batch.write_bytes(b"\x0a" + whole[1:])
    with pytest.raises(DataError, match=r"data_batch_3\.bin: record 0 has the class 10"):
        images(root)
    batch.unlink()
    with pytest.raises(DataError, match=r"data_batch_3\.bin: No such file"):
        images(root)
    (root / "batches.meta.txt").write_text("cat dog")
    with pytest.raises(DataError, match=r"2 names of classes, wanted 10"):
        images(root)


def test_a_file_that_shrinks_is_named(tmp_path):
    root = tmp_path / "cifar"
    write_cifar(root)
    lazy = images(root, 32, cache=0)
    (root / "data_batch_2.bin").write_bytes(bytes(3073))
    lazy.read(torch.tensor([3]))
    with pytest.raises(DataError, match=r"data_batch_2\.bin: record 1"):
        lazy.read(torch.tensor([4]))


def test_pickles_are_never_read(tmp_path):
    """Not even opened: the text says what to take in their place."""
    for name in ("data_batch_1", "batches.meta"):
        os.mkfifo(tmp_path / name)  # to open it would wait for ever
    with pytest.raises(DataError, match=r"pickles, .*\(cifar-10-binary\.tar\.gz\)"):
        images(tmp_path)


# MNIST.


def idx(values):
    head = struct.pack(">HBB", 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
    return head + values.astype(np.uint8).tobytes()


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
def test_mnist(packed, tmp_path):
    pixels, labels = noise(5, 28, 28), np.array([3, 0, 9, 9, 1])
    pack, end = (gzip.compress, ".gz") if packed else (bytes, "")
    for split, count in (("train", 5), ("t10k", 2)):
        (tmp_path / f"{split}-images-idx3-ubyte{end}").write_bytes(pack(idx(pixels[:count])))
        (tmp_path / f"{split}-labels-idx1-ubyte{end}").write_bytes(pack(idx(labels[:count])))
    whole = lazy_and_whole(tmp_path, 28)
    assert torch.equal(whole.images[:, 0], torch.from_numpy(pixels))
    assert whole.channels == 1
    assert whole.labels.tolist() == labels.tolist()
    assert whole.classes == tuple("0123456789")
    assert len(images(tmp_path, 28, split="test")) == 2
    assert images(tmp_path, 32).images.shape == (5, 1, 32, 32)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "begins with the bytes , wanted 00 00 08 03", id="empty"),
        pytest.param(b"\0\0\x0d\x03" + bytes(30), "begins with the bytes 00 00 0d 03", id="floats"),
        pytest.param(idx(noise(3, 8, 8))[:-1], "207 bytes, wanted 208", id="short"),
        pytest.param(idx(noise(3, 8, 8)) + b"x", "209 bytes, wanted 208", id="long"),
        pytest.param(idx(noise(3, 8, 8))[:9], "wanted", id="cut in the header"),
        pytest.param(idx(noise(0, 8, 8)), "wanted", id="no images"),
        pytest.param(gzip.compress(idx(noise(3, 8, 8)))[:-20], "ended before", id="cut gz"),
    ],
)
def test_damaged_idx(content, message, tmp_path):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(DataError, match=rf"train-images-idx3-ubyte: .*{message}"):
        images(tmp_path)


def test_idx_files_that_do_not_belong_together(tmp_path):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(noise(3, 8, 8)))
    assert images(tmp_path).labels is None
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(noise(2)))
    with pytest.raises(DataError, match="2 labels for the 3 images"):
        images(tmp_path)
    (tmp_path / "emnist-train-images-idx3-ubyte").write_bytes(idx(noise(3, 8, 8)))
    with pytest.raises(DataError, match="wanted one file of the images of train"):
        images(tmp_path)


# Tar files.


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path):
    """Two shards of three images with classes, and the pixels of the images."""
    pixels = noise(6, 8, 8, 3)
    (tmp_path / "shards").mkdir()
    for shard in (0, 1):
        members = {}
        for i in range(3 * shard, 3 * shard + 3):
            members[f"{i:03d}.json"] = b"{}"
            members[f"{i:03d}.cls"] = f"{i % 3}\n".encode()
            members[f"{i:03d}.PNG"] = png(pixels[i])
        write_tar(tmp_path / "shards" / f"{shard:03d}.tar", members)
    return tmp_path / "shards", pixels


def test_tar_shards(shards, tmp_path):
    root, pixels = shards
    whole = lazy_and_whole(root, 8)
    assert torch.equal(whole.images, torch.from_numpy(pixels).permute(0, 3, 1, 2))
    assert whole.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert whole.classes == ("0", "1", "2")
    assert len(images(root / "000.tar")) == 3
    assert torch.equal(images(f"{root}/{{000..001}}.tar").images, whole.images)
    with pytest.raises(DataError, match=r"002\.tar: No such file"):
        images(f"{root}/{{000..002}}.tar")
    with pytest.raises(DataError, match="counts down"):
        images(f"{root}/{{9..2}}.tar")
    assert [path.name for path in tar_shards.expanded("{1..2}-{09..10}.tar")] == [
        "1-09.tar", "1-10.tar", "2-09.tar", "2-10.tar",
    ]  # fmt: skip


def test_tar_files_are_scanned_once(shards, monkeypatch):
    root, _ = shards
    first = find_source(str(root), progress=False)
    scanned = []
    scan = tar_shards._scan_one
    monkeypatch.setattr(tar_shards, "_scan_one", lambda path: scanned.append(path) or scan(path))
    again = find_source(str(root), progress=False)
    assert not scanned
    assert again.listing == first.listing
    assert torch.equal(again.labels, first.labels)
    for i in range(6):
        assert again.place(i) == first.place(i)
        assert np.array_equal(again.read(i, Reading(8))[0], first.read(i, Reading(8))[0])
    os.utime(root / "001.tar", (1, 1))
    find_source(str(root), progress=False)
    assert len(scanned) == 2
    for path in tar_shards._index_file([root / "000.tar", root / "001.tar"]).parent.iterdir():
        path.write_bytes(b"damaged")
    find_source(str(root), progress=False)
    assert len(scanned) == 4


def test_without_a_place_to_keep_it_a_scan_is_repeated(shards, monkeypatch, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(images(shards[0])) == 6


def test_folders_in_a_tar_file_are_classes(tmp_path):
    pixels = noise(3, 8, 8, 3)
    names = ["./zoo/b/1.png", "./ant/2.x.png", "./zoo/3.png"]
    write_tar(tmp_path / "a.tar", dict(zip(names, map(png, pixels), strict=True)))
    found = images(tmp_path / "a.tar")
    assert found.classes == ("ant", "zoo")
    assert found.labels.tolist() == [1, 0, 1]
    write_tar(tmp_path / "a.tar", {"all/1.png": png(pixels[0]), "all/.hidden.png": b""})
    assert images(tmp_path / "a.tar").labels is None


def test_damaged_tar_files(shards, tmp_path):
    root, pixels = shards
    write_tar(root / "001.tar", {"5.png": b"no pixels", "5.cls": b"1", "6.txt": b""})
    with pytest.raises(DataError, match=r"cannot read the image .*001\.tar: 5\.png: cannot ident"):
        images(root)
    assert len(images(root, skip_bad=True)) == 3
    write_tar(root / "001.tar", {"5.png": png(pixels[0])})
    with pytest.raises(DataError, match=r"001\.tar: 5\.png has no class .* but others have"):
        images(root)
    write_tar(root / "001.tar", {"5.png": png(pixels[0]), "5.cls": b"cat"})
    with pytest.raises(DataError, match=r"001\.tar: 5\.cls holds b'cat', wanted the number"):
        images(root)
    (root / "001.tar").write_bytes(gzip.compress((root / "000.tar").read_bytes()))
    with pytest.raises(DataError, match=r"001\.tar: it is compressed"):
        images(root)
    (root / "001.tar").write_bytes(b"nothing of a tar file" * 50)
    with pytest.raises(DataError, match=r"cannot read the tar file .*001\.tar"):
        images(root)
    write_tar(root / "001.tar", {"5.png": png(noise(64, 64, 3))})
    os.truncate(root / "001.tar", 2000)
    with pytest.raises(DataError, match=r"001\.tar: it ends within its member 5\.png"):
        images(root)
    write_tar(root / "001.tar", {"6.txt": b""})
    assert len(images(root)) == 3
    with pytest.raises(DataError, match="no images in the tar files"):
        images(root / "001.tar")


def test_a_tar_file_that_shrinks_is_named(shards):
    root, _ = shards
    lazy = images(root, cache=0)
    os.truncate(root / "001.tar", 100)
    lazy.read(torch.arange(3))
    with pytest.raises(DataError, match=r"001\.tar: 003\.PNG: the tar file ends after"):
        lazy.read(torch.tensor([3]))


# Latents.


def test_latents(tmp_path):
    values = np.random.default_rng(0).standard_normal((5, 4, 8, 8)).astype(np.float32)
    (tmp_path / "b").mkdir()
    (tmp_path / "a").mkdir()
    np.save(tmp_path / "a" / "1.npy", values[0].astype(np.float16))
    np.save(tmp_path / "a" / "2.npy", values[1:3])
    save_file({"latent": values[3]}, tmp_path / "b" / "1.safetensors")
    save_file({"x": values[4:].astype(np.float16)}, tmp_path / "b" / "2.safetensors")
    for workers in (0, 1):
        lazy = images(tmp_path, latent_scale=0.5, workers=workers)
        x0, labels = lazy.read(torch.arange(5))
        assert x0.dtype == torch.float32
        torch.testing.assert_close(x0, torch.from_numpy(values) / 2, rtol=1e-3, atol=1e-6)
        assert torch.equal(x0[1:4], torch.from_numpy(values[1:4]) / 2)
        assert labels.tolist() == [0, 0, 0, 1, 1]
    assert (lazy.channels, lazy.size, lazy.classes) == (4, 8, ("a", "b"))
    assert lazy.place(2).endswith("2.npy: latent 1")
    assert lazy.place(3).endswith("1.safetensors")
    for options, message in (
        ({"flip": True}, "latents, which flip"),
        ({"size": 16}, r"--image-size 8"),
        ({"grayscale": True}, "grayscale is for images"),
        ({"crop": "random"}, "crop is for images"),
        ({"resize": "box"}, "resize is for images"),
        ({"value_range": (0, 1)}, "value_range is for images"),
    ):
        with pytest.raises(DataError, match=message):
            images(tmp_path, **{"size": 8, **options})


@pytest.mark.parametrize(
    ("write", "message"),
    [
        pytest.param(lambda p: np.save(p, np.array([{}])), "Python objects", id="pickle"),
        pytest.param(lambda p: np.save(p, np.zeros((4, 8, 8), int)), "holds int64", id="integers"),
        pytest.param(lambda p: np.save(p, np.zeros((8, 8))[None]), "holds float64", id="double"),
        pytest.param(
            lambda p: np.save(p, np.zeros((8, 8), np.float32)), r"\[C, S, S\] or", id="no channels"
        ),
        pytest.param(
            lambda p: np.save(p, np.zeros((4, 8, 4), np.float32)), "has shape", id="not square"
        ),
        pytest.param(
            lambda p: np.save(p, np.zeros((3, 8, 8), np.float32)),
            r"latents of shape \(3, 8, 8\), .*a\.npy of \(4, 8, 8\)",
            id="another shape",
        ),
        pytest.param(
            lambda p: np.save(p, np.full((4, 8, 8), np.nan, np.float32)), "not finite", id="NaN"
        ),
        pytest.param(lambda p: p.write_bytes(b"none"), r"b\.npy: ", id="no array"),
        pytest.param(lambda p: p.write_bytes(b""), r"b\.npy: ", id="empty"),
        pytest.param(
            lambda p: save_file(
                {"a": np.zeros(1), "b": np.zeros(1)}, p.with_suffix(".safetensors")
            ),
            r"holds the tensors \['a', 'b'\], wanted one",
            id="two tensors",
        ),
        pytest.param(
            lambda p: p.with_suffix(".safetensors").write_bytes(b"none"),
            r"b\.safetensors: ",
            id="no safetensors",
        ),
    ],
)
def test_damaged_latents(write, message, tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((4, 8, 8), np.float32))
    write(tmp_path / "b.npy")
    with pytest.raises(DataError, match=message):
        images(tmp_path)


def test_latents_that_change_are_named(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((4, 8, 8), np.float32))
    lazy = images(tmp_path)
    np.save(tmp_path / "a.npy", np.zeros((4, 4, 4), np.float32))
    with pytest.raises(DataError, match=r"a\.npy: now has shape \(4, 4, 4\), had \(4, 8, 8\)"):
        lazy.read(torch.tensor([0]))


# What is recognised.


def test_a_mixture_is_refused(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    np.save(tmp_path / "b.npy", np.zeros((4, 8, 8), np.float32))
    with pytest.raises(DataError, match="has images and latents; wanted one of them"):
        images(tmp_path)


def test_links_in_a_circle_are_followed_once(tmp_path):
    (tmp_path / "set" / "a").mkdir(parents=True)
    (tmp_path / "set" / "a" / "loop").symlink_to(tmp_path / "set")
    write_tar(tmp_path / "set" / "x.tar", {"1.png": png(noise(8, 8, 3))})
    assert len(images(tmp_path / "set")) == 1


def test_what_is_nothing_known(tmp_path):
    (tmp_path / "a.docx").write_bytes(b"")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b").write_bytes(b"")
    with pytest.raises(DataError, match=r"has no images \(found 1 \.docx, 1 without suffix; want"):
        images(tmp_path)
    with pytest.raises(DataError, match=r"nor a \.tar or \.parquet file"):
        images(tmp_path / "a.docx")
    with pytest.raises(DataError, match=r"no .*nowhere"):
        images(tmp_path / "nowhere")
    with pytest.raises(DataError, match="names no data set"):
        images("hf:")
