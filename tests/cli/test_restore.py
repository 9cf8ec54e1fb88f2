"""fastdiff restore: images of which a part, the grey or a small version is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cli_calls import TINY, call
from PIL import Image

TILE = 64 + 4  # pixels from one image to the next in the picture, whose images of 8 are enlarged


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model of 8x8 images in colour, and one of them."""
    folder = tmp_path_factory.mktemp("colours")
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    for i in range(4):
        pixels = rng.integers(60, 196, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
    words = ("train", "--data", folder / "images", "--out", folder / "run", *TINY, "--steps", 1)
    assert call(*words) == 0
    return folder / "run", folder / "images" / "0.png"


def tiles(picture: Path, columns: int) -> np.ndarray:
    """The images of the picture's first row, int [columns, 8, 8, 3]."""
    pixels = np.asarray(Image.open(picture)).astype(int)
    return np.stack([pixels[4:TILE:8, 4 + i * TILE : (i + 1) * TILE : 8] for i in range(columns)])


def words(model: Path, out: Path, task: str, *files: Path) -> tuple[object, ...]:
    common = ("--checkpoint", model, "--out", out, "--threads", 1, "--count", 2, "--json")
    return ("restore", task, *files, *common)


@pytest.mark.parametrize(
    ("method", "options"),
    [("repaint", ("--steps", 4, "--method-option", "jump_length=2")), ("known", ("--steps", 3))],
)
def test_the_known_pixels_stay(run: Callable, colours, tmp_path, method, options) -> None:
    model, file = colours
    out, mask = tmp_path / "out.png", tmp_path / "mask.png"
    pixels = np.zeros((8, 8), np.uint8)
    pixels[2:5, 3:] = 255
    Image.fromarray(pixels).save(mask)
    call_ = words(model, out, "inpaint", file)
    facts = run(*call_, "--method", method, *options, "--mask", mask).json
    given, shown, *restored = tiles(out, 4)
    assert facts["misfit"] < 1e-6
    assert np.array_equal(given, np.asarray(Image.open(file)))
    assert np.array_equal(shown[pixels == 0], given[pixels == 0])
    assert (shown[pixels > 0] == 128).all()
    for image in restored:
        assert np.array_equal(image[pixels == 0], given[pixels == 0])
        assert not np.array_equal(image[pixels > 0], given[pixels > 0])
    again = tmp_path / "again.png"
    box = run(*words(model, again, "inpaint", file), "--method", method, *options,
              "--mask", "3,2,8,5")  # fmt: skip
    assert box.code == 0
    assert Image.open(again).tobytes() == Image.open(out).tobytes()


@pytest.mark.parametrize("method", ["pseudoinverse", "dps"])
@pytest.mark.parametrize("task", ["inpaint", "colorize", "upscale"])
def test_gradients_bring_images_to_what_is_known(run, colours, tmp_path, task, method) -> None:
    model, file = colours
    extra = {"inpaint": ("--mask", "0,0,4,8"), "colorize": (), "upscale": ("--factor", 2)}[task]
    call_ = (*words(model, tmp_path / "out.png", task, file, file), *extra, "--method", method)
    misfits = [
        run(*call_, "--steps", 8, "--method-option", f"scale={scale}").json["misfit"]
        for scale in (0, 1)
    ]
    assert misfits[1] < 0.8 * misfits[0]


def test_grey_and_small_files_are_what_is_known(run: Callable, colours, tmp_path) -> None:
    model, file = colours
    image, out = Image.open(file), tmp_path / "out.png"
    image.convert("L").save(tmp_path / "grey.png")
    call_ = words(model, out, "colorize", tmp_path / "grey.png")
    assert run(*call_, "--method", "known", "--steps", 2).json["misfit"] < 1e-6
    given, shown, *restored = tiles(out, 4)
    assert np.abs(shown - given).max() == 0
    assert np.abs(np.stack(restored) - given).max() > 10  # it has colours
    small = image.resize((4, 4), Image.Resampling.BOX)
    small.save(tmp_path / "small.png")
    for name in ("small.png", file):
        found = run(*words(model, out, "upscale", tmp_path / name), "--factor", 2, "--steps", 2)
        assert found.code == 0
        assert np.array_equal(tiles(out, 2)[1, ::2, ::2], np.asarray(small))


def test_what_does_not_fit(run: Callable, colours, tmp_path: Path) -> None:
    model, file = colours
    Image.new("L", (9, 7)).save(tmp_path / "mask.png")
    inpaint, out = words(model, tmp_path / "out.png", "inpaint", file), tmp_path / "out.png"

    def refused(*given: object) -> str:
        found = run(*given)
        assert found.code == 2, found.out
        return found.last

    assert "needs --mask" in refused(*inpaint)
    assert "9x7 pixels, but" in refused(*inpaint, "--mask", tmp_path / "mask.png")
    assert "lie in 0..8" in refused(*inpaint, "--mask", "0,0,9,2")
    assert "image file or left,top" in refused(*inpaint, "--mask", tmp_path / "none.png")
    assert "nothing that is known" in refused(*inpaint, "--mask", "0,0,8,8")
    Image.new("L", (8, 8)).save(tmp_path / "black.png")
    assert "nothing to paint" in refused(*inpaint, "--mask", tmp_path / "black.png")
    colorize = words(model, out, "colorize", file)
    assert "--mask is for inpaint" in refused(*colorize, "--mask", "0,0,1,1")
    assert "repaint is for inpaint" in refused(*colorize, "--method", "repaint")
    upscale = words(model, out, "upscale", file)
    assert "divide 8, got 3" in refused(*upscale, "--factor", 3)
    assert "known is for inpaint and colorize" in refused(*upscale, "--method", "known")
    assert "needs a sampler with timesteps" in refused(*upscale, "--sampler", "ode")
    assert "keeps values between" in refused(*upscale, "--method", "dps", "--sampler", "dpmpp-2m")
    assert "unexpected keyword" in refused(*upscale, "--method-option", "power=2")
    assert "there is no image" in refused(*words(model, out, "colorize", tmp_path / "no.png"))
    assert "unconditional" in refused(*colorize, "--class", 1)
    assert not out.exists()


def test_models_of_digits_need_a_class_and_have_no_colours(run, tmp_path) -> None:
    Image.new("L", (16, 16)).save(tmp_path / "a.png")
    call_ = words(Path("digits"), tmp_path / "out.png", "colorize", tmp_path / "a.png")
    assert "3 channels" in run(*call_).last
    call_ = words(Path("digits"), tmp_path / "out.png", "inpaint", tmp_path / "a.png")
    assert "say --class" in run(*call_, "--mask", "0,0,8,8").last
    found = run(*call_, "--mask", "0,0,8,8", "--class", 3, "--method", "repaint", "--steps", 2)
    assert found.json["class"] == 3
