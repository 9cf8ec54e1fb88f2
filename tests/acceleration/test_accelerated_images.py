"""Accelerated pipelines make the stock ones' images, and restored ones the same to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import small_pipelines as small
import torch
import unconditional
from torch import nn

import fastdiff

STEPS = 5
NEAR = 1e-4  # of images in [0, 1]

Images = dict[str, np.ndarray]


def unconditional_images(pipe: Any, **changes: Any) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    options = {"batch_size": 2, "num_inference_steps": STEPS, "output_type": "np", **changes}
    return pipe(generator=generator, **options).images


def photograph(seed: int) -> torch.Tensor:
    return torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def text_to_image(pipe: Any, **changes: Any) -> np.ndarray:
    return pipe(**small.arguments(STEPS, **changes)).images


def image_to_image(pipe: Any) -> np.ndarray:
    return text_to_image(pipe, image=photograph(1), strength=0.8)


def inpainting(pipe: Any) -> np.ndarray:
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1
    return text_to_image(
        pipe, image=photograph(1), mask_image=mask, height=16, width=16, strength=1.0
    )


def controlled(pipe: Any) -> np.ndarray:
    return text_to_image(pipe, image=photograph(2), controlnet_conditioning_scale=0.7)


def twice_controlled(pipe: Any) -> np.ndarray:
    return text_to_image(
        pipe, image=[photograph(2), photograph(3)], controlnet_conditioning_scale=[0.7, 0.3]
    )


def stable_diffusion_family() -> dict[str, tuple[Any, Callable[[Any], np.ndarray]]]:
    """Pipelines that share a U-Net and an autoencoder, and what is asked of each."""
    text = small.stable_diffusion()
    shared = text.components
    first, second = small.controlnet(), small.randomised(small.controlnet(), 9)

    def pipe(kind: Any, **more: Any) -> Any:
        return small.finished(kind(**shared, **more, requires_safety_checker=False))

    return {
        "text to image": (text, text_to_image),
        "image to image": (pipe(diffusers.StableDiffusionImg2ImgPipeline), image_to_image),
        "inpainting": (pipe(diffusers.StableDiffusionInpaintPipeline), inpainting),
        "ControlNet": (
            pipe(diffusers.StableDiffusionControlNetPipeline, controlnet=first), controlled,
        ),
        "two ControlNets": (
            pipe(diffusers.StableDiffusionControlNetPipeline, controlnet=[first, second]),
            twice_controlled,
        ),
    }  # fmt: skip


def other_pipelines() -> dict[str, tuple[Any, Callable[[Any], np.ndarray]]]:
    return {
        "DDPM": (unconditional.ddpm(), unconditional_images),
        "DDIM": (unconditional.ddim(), unconditional_images),
        "score SDE": (unconditional.score_sde_ve(), unconditional_images),
        "XL": (small.stable_diffusion_xl(), text_to_image),
    }


@pytest.fixture(scope="module")
def images() -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """By name of the pipeline: images before ``accelerate``, after it, and after ``restore``."""
    pipes = {**stable_diffusion_family(), **other_pipelines()}
    parts = {
        name: {key: value for key, value in pipe.components.items() if value is not None}
        for name, (pipe, _) in pipes.items()
    }
    before = {name: draw(pipe) for name, (pipe, draw) in pipes.items()}
    states = {id(m): dict(m.__dict__) for p in parts.values() for m in modules(p)}
    for pipe, _ in pipes.values():
        assert fastdiff.accelerate(pipe) is pipe
        assert type(pipe.scheduler).__module__.startswith("fastdiff.")
    during = {name: draw(pipe) for name, (pipe, draw) in pipes.items()}
    for pipe, _ in pipes.values():
        assert fastdiff.restore(pipe) is pipe
    after = {name: draw(pipe) for name, (pipe, draw) in pipes.items()}
    for name, (pipe, _) in pipes.items():
        for key, component in parts[name].items():
            assert getattr(pipe, key) is component, f"{name}: {key}"
    assert {id(m): dict(m.__dict__) for p in parts.values() for m in modules(p)} == states
    return {name: (before[name], during[name], after[name]) for name in pipes}


def modules(parts: dict[str, Any]) -> list[nn.Module]:
    """All modules within a pipeline's components."""
    return [m for part in parts.values() if isinstance(part, nn.Module) for m in part.modules()]


NAMES = (
    "text to image", "image to image", "inpainting", "ControlNet", "two ControlNets", "DDPM",
    "DDIM", "score SDE", "XL",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_images_are_those_of_the_stock_pipeline(images, name):
    before, during, _ = images[name]
    assert np.isfinite(before).all()
    assert before.std() > 0.02  # a picture, of which something can be told
    assert during.shape == before.shape
    assert np.abs(during - before).max() < NEAR
    assert not np.array_equal(during, before)  # something else has computed it


@pytest.mark.parametrize("name", NAMES)
def test_restored_to_the_last_bit(images, name):
    before, _, after = images[name]
    assert np.array_equal(after, before)
