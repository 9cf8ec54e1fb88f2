"""Images that are read while training: what is read when, how much is kept, workers that die."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff.common.errors import DataError
from fastdiff.data import image_loading, reading_workers
from fastdiff.data.image_file import Depth, Reading
from fastdiff.data.image_folder import ImageFolder
from fastdiff.data.image_loading import load, read_all, spaced
from fastdiff.data.image_reader import OBJECT, ImageReader
from fastdiff.data.image_source import ImageSource, PackedNames
from fastdiff.data.lazy_images import LazyImages
from fastdiff.data.order import Lookahead, batch_indices

SIZE = 8
BYTES = SIZE * SIZE * 3 + OBJECT  # of an image in the cache


@pytest.fixture
def pictures(tmp_path):
    """A folder of 30 images in two classes; the first channel of image i is i."""
    rng = np.random.default_rng(0)
    for i in range(30):
        path = tmp_path / "pictures" / ("ant" if i < 12 else "bee") / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        pixels[..., 0] = i
        Image.fromarray(pixels).save(path)
    return tmp_path / "pictures"


def lazily(folder, *, flip=False, reading=None, **options):
    source = folder if isinstance(folder, ImageSource) else ImageFolder(folder, progress=False)
    return LazyImages(ImageReader(source, reading or Reading(SIZE), **options), flip=flip)


class Counted(ImageFolder):
    """Notes which images are read, in the process that reads."""

    def __init__(self, root):
        super().__init__(root, progress=False)
        self.log = root.parent / "read.txt"

    def read(self, index: int, reading: Reading) -> tuple[np.ndarray, Depth | None]:
        with self.log.open("a") as file:
            file.write(f"{index}\n")
        return super().read(index, reading)

    def seen(self):
        return [int(line) for line in self.log.read_text().split()]


@pytest.mark.parametrize("workers", [0, 2])
def test_images_are_those_of_memory(pictures, workers, generator):
    """And so are labels, mirroring and parts of a batch."""
    whole = read_all(ImageFolder(pictures), Reading(SIZE), flip=True, progress=False)
    lazy = lazily(pictures, flip=True, workers=workers)
    assert (len(lazy), lazy.channels, lazy.size) == (30, 3, SIZE)
    assert (lazy.name, lazy.classes) == (whole.name, whole.classes)
    assert torch.equal(lazy.labels, whole.labels)
    indices = torch.tensor([29, 3, 3, 0, 17])
    for ours, theirs in zip(lazy.read(indices), whole.read(indices), strict=True):
        assert torch.equal(ours, theirs)
    state = generator.get_state()
    mirrored = lazy.draw_mirrored(5, generator)
    assert mirrored.any()
    assert torch.equal(lazy.read(indices, mirrored)[0], whole.read(indices, mirrored)[0])
    assert torch.equal(
        lazy.batch(indices, generator.set_state(state))[0], whole.read(indices, mirrored)[0]
    )
    part = lazy.read(indices[2:], mirrored[2:])[0]
    assert torch.equal(part, whole.read(indices, mirrored)[0][2:])
    for ours, theirs in zip(lazy.split(), whole.split(), strict=True):
        everything = torch.arange(len(theirs))
        assert torch.equal(ours.read(everything)[0], theirs.read(everything)[0])
        assert torch.equal(ours.labels, theirs.labels)
    plain = lazy.without_labels()
    assert plain.read(indices)[1] is plain.labels is None
    assert plain.classes == ()
    with pytest.raises(IndexError):
        lazy.read(torch.tensor([30]))


def test_the_cache_holds_its_bound_and_gives_up_nothing(pictures):
    source = Counted(pictures)
    lazy = lazily(source, cache=10 * BYTES + BYTES // 2)
    for epoch in range(3):
        for step in range(5):
            lazy.read(batch_indices(30, 6, 5 * epoch + step, seed=0))
            assert lazy.reader.kept <= 10 * BYTES
    seen = source.seen()
    assert len(seen) == 30 + 20 + 20  # ten of the first epoch are not read again
    assert set(seen[:10]).isdisjoint(seen[30:])


def test_without_a_cache_an_image_is_read_every_time(pictures):
    source = Counted(pictures)
    lazy = lazily(source)
    for _ in range(3):
        lazy.read(torch.tensor([4, 4, 5]))
    assert source.seen() == [4, 5] * 3
    assert lazy.reader.kept == 0


def test_a_resumed_run_begins_at_its_image(pictures):
    """Its order is that of an uninterrupted run, and no image before it is read."""
    whole = [lazily(pictures).read(batch_indices(30, 6, step, 3))[0] for step in range(12)]
    source = Counted(pictures)
    lazy = lazily(source, workers=2)

    def order(step):
        return batch_indices(30, 6, step, 3)

    lookahead = Lookahead(lazy, order, end=12)
    for step in range(8, 12):
        lookahead(step)
        assert torch.equal(lazy.read(order(step))[0], whole[step])
    wanted = torch.cat([order(step) for step in range(8, 12)]).tolist()
    assert sorted(set(source.seen())) == sorted(set(wanted))
    assert len(source.seen()) <= len(wanted)


def test_what_comes_next_is_read_in_advance(pictures):
    source = Counted(pictures)
    lazy = lazily(source, workers=1, cache=2**20)
    told = []
    lazy.reader.prefetch = told.append
    lookahead = Lookahead(lazy, lambda step: torch.tensor([step]), end=8)
    for step in (2, 3, 4, 5):
        lookahead(step)
    assert told == [[2], [3], [4], [5], [6], [7]]  # each once, and none from the end on
    del lazy.reader.prefetch
    lazy.prefetch(torch.arange(10))
    deadline = time.monotonic() + 60
    while not source.log.exists() or len(source.seen()) < 10:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    lazy.read(torch.arange(10))
    assert sorted(source.seen()) == list(range(10))


def test_in_memory_nothing_is_told_of(pictures):
    images = read_all(ImageFolder(pictures), Reading(SIZE), progress=False)

    def never(step):
        raise AssertionError(step)

    Lookahead(images, never, end=8)(0)


def test_what_fits_is_read_into_memory(pictures, caplog):
    source = ImageFolder(pictures)
    values = 30 * SIZE * SIZE * 3
    options = {"progress": False, "flip": True}
    whole = load(source, Reading(SIZE), cache=values, **options)
    assert torch.equal(whole.images, read_all(source, Reading(SIZE), progress=False).images)
    assert whole.flip
    assert not whole.sampled
    lazy = load(source, Reading(SIZE), cache=values - 1, **options)
    assert isinstance(lazy, LazyImages)
    assert lazy.flip
    assert lazy.sampled
    with pytest.raises(DataError, match="--latent-scale"):
        load(source, Reading(SIZE), cache=values, scale=0.5, progress=False)
    with pytest.raises(DataError, match="--latent-scale"):
        load(source, Reading(SIZE), cache=0, scale=0.5, progress=False)


def test_many_images_are_read_by_processes(pictures, monkeypatch):
    monkeypatch.setattr(image_loading, "SMALL", 1)
    monkeypatch.setattr(image_loading, "REQUEST", 4)
    source = ImageFolder(pictures)
    alone = read_all(source, Reading(SIZE), progress=False)
    shared = read_all(source, Reading(SIZE), workers=3, progress=False)
    assert torch.equal(alone.images, shared.images)


# Images that cannot be read.


def test_an_image_that_cannot_be_read_is_named(pictures):
    lazy = lazily(pictures, workers=1)
    (pictures / "bee" / "20.png").unlink()
    (pictures / "bee" / "21.png").write_bytes(b"no pixels")
    lazy.read(torch.arange(20))
    with pytest.raises(
        DataError, match=r"cannot read the image .*20\.png: not a file .*--skip-bad"
    ):
        lazy.read(torch.tensor([19, 20]))
    with pytest.raises(DataError, match=r"21\.png: cannot identify"):
        lazy.read(torch.tensor([21]))


def test_the_next_of_its_class_takes_its_place(pictures, caplog):
    for name in ("ant/11.png", "ant/00.png", "bee/29.png"):
        (pictures / name).write_bytes(b"no pixels")
    for cache in (0, 2**20):
        lazy = lazily(pictures, skip_bad=True, cache=cache)
        with caplog.at_level(logging.WARNING):
            x0, labels = lazy.read(torch.tensor([11, 0, 29, 5, 11]))
        first = ((x0[:, 0, 0, 0] + 1) * 127.5).round().tolist()
        assert first == [1, 1, 12, 5, 1]
        assert labels.tolist() == [0, 0, 1, 0, 0]
        texts = [record.getMessage() for record in caplog.records]
        assert len(texts) == 3  # each once
        assert all(any(name in text for text in texts) for name in ("00.png", "11.png", "29.png"))
        caplog.clear()
    for path in (pictures / "ant").iterdir():
        path.write_bytes(b"no pixels")
    with pytest.raises(DataError, match="nor the next images of its class"):
        lazily(pictures, skip_bad=True).read(torch.tensor([3]))


def test_a_sample_is_looked_at_before_training(pictures, monkeypatch, caplog):
    monkeypatch.setattr(image_loading, "SAMPLE", 10)
    (pictures / "ant" / "03.png").write_bytes(b"no pixels")
    (pictures / "ant" / "04.png").write_bytes(b"no pixels")  # which is not in the sample
    source = ImageFolder(pictures)
    with pytest.raises(DataError, match=r"cannot read the image .*03\.png"):
        load(source, Reading(SIZE), cache=0, progress=False)
    with caplog.at_level(logging.WARNING):
        load(source, Reading(SIZE), cache=0, skip_bad=True, progress=False)
    assert "1 of 10 images" in caplog.text


def test_numbers_evenly_spaced():
    assert spaced(10, 5).tolist() == [0, 2, 4, 6, 8]
    assert spaced(3, 5).tolist() == [0, 1, 2]
    assert spaced(10**7, 3).tolist() == [0, 3333333, 6666666]


# Crops and filters.


def test_random_squares(tmp_path, generator):
    """Every place of a long image is cut, and the place is drawn for the whole batch."""
    wide = np.arange(20, dtype=np.uint8)[None, :, None].repeat(SIZE, 0).repeat(3, 2)
    Image.fromarray(wide).save(tmp_path / "a.png")
    Image.fromarray(wide.transpose(1, 0, 2)).save(tmp_path / "b.png")
    lazy = load(ImageFolder(tmp_path), Reading(SIZE, crop="random"), cache=2**20, progress=False)
    assert isinstance(lazy, LazyImages)
    indices = torch.tensor([0, 1] * 100)
    corners = lazy.draw_corners(200, generator)
    x0, _ = lazy.read(indices, None, corners)
    assert x0.shape == (200, 3, SIZE, SIZE)
    first = ((x0[:, 0, 0, 0] + 1) * 127.5).round()
    for image in (0, 1):
        assert set(first[indices == image].tolist()) == set(range(13))
    assert torch.equal(lazy.read(indices[150:], None, corners[150:])[0], x0[150:])
    middle = ((lazy.read(torch.tensor([0]))[0][0, 0, 0] + 1) * 127.5).round()
    assert middle.tolist() == list(range(6, 14))
    centred = load(ImageFolder(tmp_path), Reading(SIZE), cache=0, progress=False)
    assert centred.draw_corners(4, generator) is None
    assert torch.equal(centred.read(torch.tensor([0]))[0], lazy.read(torch.tensor([0]))[0])


def test_large_images_are_brought_to_size_before_they_are_cut(tmp_path):
    Image.new("RGB", (50, 20), "red").save(tmp_path / "a.png")
    lazy = lazily(tmp_path, reading=Reading(SIZE, crop="random"))
    (image,) = lazy.reader.images([0])
    assert image.shape == (SIZE, 20, 3)


def test_filters(tmp_path):
    """A box filter is the mean of the area; the others weigh it."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    source = ImageFolder(tmp_path)
    found = {
        name: read_all(source, Reading(SIZE, resize=name), progress=False).images[0]
        for name in ("bicubic", "box", "lanczos")
    }
    mean = pixels.reshape(8, 2, 8, 2, 3).mean((1, 3)).transpose(2, 0, 1)
    assert np.abs(found["box"].numpy() - mean).max() <= 1  # rows and columns are rounded
    assert torch.equal(found["bicubic"], read_all(source, Reading(SIZE), progress=False).images[0])
    assert not torch.equal(found["bicubic"], found["lanczos"])
    with pytest.raises(DataError, match="unknown resize 'nearest', wanted one of bicubic"):
        Reading(SIZE, resize="nearest")
    with pytest.raises(DataError, match="unknown crop"):
        Reading(SIZE, crop="left")


