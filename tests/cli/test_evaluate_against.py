"""fastdiff eval --against: generated images and files beside real ones."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_calls import TINY
from PIL import Image

from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.trained_model import Checkpoint
from fastdiff.cli import reference_options

QUICK = ("--steps", 2, "--threads", 1)


def write(root: Path, counts: dict[str, int], *, size: int = 8, seed: int = 0) -> Path:
    """Folders of random images in colour, each class of a colour of its own."""
    rng = np.random.default_rng(seed)
    for place, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 128, (size, size, 3))
            pixels[..., place % 3] += 127
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i:03}.png")
    return root


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("real") / "train", {"cat": 30, "dog": 15})


@pytest.fixture(scope="module")
def unseen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("real") / "test", {"cat": 8, "dog": 4}, seed=1)


def test_a_model_of_digits_beside_held_out_digits(run: Callable, digits_run: Path) -> None:
    words = ("eval", "--checkpoint", digits_run, "--against", "digits", "--samples", 400, *QUICK)
    ran = run(*words, "--json")
    assert ran.code == 0, ran.err
    facts = ran.json
    assert facts["checkpoint"] == str(checkpoint.newest(digits_run))
    assert (facts["against"], facts["held_out"], facts["labels"]) == ("digits",) * 2 + (
        "reference",
    )
    assert facts["features"] == "32 principal components of the reference"
    assert (facts["reference_images"], facts["held_out_images"]) == (1442, 355)
    assert (facts["samples"], facts["matched_size"]) == (400, 355)
    assert (facts["sampler"], facts["steps"], facts["evaluations"]) == ("ddim", 2, 2)
    assert facts["frechet"] > 3 * facts["frechet_real"]  # six steps teach nothing
    assert facts["coverage_real"] > 2 * facts["coverage_matched"]
    head, sizes, *rows, against, last = run(*words).out.splitlines()
    assert head.split() == ["generated", "generated", "held-out", "real"]
    assert sizes.split()[-3:] == ["400", "355", "355"]
    for row, name in zip(rows, ("frechet", "kid", "precision", "recall"), strict=False):
        wanted = [facts[name + end] for end in ("", "_matched", "_real")]
        assert [float(text) for text in row.split()[-3:]] == pytest.approx(wanted, rel=2e-3)
    assert against == "against 1442 images, in 32 principal components of the reference"
    assert last.startswith("400 images, ddim, 2 steps, 2 evaluations an image, seed 0, in ")


def test_a_model_of_a_folder(run: Callable, plain_run: Path, real: Path, unseen: Path) -> None:
    words = ("eval", "--checkpoint", plain_run, "--against", real, *QUICK, "--json")
    facts = run(*words, "--held-out", unseen).json
    assert facts["samples"] == facts["reference_images"] == 45  # as many as there are
    assert facts["labels"] is None
    assert (facts["held_out_images"], facts["matched_size"]) == (12, 12)
    assert facts["frechet_matched"] > facts["frechet_real"]
    alone = run(*words).json
    assert alone["frechet"] == facts["frechet"]
    assert alone["held_out"] is alone["frechet_real"] is None


def test_images_that_exist(run: Callable, real: Path, unseen: Path) -> None:
    words = ("eval", "--against", real, "--threads", 1)
    copied = run(*words, "--images", real, "--held-out", unseen, "--json").json
    assert "checkpoint" not in copied
    assert copied["image_size"] == 8
    assert copied["frechet"] == pytest.approx(0, abs=1e-6)
    assert copied["nearest_median"] == copied["nearest_min"] == copied["nearest_min_matched"] == 0
    assert copied["nearest_min_real"] > 1
    out = run(*words, "--images", unseen).out.splitlines()
    assert out[0].split() == ["images"]
    assert out[-1] == "against 45 images, in 32 principal components of the reference"


def test_images_that_do_not_fit_in_memory(run: Callable, real: Path, unseen: Path) -> None:
    words = ("eval", "--images", unseen, "--against", real, "--threads", 1, "--json", "--workers")
    kept = run(*words, 0).json
    for workers in (0, 1):
        read = run(*words, workers, "--cache", 0).json
        assert numbers(read) == numbers(kept)


def test_latents_are_no_images(run: Callable, tmp_path: Path, unseen: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((3, 8, 8), np.float32))
    ran = run("eval", "--images", unseen, "--against", tmp_path)
    assert ran.code == 2
    assert "holds latents, which are no images to compare" in ran.last


def test_classes_come_in_the_proportions_of_the_reference(
    run: Callable, tmp_path: Path, real: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    assert run("train", "--data", real, "--out", out, *TINY, "--steps", 1).code == 0
    asked: list[int] = []
    generate = Checkpoint.generate

    def watched(self: Checkpoint, *args: object, **options: object) -> object:
        asked.extend(options["labels"])  # type: ignore[call-overload]
        return generate(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Checkpoint, "generate", watched)
    words = ("eval", "--checkpoint", out, "--samples", 30, *QUICK, "--json", "--against")
    for labels, folder, counts in (
        (None, real, [20, 10]),
        ("balanced", real, [15, 15]),
        (None, write(tmp_path / "other", {"emu": 20, "fox": 20}), [15, 15]),
    ):
        asked.clear()
        chosen = () if labels is None else ("--labels", labels)
        assert run(*words, folder, *chosen).code == 0
        assert np.bincount(asked).tolist() == counts
    refused = run(*words, tmp_path / "other", "--labels", "reference")
    assert refused.code == 2
    assert "model's 2 classes (cat, dog), got 2 (emu, fox)" in refused.err


class Projection:
    """In the place of the network: 64 fixed directions, so that no weights are needed."""

    def __init__(self, path: Path, *, resize: str, device: object) -> None:
        self.description = f"{path.name}, {resize}"

    def __call__(self, pixels: torch.Tensor) -> np.ndarray:
        directions = np.random.default_rng(0).standard_normal((3 * 64, 64))
        return (pixels.expand(-1, 3, -1, -1).flatten(1).numpy() / 255 @ directions).astype("f4")


def numbers(facts: dict) -> dict:
    return {name: value for name, value in facts.items() if isinstance(value, (int, float))}


@pytest.fixture
def inception(monkeypatch: pytest.MonkeyPatch) -> tuple[object, ...]:
    monkeypatch.setattr(reference_options, "Inception", Projection)
    monkeypatch.setattr(reference_options, "FEATURES", 64)
    return ("--threads", 1, "--features", "inception:some/weights.pth")


def test_features_are_saved_and_read(
    run: Callable, tmp_path: Path, inception: tuple, real: Path, unseen: Path
) -> None:
    saved = tmp_path / "saved.npz"
    words = ("eval", "--images", unseen, *inception, "--json", "--against")
    ran = run(*words, real, "--save-features", saved)
    assert ran.code == 0, ran.err
    first = ran.json
    assert first["features"] == "weights.pth, tf"
    assert "a FID of 12 images is too large" in ran.err
    again = run(*words, saved).json
    assert (first["against"], again["against"]) == (str(real), str(saved))
    assert numbers(again) == pytest.approx(numbers(first), rel=1e-6)
    other = run(*words, saved, "--inception-resize", "clean")
    assert "saved.npz has weights.pth, tf, wanted weights.pth, clean" in other.last
    table = run(*(word for word in words if word != "--json"), saved).out.splitlines()
    assert [row.split()[0] for row in table[2:4]] == ["FID", "KID"]


def test_saved_features_keep_the_classes(
    run: Callable, tmp_path: Path, inception: tuple, real: Path
) -> None:
    saved, out = tmp_path / "saved.npz", tmp_path / "run"
    assert run("train", "--data", real, "--out", out, *TINY, "--steps", 1).code == 0
    words = ("eval", "--checkpoint", out, *inception, "--steps", 2, "--json", "--against")
    first = run(*words, real, "--save-features", saved).json
    again = run(*words, saved).json
    assert first["labels"] == again["labels"] == "reference"
    assert again["frechet"] == pytest.approx(first["frechet"], rel=1e-6)


def test_published_references(
    run: Callable, tmp_path: Path, inception: tuple, real: Path, unseen: Path
) -> None:
    """Statistics tell the FID alone; a batch of images is a reference like a folder of them."""
    words = ("eval", "--images", unseen, "--threads", 1, "--json", "--against")
    saved, batch = tmp_path / "saved.npz", tmp_path / "batch.npz"
    whole = run(*words, real, *inception, "--save-features", saved).json
    with np.load(saved) as arrays:
        np.savez(tmp_path / "statistics.npz", mu=arrays["mu"], sigma=arrays["sigma"])
        np.savez(tmp_path / "few.npz", mu=arrays["mu"][:9], sigma=arrays["sigma"][:9, :9])
    known = run(*words, tmp_path / "statistics.npz", *inception).json
    assert known["frechet"] == pytest.approx(whole["frechet"], rel=1e-6)
    assert known["reference_images"] is known["kid"] is known["nearest_min"] is None
    text = run(*(w for w in words if w != "--json"), tmp_path / "statistics.npz", *inception).out
    assert "against statistics, in weights.pth, tf" in text
    assert "precision" not in text
    np.savez(
        batch, np.stack([np.asarray(Image.open(file)) for file in sorted(real.rglob("*.png"))])
    )
    for chosen in (inception, ()):
        given, read = (run(*words, source, *chosen).json for source in (batch, real))
        assert numbers(given) == pytest.approx(numbers(read), rel=1e-6)
    np.savez(tmp_path / "large.npz", np.zeros((40, 9, 9, 3), np.uint8))
    for source, options, part in (
        ("statistics.npz", (), "holds features and no images: say --features inception:PATH"),
        ("few.npz", inception, "must have statistics of 64 features, got 9"),
        ("large.npz", (), "images of 3 channels, 9x9 pixels; wanted 3 channels, 8x8 pixels"),
        ("statistics.npz", (*inception, "--save-features", tmp_path / "b.npz"), "statistics alone"),
        ("batch.npz", (*inception, "--save-features", tmp_path / "b"), "must end in .npz"),
        ("batch.npz", ("--save-features", tmp_path / "b.npz"), "--features inception:PATH"),
        ("batch.npz", ("--inception-resize", "clean"), "--features inception:PATH"),
        ("batch.npz", ("--held-out", tmp_path / "statistics.npz"), "--held-out wants images"),
        ("batch.npz", ("--features", "clip"), "must be pca or inception:PATH, got 'clip'"),
    ):
        ran = run(*words, tmp_path / source, *options)
        assert ran.code == 2, source
        assert part in ran.last, source


def test_what_cannot_be_compared(
    run: Callable, tmp_path: Path, plain_run: Path, digits_run: Path, real: Path
) -> None:
    few = write(tmp_path / "few", {"cat": 20, "dog": 12})
    mixed = write(tmp_path / "mixed", {"cat": 3})
    shutil.copytree(write(tmp_path / "large", {"dog": 3}, size=9) / "dog", mixed / "dog")
    wide = tmp_path / "wide"
    wide.mkdir()
    Image.new("RGB", (8, 6)).save(wide / "a.png")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no image")
    model = ("--checkpoint", plain_run, *QUICK)
    for words, part in (
        ((*model, "--against", tmp_path / "none"), f"no {tmp_path / 'none'}"),
        ((*model, "--against", few), "the reference must have more than 32 images, got 32"),
        ((*model, "--against", real, "--samples", 5), "at least 6 images are wanted, there are 5"),
        ((*model, "--against", real, "--labels", "balanced"), "the model has no classes"),
        ((*model, "--against", real, "--bits", 2), "--bits is for the digits' own measures"),
        ((*model, "--held-out", real), "--held-out needs --against"),
        (("--images", real), "--images needs --against"),
        ((*model, "--features", "inception:a.pth"), "--features needs --against"),
        ((*model, "--images", real), "not allowed with argument"),
        (
            ("--images", mixed, "--against", real),
            "cat/000.png has 8x8 pixels, dog/000.png has 9x9 pixels",
        ),
        (("--images", wide, "--against", real), "a.png has 8x6 pixels"),
        (("--images", tmp_path / "broken", "--against", real), "can be read"),
        (("--images", tmp_path / "none", "--against", real), f"no {tmp_path / 'none'}"),
    ):
        ran = run("eval", *words)
        assert ran.code == 2, words
        assert ran.last.startswith("fastdiff: error: "), ran.err
        assert part in ran.last, words
