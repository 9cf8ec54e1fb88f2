"""PyTorch's modes and defaults, a user's to set: results and caches do not depend on them."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from fastdiff import losses, nn, ops, schedules
from fastdiff.ops import selfcheck
from fastdiff.ops.weights_state import _sample

EMBEDDINGS = {
    "positional": {},
    "fourier": {"time_embedding_type": "fourier"},
    "learned": {"time_embedding_type": "learned", "num_train_timesteps": 100},
}


@contextmanager
def default_device(name):
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS = {
    "another device": lambda: default_device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
}


@pytest.fixture(params=DEFAULTS.values(), ids=DEFAULTS)
def changed(request):
    """A context in which PyTorch's default device or dtype is not what one expects."""
    return request.param


def images(*shape):
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(*shape, generator=generator, device="cpu", dtype=torch.float32)


@pytest.fixture
def step(tiny_unet):
    """A function that takes a training step's gradient, all whose inputs were made before."""
    schedule, model = schedules.cosine(100), tiny_unet()
    x0, noise, t = images(2, 1, 8, 8), images(2, 1, 8, 8) * 2, torch.tensor([3, 60])

    def run(kind="v"):
        model.zero_grad()
        loss = losses.simple_loss(schedule, model, x0, t, noise, kind=kind).mean()
        loss.backward()
        return loss.detach(), [weight.grad for weight in model.parameters()]

    return run


def test_every_operation_under_other_defaults(changed):
    with changed():
        records = selfcheck.run()
        assert [(r.operation, r.reason) for r in records if not r.ok] == []
        assert len(_sample(images(3, 2))) == 3 * images(1).element_size()  # without the extension


@pytest.mark.parametrize("options", EMBEDDINGS.values(), ids=EMBEDDINGS)
@pytest.mark.parametrize("timestep", [7, torch.tensor([7, 9])], ids=["number", "tensor"])
def test_the_unet_under_other_defaults(changed, options, timestep):
    size = {"in_channels": 1, "out_channels": 1, "block_out_channels": (8, 16)}
    kinds = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    model = nn.UNet2DModel(**size, **kinds, norm_num_groups=4, attention_head_dim=8, **options)
    model, x = model.eval(), images(2, 1, 8, 8)
    expected = model(x, timestep)
    with changed():
        torch.testing.assert_close(model(x, timestep), expected, rtol=0, atol=0)
        precomputed = model.precompute(torch.tensor([7], device="cpu")).at(0)
    assert precomputed.device.type == "cpu"
    assert precomputed.dtype == torch.float32


def test_a_training_step_under_other_defaults(changed, step):
    with changed():
        found = step()
    torch.testing.assert_close(found, step(), rtol=0, atol=0)
    assert {g.device.type for g in found[1]} == {"cpu"}


@pytest.mark.parametrize("kind", ["eps", "x0", "v", "score", "flow"])
def test_what_inference_has_made_serves_training(step, kind):
    with torch.inference_mode():
        x0 = images(1, 1, 8, 8)
        ops.q_sample(x0, torch.tensor([0]), x0, torch.ones(1), torch.ones(1))
        with pytest.raises(RuntimeError, match="does not require grad"):
            step(kind)
    loss, gradients = step(kind)
    assert bool(loss.isfinite())
    assert all(gradient is not None for gradient in gradients)


def test_training_with_images_that_want_a_gradient_after_inference(tiny_unet):
    """Then the tables of the schedule are saved for the backward pass."""
    schedule, x0 = schedules.cosine(100), images(2, 1, 8, 8)
    arguments = tiny_unet(), x0, torch.tensor([3, 60]), images(2, 1, 8, 8)
    with torch.inference_mode():
        losses.simple_loss(schedule, *arguments)
    x0.requires_grad_()
    losses.simple_loss(schedule, *arguments).sum().backward()
    assert x0.grad is not None
