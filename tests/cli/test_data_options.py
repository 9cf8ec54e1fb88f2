"""What ``--data`` takes, and the options of how it is read."""

from __future__ import annotations

import argparse
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cli_calls import TINY

from fastdiff.checkpoints import checkpoint
from fastdiff.cli.data_options import byte_count, is_gone, settled


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_numbers_of_bytes() -> None:
    texts = ("0", "1000", "2K", "2k", "1.5M", "2G", "2GB", "2GiB", "1T")
    wanted = [0, 1000, 2048, 2048, 3 * 2**19, 2**31, 2**31, 2**31, 2**40]
    assert [byte_count(text) for text in texts] == wanted
    for text in ("", "G", "two", "-1", "nan", "inf", "1X", "1e30"):
        with pytest.raises(argparse.ArgumentTypeError, match="such as 2G"):
            byte_count(text)


def test_paths_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert settled("pictures") == str(tmp_path / "pictures")
    assert settled("{0..3}.tar") == str(tmp_path / "{0..3}.tar")
    assert settled("digits") == "digits"
    assert settled("hf:name:train") == "hf:name:train"
    assert is_gone(settled("pictures"))
    assert not any(map(is_gone, (str(tmp_path), "digits", "hf:name", settled("{0..3}.tar"))))


def test_tar_shards_that_do_not_fit_in_memory(
    run: Callable, pictures: Path, tmp_path: Path
) -> None:
    """Begun with images read while training, resumed with all of them in memory."""
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        archive.add(pictures, arcname="")
    out = tmp_path / "run"
    words = ("--data", tmp_path / "{0..0}.tar", "--out", out, "--cache", "1K", "--workers", 1)
    ran = run("train", *TINY, *words, "--flip", "--steps", 2)
    assert ran.code == 0, ran.err
    assert "8 images of 3x8x8, 2 classes" in ran.err
    assert checkpoint.load(out).classes == ("cat", "dog")
    resume = ("train", "--out", out, "--resume", "--steps", 3)
    assert run(*resume, "--cache", "1G", "--workers", 0).code == 0
    ran = run(*resume, "--crop", "random")
    assert ran.code == 2
    assert "cannot change --crop: it has center, got random" in ran.last


def test_latents(run: Callable, tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / "latents").mkdir(exist_ok=True)
        np.save(tmp_path / "latents" / f"{i}.npy", np.full((4, 8, 8), i, np.float16))
    words = ("train", *TINY, "--data", tmp_path / "latents", "--out", tmp_path / "run")
    ran = run(*words, "--steps", 1, "--latent-scale", 0.5)
    assert ran.code == 0, ran.err
    assert "3 images of 4x8x8, unconditional" in ran.err
    assert checkpoint.load(tmp_path / "run").channels == 4
    ran = run(*words[:-1], tmp_path / "other", "--steps", 1, "--grayscale")
    assert ran.code == 2
    assert "holds latents; grayscale is for images" in ran.last


def test_files_of_mnist_and_what_is_not_there(run: Callable, tmp_path: Path) -> None:
    head = bytes((0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 8, 0, 0, 0, 8))
    (tmp_path / "train-images-idx3-ubyte").write_bytes(head + bytes(128))
    words = ("train", *TINY, "--out", tmp_path / "run", "--steps", 1, "--data")
    ran = run(*words, tmp_path)
    assert ran.code == 0, ran.err
    assert "2 images of 1x8x8, unconditional" in ran.err
    words = ("train", *TINY, "--out", tmp_path / "other", "--steps", 1, "--data")
    ran = run(*words, tmp_path, "--split", "test")
    assert ran.code == 2
    assert "wanted one file of the images of test" in ran.last
    ran = run(*words, tmp_path, "--label-dropout", 0.1)
    assert "label_dropout hides labels, but the data has none" in ran.last
