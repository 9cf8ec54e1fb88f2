"""How long a training step waits for images that are read and decoded while the model trains.

Images of CIFAR-10's size, as PNG files, in tar shards and in parquet files, none of them kept in
memory: every image is read again each time. The model is small, so a step is short. The peer is the
same step on images in memory; ``waits`` is the share of the time in which the trainer waited, and
``decoding`` the time that one process needs for an image. With --benchmark-disable there are few
images and the network is tiny. Parquet files need the package ``datasets``.
"""

from __future__ import annotations

import io
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff import schedules
from fastdiff.data import open_images
from fastdiff.nn.image_unet import make_unet
from fastdiff.training.trainer import Trainer, TrainingOptions

SIZE, BATCH = 32, 64
TINY = {"widths": (8, 16), "attention": (1,), "layers_per_block": 1}
WORKERS = 2


def png(rng: np.random.Generator) -> bytes:
    """A PNG file of a smooth image with some noise, which compresses about as photographs do."""
    small = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(small).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    noisy = (smooth + rng.normal(0, 4, smooth.shape)).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noisy).save(file, "PNG")
    return file.getvalue()


def write_files(root: Path, files: list[bytes]) -> Path:
    for i, content in enumerate(files):
        (root / f"{i:05d}.png").write_bytes(content)
    return root


def write_tar(root: Path, files: list[bytes]) -> Path:
    with tarfile.open(root / "0.tar", "w") as archive:
        for i, content in enumerate(files):
            member = tarfile.TarInfo(f"{i:05d}.png")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return root


def write_parquet(root: Path, files: list[bytes]) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    table = datasets.Dataset.from_dict({"image": files})
    table.to_parquet(str(root / "0.parquet"))
    return root


@pytest.mark.parametrize(
    "write", [write_files, write_tar, write_parquet], ids=lambda f: f.__name__[6:]
)
def bench_waiting(versus, write, tmp_path, monkeypatch, request) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    few = request.config.getoption("benchmark_disable")
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    root = write(tmp_path / "images", [png(rng) for _ in range(BATCH if few else 4096)])
    options = TrainingOptions(batch_size=8 if few else BATCH, steps=10**6)

    def trainer(cache: int) -> Trainer:
        images = open_images(root, SIZE, cache=cache, workers=WORKERS, progress=False)
        torch.manual_seed(0)
        model = make_unet(SIZE, 3, 0, **(TINY if few else {}))
        return Trainer(model, schedules.cosine(), images, options, prediction="v")

    lazy, whole = trainer(0), trainer(2**30)
    assert lazy.step() == whole.step()
    waited: list[float] = []

    def step() -> None:
        start = time.perf_counter()
        lazy.step()
        waited.append(lazy.micro_batches.waited / (time.perf_counter() - start))

    source, reading = lazy.data.reader.source, lazy.data.reader.reading
    start = time.perf_counter()
    for i in range(len(source)):
        source.read(i, reading)
    each = (time.perf_counter() - start) / len(source)
    versus(
        step,
        {"in memory": whole.step},
        seconds=20,
        notes=lambda comparison: {
            "waits": f"{100 * sum(waited) / len(waited):.2f}%",
            "decoding": f"{1e6 * each:.0f} us",
        },
    )
