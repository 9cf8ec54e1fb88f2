"""Pipelines whose weights are float16 or bfloat16, on a CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import small_pipelines as small
import torch
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

import fastdiff
from fastdiff.acceleration import report

STEPS = 5


def images(pipe: Any, **changes: Any) -> np.ndarray:
    return pipe(**small.arguments(STEPS, **changes)).images


def many_images(pipe: Any) -> np.ndarray:
    return np.stack([images(pipe, seed=seed) for seed in range(12)])


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.square(x).mean()))


def made(make: Any = small.stable_diffusion, dtype: torch.dtype = torch.float32) -> Any:
    """A pipeline with the same weights at each call, but for the dtype."""
    torch.manual_seed(0)
    return make().to(dtype=dtype)


@pytest.mark.parametrize("make", [small.stable_diffusion, small.stable_diffusion_xl])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float16, 5e-3), (torch.bfloat16, 0.05)], ids=["fp16", "bf16"]
)
def test_near_float32(make, dtype, bound):
    """Many calls: in float16, XL's pipeline converts the autoencoder to float32 for each of them.

    The error of a single image is up to 1.3 times eager mode's, or 0.7 times, by chance.
    """
    expected = many_images(made(make))
    pipe = made(make, dtype)
    eager = many_images(pipe)
    before = {name: x.clone() for name, x in pipe.unet.state_dict().items()}
    fastdiff.accelerate(pipe)
    found = many_images(pipe)
    assert np.array_equal(many_images(pipe), found)
    assert np.abs(found - expected).max() < bound
    assert rms(found - expected) <= 1.1 * rms(eager - expected)
    assert pipe.unet.dtype == pipe.text_encoder.dtype == pipe.vae.dtype == dtype
    fastdiff.restore(pipe)
    assert np.array_equal(many_images(pipe), eager)
    for name, x in pipe.unet.state_dict().items():
        assert torch.equal(x, before[name])


def test_report_says_what_is_computed_in_what():
    pipe = made(dtype=torch.float16)
    fastdiff.accelerate(pipe)
    found = {row.component: row.done for row in report(pipe).rows}
    for name in ("unet", "vae.decoder", "vae.encoder", "text_encoder"):
        assert found[name] == "compiled, computes in float32 (weights in float16)"
    fastdiff.accelerate(pipe, precision="bf16")
    found = {row.component: row.done for row in report(pipe).rows}
    assert found["unet"] == "compiled, computes in bfloat16 (weights in float16)"
    assert found["text_encoder"] == "compiled, computes in float32 (weights in float16)"
    fastdiff.restore(pipe)


def overflowing(pipe: Any) -> Any:
    """The pipeline with a decoder whose activations are beyond float16, and whose images are not.

    A residual block's last convolution is scaled up and the layers that read the sum are norms.
    """
    block = pipe.vae.decoder.mid_block.resnets[0].conv2
    with torch.no_grad():
        block.weight.mul_(3e5)
    return pipe


def test_no_black_images():
    expected = images(overflowing(made()))
    pipe = overflowing(made(dtype=torch.float16))
    assert np.isfinite(pipe.vae.decoder.mid_block.resnets[0].conv2.weight.detach().numpy()).all()
    with np.errstate(invalid="ignore"):
        assert not np.isfinite(images(pipe)).all()  # float16, as PyTorch computes it
    fastdiff.accelerate(pipe)
    found = images(pipe)
    assert np.abs(found - expected).max() < 2e-2
    fastdiff.restore(pipe)


VISION: dict[str, int] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 8, "projection_dim": 16,
}  # fmt: skip


def checker() -> StableDiffusionSafetyChecker:
    return small.randomised(StableDiffusionSafetyChecker(CLIPConfig(vision_config=VISION)))


def image_encoder() -> CLIPVisionModelWithProjection:
    return small.randomised(CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION)))


@pytest.mark.parametrize(
    ("name", "make", "part"),
    [
        ("safety_checker", checker, "vision_model"),
        ("image_encoder", image_encoder, ""),
        ("text_encoder", small.text_encoder, ""),
    ],
)
@torch.no_grad()
def test_encoders(name, make, part):
    """In float16 they are compiled, and at least as near to float32 as PyTorch's own."""
    model = make()
    inner = model.get_submodule(part)
    x = torch.randn(2, 3, 16, 16) if name != "text_encoder" else torch.randint(2, 20, (2, 16))
    expected = inner(x)[0]
    pipe = small.stable_diffusion(feature_extractor=CLIPImageProcessor(), **{name: model})
    pipe.to(dtype=torch.float16)
    x = x.half() if x.is_floating_point() else x
    eager = inner(x)[0]
    fastdiff.accelerate(pipe)
    assert inner._compiled_call_impl is not None
    found = inner(x)[0]
    assert found.dtype == torch.float16
    near = (found - expected).square().mean().sqrt()
    assert near <= 1.1 * (eager - expected).square().mean().sqrt()
    assert near < 2e-3
    if name == "safety_checker":  # as the pipeline calls it: images of float numbers, on the host
        _, flags = model(clip_input=x, images=np.zeros((2, 16, 16, 3)))
        assert len(flags) == 2
    fastdiff.restore(pipe)
    assert torch.equal(inner(x)[0], eager)


def test_precisions():
    """A second and a third call set others."""
    expected = images(made())
    pipe = fastdiff.accelerate(made())
    assert np.abs(images(pipe) - expected).max() < 1e-4
    fastdiff.accelerate(pipe, precision="bf16")
    assert 1e-3 < np.abs(images(pipe) - expected).max() < 0.05
    fastdiff.accelerate(pipe, precision="strict")
    assert np.abs(images(pipe) - expected).max() < 1e-4
    fastdiff.restore(pipe)
