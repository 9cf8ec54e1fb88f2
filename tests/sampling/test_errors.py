"""What the sampling loop refuses, and what it says."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fastdiff import sample, samplers, schedules
from fastdiff.common.inputs import check_generator
from fastdiff.samplers import DDIM
from fastdiff.sampling.arguments import check_mode, target

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEDULE = schedules.cosine(100)
SAMPLER = DDIM(SCHEDULE, 4)
SHAPE = (2, 3, 4, 4)
X = torch.zeros(SHAPE)
MASK = torch.ones(1, 1, 4, 4)
ROWS, OTHERS = {"y": torch.zeros(2, 5)}, {"y": torch.ones(2, 5)}
CASES = [
    ("no sampler", {"sampler": "ddim"}, TypeError, "sampler must be a Sampler or a Table, got str"),
    ("shape", {"shape": (4,)}, ValueError, r"shape must be \[N, C, ...\], got \(4,\)"),
    ("fractional shape", {"shape": (2, 1.5)}, TypeError, "must be a whole number, got 1.5"),
    ("dtype", {"dtype": torch.int32}, TypeError, "floating point, got torch.int32"),
    ("mode", {"mode": "fast"}, ValueError,
     "unknown mode 'fast', wanted one of auto, eager, compile, cudagraph"),
    ("CUDA graph of CPU images", {"mode": "cudagraph"}, ValueError,
     "mode 'cudagraph' needs images on a CUDA device, got cpu"),
    ("x_T of another shape", {"x_T": X[:1]}, ValueError,
     r"x_T must have shape \(2, 3, 4, 4\), got \(1, 3, 4, 4\)"),
    ("x_T of integers", {"x_T": X.long()}, TypeError,
     "x_T must be a floating point tensor, got torch.int64"),
    ("x_T that is none", {"x_T": [1.0]}, TypeError, "x_T must be a floating .* got list"),
    ("start beyond the last step", {"start": 4, "x_T": X}, ValueError,
     r"start must be one of the sampler's steps, 0..3, got 4"),
    ("negative start", {"start": -1, "x_T": X}, ValueError, "0..3, got -1"),
    ("fractional start", {"start": 0.5}, TypeError, "start must be a whole number, got 0.5"),
    ("start from nothing", {"start": 2}, ValueError, "start = 2 needs an image to noise, or x_T"),
    ("image for nothing", {"image": X}, ValueError, "an image needs a start above 0 .* or a mask"),
    ("image of another shape", {"image": X[:, :1], "start": 1}, ValueError,
     r"image must have shape \(2, 3, 4, 4\) or \(1, 3, 4, 4\), got \(2, 1, 4, 4\)"),
    ("image of bytes", {"image": X.byte(), "start": 1}, TypeError, "image must be .* torch.uint8"),
    ("mask without image", {"mask": MASK}, ValueError, "a mask needs an image"),
    ("mask of another size", {"mask": MASK[..., :2], "image": X}, ValueError,
     r"mask must have shape \[2 or 1, 3 or 1, 4, 4\], got \(1, 1, 4, 2\)"),
    ("mask without channels", {"mask": MASK[0], "image": X}, ValueError, r"got \(1, 4, 4\)"),
    ("mask with two channels", {"mask": MASK.repeat(1, 2, 1, 1), "image": X}, ValueError, "got"),
    ("mask for three images", {"mask": MASK.repeat(3, 1, 1, 1), "image": X}, ValueError, "got"),
    ("mask of integers", {"mask": MASK.long(), "image": X}, TypeError,
     "mask must be a bool or floating point tensor, got torch.int64"),
    ("mask beyond 1", {"mask": 255 * MASK, "image": X}, ValueError, r"mask must lie in \[0, 1\]"),
    ("mask of NaN", {"mask": torch.nan * MASK, "image": X}, ValueError, r"must lie in \[0, 1\]"),
    ("guidance without uncond", {"guidance": 3.0}, ValueError, "guidance 3.0 needs uncond"),
    ("guidance of one step without uncond", {"guidance": [1, 1, 2, 1]}, ValueError,
     "guidance 2.0 needs uncond"),
    ("rescale without uncond", {"guidance_rescale": 0.5}, ValueError, "rescale 0.5 needs uncond"),
    ("rescale", {"guidance_rescale": 2, "uncond": {}}, ValueError, r"lie in \[0, 1\], got 2"),
    ("guidance for three steps", {"guidance": [1.0] * 3}, ValueError,
     "one number, or 4, one for each step of the sampler, got 3"),
    ("guidance of text", {"guidance": "strong"}, TypeError, "guidance must be a number, or one"),
    ("guidance of NaN", {"guidance": float("nan")}, ValueError, "guidance must be finite, got nan"),
    ("uncond with other keys", {"uncond": OTHERS, "cond": {"z": X}, "guidance": 2.0}, ValueError,
     r"uncond must have the keys of cond, \['z'\], got \['y'\]"),
    ("uncond with other keys, unused", {"uncond": OTHERS}, ValueError, r"\[\], got \['y'\]"),
    ("uncond of another shape", {"uncond": {"y": torch.zeros(2, 4)}, "cond": ROWS, "guidance": 2},
     ValueError, r"with 2 rows, got shape \(2, 4\) and shape \(2, 5\)"),
    ("uncond without rows", {"uncond": {"y": torch.ones(3)}, "cond": {"y": torch.zeros(3)},
     "guidance": 2.0}, ValueError, r"uncond\['y'\] must be equal to cond\['y'\], or both"),
    ("uncond of another value", {"uncond": {"y": 1}, "cond": {"y": 2}, "guidance": 2}, ValueError,
     "got 1 and 2"),
    ("uncond None", {"uncond": {"y": None}, "cond": ROWS, "guidance": 2}, ValueError, "got None"),
    ("uncond built otherwise", {"uncond": {"y": [X]}, "cond": {"y": X}, "guidance": 2}, ValueError,
     r"uncond\['y'\] must be built like cond\['y'\]"),
    ("cond that is none", {"cond": [1]}, TypeError, "cond must be a mapping .* got list"),
    ("seed and generator", {"seed": 1, "generator": torch.Generator()}, ValueError,
     "seed and generator cannot both be given"),
    ("three seeds", {"seed": [1, 2, 3]}, ValueError,
     "one whole number, or 2, one an image, got 3"),
    ("fractional seed", {"seed": 1.5}, TypeError, "seed must be a whole number, got 1.5"),
    ("fractional seeds", {"seed": torch.zeros(2)}, TypeError, "whole number, got 0.0"),
    ("seed of 65 bits", {"seed": 2**64}, ValueError, r"\^64-1, got 18446744073709551616"),
    ("no generator", {"generator": 5}, TypeError, "generator must be a torch.Generator, got int"),
    ("max_batch 0", {"max_batch": 0}, ValueError, "max_batch must be at least 1, or None, got 0"),
    ("max_batch True", {"max_batch": True}, TypeError, "max_batch must be a whole number"),
    ("every 0", {"every": 0}, ValueError, "every must be at least 1, got 0"),
    ("callback", {"callback": 3}, TypeError, "callback must be a function, or None, got int"),
    ("preview", {"preview": "x"}, TypeError, "preview must be a function, or None, got str"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "error", "message"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_bad_arguments(options, error, message):
    def model(x, t, **cond):
        raise AssertionError("the model ran")

    arguments = {"sampler": SAMPLER, "shape": SHAPE, "progress": False, **options}
    before = torch.get_rng_state()
    with pytest.raises(error, match=message):
        sample(model, **arguments)
    assert torch.equal(torch.get_rng_state(), before)  # refused before anything is drawn


def test_a_table_that_needs_what_earlier_steps_keep():
    sampler = samplers.make("dpmpp-2m", SCHEDULE, 4)
    with pytest.raises(ValueError, match="steps from 2 on need what earlier steps keep"):
        sample(lambda x, t: x, sampler.table, SHAPE, x_T=X, start=2, progress=False)
    sample(lambda x, t: x, sampler, SHAPE, x_T=X, start=2, progress=False)


def test_outputs_under_guidance_are_named():
    with pytest.raises(ValueError, match=r"under guidance .* \(4, 3, 4, 4\), got \(2, 3, 4, 4\)"):
        sample(
            lambda x, t, y: x[:2], SAMPLER, SHAPE,
            cond=ROWS, uncond=OTHERS, guidance=2.0, progress=False,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("of_generator", "of_images", "fits"),
    [
        ("cpu", "cpu", True),
        ("cpu", "cuda:0", True),
        ("cuda:0", "cuda:0", True),
        ("cuda:0", "cpu", False),
        ("cuda:1", "cuda:0", False),
        ("mps", "cpu", False),
    ],
)
def test_generators_of_other_devices(of_generator, of_images, fits):
    """A generator of a device that is not here has nothing but its device."""
    generator = SimpleNamespace(device=torch.device(of_generator))
    arguments = (generator, torch.device(of_images))
    if fits:
        check_generator(*arguments)
        return
    text = f"images on {of_images} the generator must be .* got one on {of_generator}"
    with pytest.raises(ValueError, match=text):
        check_generator(*arguments)


def test_cuda_without_a_number_is_the_current_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    device = target(lambda x, t: x, SHAPE, "cuda", None, (None, None))[1]
    assert device == torch.device("cuda", 3)
    check_mode("cudagraph", device)


def test_what_is_not_said_is_that_of_the_noise_or_the_model_or_the_image():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2)).bfloat16()
    model.register_parameter("packed", torch.nn.Parameter(torch.zeros(1).int(), False))
    plain, x_T, image = (lambda x, t: x), X.double(), X.half()

    def dtype(model, *given):
        return target(model, SHAPE, None, None, given)[2]

    assert dtype(model, x_T, image) == torch.float64
    assert dtype(model, None, image) == torch.bfloat16
    assert dtype(plain, None, image) == torch.float16
    assert dtype(plain, None, None) == torch.float32