# Processes.


def test_another_process_takes_the_place_of_one_that_is_killed(pictures, caplog):
    lazy = lazily(pictures, workers=2)
    whole = lazily(pictures).read(torch.arange(30))[0]
    lazy.read(torch.arange(4))
    for process in list(lazy.reader.workers._idle):
        os.kill(process.process.pid, signal.SIGKILL)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(lazy.read(torch.arange(30))[0], whole)
    assert "ended by SIGKILL; another takes its place" in caplog.text


class Deadly(ImageFolder):
    """An image that the process that reads it does not survive."""

    def read(self, index: int, reading: Reading) -> tuple[np.ndarray, Depth | None]:
        if index == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(index, reading)


def test_images_that_kill_every_process_are_named(pictures):
    lazy = lazily(Deadly(pictures, progress=False), workers=2)
    with pytest.raises(DataError, match=r"3 processes in a row died .*07\.png.*ended by SIGKILL"):
        lazy.read(torch.tensor([7]))
    lazy.read(torch.tensor([8]))


SCRIPT = """
import fcntl, os, sys, time
from pathlib import Path
import torch
from fastdiff.data.image_file import Reading
from fastdiff.data.image_folder import ImageFolder
from fastdiff.data.image_reader import ImageReader
lock = open(sys.argv[2], "w")
fcntl.flock(lock, fcntl.LOCK_EX)
reader = ImageReader(ImageFolder(Path(sys.argv[1]), progress=False), Reading(8), workers=2)
reader.images([0, 1])
print(*[p.process.pid for p in reader.workers._idle], flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")
def test_processes_hold_no_lock_and_end_with_their_parent(pictures, tmp_path):
    import fcntl

    lock = tmp_path / "lock"
    parent = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(pictures), str(lock)], stdout=subprocess.PIPE, text=True
    )
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    with lock.open("w") as file:
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the processes do not hold it
    deadline = time.monotonic() + 30
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    parent.stdout.close()


def _runs(pid):
    """Whether a process exists and has not ended: one that has may wait for its parent's look."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_processes_end_with_their_images(pictures):
    lazy = lazily(pictures, workers=1)
    lazy.read(torch.tensor([0]))
    (process,) = lazy.reader.workers._idle
    pid = process.process.pid
    del lazy, process
    deadline = time.monotonic() + 30
    while _runs(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_file_opened_later_survives_what_was_inherited(pictures, tmp_path):
    """An object of the parent that closes its file in the child must not close another's."""
    source = ImageFolder(pictures, progress=False)
    held = [open(tmp_path / f"{i}", "w") for i in range(20)]  # noqa: SIM115
    images = reading_workers.ReadingWorkers(Closing(pictures, held), Reading(SIZE), 1)
    got = images.read([0, 1, 2]).result()
    assert [image[0].tolist() for image in got] == [
        source.read(i, Reading(SIZE))[0].tolist() for i in range(3)
    ]
    for file in held:
        file.close()


class Closing(ImageFolder):
    """Closes a file that the parent opened whenever an image is read, while another is open."""

    def __init__(self, root, held):
        super().__init__(root, progress=False)
        self.held = held

    def read(self, index: int, reading: Reading) -> tuple[np.ndarray, Depth | None]:
        with open(os.devnull) as opened:
            for file in self.held:
                file.close()
            os.fstat(opened.fileno())  # raises if its number was closed
            return super().read(index, reading)


def test_packed_names():
    names = [b"a", b"", "é".encode(), b"last"]
    packed = PackedNames(names)
    assert list(packed) == names
    assert [packed[i] for i in range(4)] == names
    assert packed.digest() == PackedNames(names).digest()
    assert packed.digest() != PackedNames([b"a", "é".encode(), b"", b"last"]).digest()
    with pytest.raises(IndexError):
        packed[4]
