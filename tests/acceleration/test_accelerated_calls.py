"""One accelerated pipeline, called with many sizes and options, makes the stock one's images."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import diffusers
import numpy as np
import pytest
import small_pipelines as small
import torch

import fastdiff
from fastdiff.compiler import pipeline
from fastdiff.compiler.report import GraphReport

NEAR = 1e-4  # of images in [0, 1]
SIZES = [(16, 32), (24, 16), (40, 24), (32, 32), (8, 48), (64, 8), (16, 16)]


@pytest.fixture(scope="module")
def graphs() -> Iterator[list[GraphReport]]:
    """The reports of the graphs that have been compiled, in order."""
    reports: list[GraphReport] = []
    compile_and_report = pipeline.compile_and_report

    def noted(*arguments: Any) -> Any:
        compiled, report = compile_and_report(*arguments)
        reports.append(report)
        return compiled, report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "compile_and_report", noted)
        yield reports


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Any, Any]]:
    """The same pipeline twice, stock and accelerated."""
    stock = small.stable_diffusion()
    ours = copy.deepcopy(stock)
    yield stock, fastdiff.accelerate(ours)
    fastdiff.restore(ours)


def assert_same_images(pair: tuple[Any, Any], **changes: Any) -> np.ndarray:
    stock, ours = (pipe(**small.arguments(**changes)).images for pipe in pair)
    assert stock.shape == ours.shape
    assert np.abs(stock - ours).max() < NEAR
    return stock


def test_sizes(pair, graphs):
    """Every graph is on the fast path, and there are few for many sizes."""
    assert_same_images(pair, height=16, width=16)
    assert len(graphs) == 2  # of the U-Net and of the decoder
    for height, width in SIZES:
        images = assert_same_images(pair, height=height, width=width)
        assert images.shape == (1, height, width, 3)
    for report in graphs:
        assert report.reason is None
        assert len(report.emitted) > 10
    # One for the first size, one as each of height and width is seen to change, and few for what
    # PyTorch's convolutions distinguish by size.
    assert len(graphs) <= 8


def test_batches(pair):
    assert_same_images(pair, num_images_per_prompt=3)
    assert_same_images(pair, prompt=["a", "b c"], num_images_per_prompt=2)
    assert_same_images(pair, guidance_scale=1.0)  # one evaluation without the empty prompt


def test_a_generator_for_each_image(pair):
    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in (3, 4)]

    stock, ours = (
        pipe(**small.arguments(prompt=["a", "b"], generator=generators())).images for pipe in pair
    )
    assert np.abs(stock - ours).max() < NEAR
    assert np.abs(stock[0] - stock[1]).max() > 0.01


def test_lengths_of_the_prompt(pair):
    for length in (16, 5, 77, 154):
        states = torch.randn(1, length, small.WIDTH, generator=torch.Generator().manual_seed(5))
        assert_same_images(
            pair, prompt=None, prompt_embeds=states, negative_prompt_embeds=torch.zeros_like(states)
        )


def test_eta(pair):
    assert_same_images(pair, eta=0.7, steps=4)


def test_guidance_rescaled_and_cut_short(pair):
    assert_same_images(pair, guidance_rescale=0.5, steps=4)


def test_callbacks(pair):
    """A callback reads the stock pipeline's latents, and what it writes is used."""
    seen: list[tuple[int, torch.Tensor]] = []

    def halve(pipe: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, values["latents"].clone()))
        return {"latents": values["latents"] * 0.5} if step == 1 else values

    assert_same_images(
        pair, steps=3, callback_on_step_end=halve,
        callback_on_step_end_tensor_inputs=["latents"],
    )  # fmt: skip
    assert [step for step, _ in seen] == [0, 1, 2] * 2
    for (_, stock), (_, ours) in zip(seen[:3], seen[3:], strict=True):
        assert (stock - ours).abs().max() < 1e-3


SWITCHES = {
    "attention slicing": (
        lambda pipe: pipe.enable_attention_slicing(),
        lambda pipe: pipe.disable_attention_slicing(),
    ),
    "slicing": (lambda pipe: pipe.vae.enable_slicing(), lambda pipe: pipe.vae.disable_slicing()),
    "tiling": (lambda pipe: pipe.vae.enable_tiling(), lambda pipe: pipe.vae.disable_tiling()),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_switches(pair, name):
    changes = {"prompt": ["a", "b"], "height": 32, "width": 40}
    on, off = SWITCHES[name]
    try:
        for pipe in pair:
            on(pipe)
        switched = assert_same_images(pair, **changes)
    finally:
        for pipe in pair:
            off(pipe)
    plain = assert_same_images(pair, **changes)
    # Tiles are blended, so that the switch shows in the image; slices are the same image.
    assert (np.abs(switched - plain).max() > 1e-3) == (name == "tiling")


AUTOENCODERS = {
    "AutoencoderKL": small.autoencoder,
    "AutoencoderTiny": lambda: diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
    ),
    "VQModel": lambda: diffusers.VQModel(
        block_out_channels=(8, 16), norm_num_groups=4, num_vq_embeddings=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", AUTOENCODERS)
@torch.no_grad()
def test_autoencoders(name):
    stock = small.randomised(AUTOENCODERS[name]())
    ours = fastdiff.accelerate(copy.deepcopy(stock))
    x = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    coded = [vae.encode(x, return_dict=False)[0] for vae in (stock, ours)]
    latents = [z.mode() if name == "AutoencoderKL" else z for z in coded]
    decoded = [vae.decode(latents[0], return_dict=False)[0] for vae in (stock, ours)]
    for a, b in (latents, decoded):
        assert (a - b).abs().max() < NEAR * a.abs().max()
        assert not torch.equal(a, b)
