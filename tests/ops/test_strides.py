"""Every operation on inputs of any strides: values, and fakes that promise the same strides."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_as_accurate
from torch import Tensor

from fastdiff import ops

WIDE = torch.randn(2, 4, 6, 5)
LAST = WIDE.contiguous(memory_format=torch.channels_last)
INPUTS = {
    "height and width swapped": WIDE.transpose(2, 3),
    "images and channels swapped": WIDE.transpose(0, 1),
    "every other column": WIDE[..., ::2],
    "one image repeated": WIDE[:1].expand(3, -1, -1, -1),
    "one channel": WIDE[:, :1],
    "one pixel": WIDE[:, :, :1, :1],
    "channels-last, every other channel": LAST[:, ::2],
    "channels-last, without the first row": LAST[:, :, 1:],
    "channels-last, one channel": LAST[:, :1],
    "channels-last, reversed images": LAST[[1, 0]],
    "signals swapped": WIDE[0].transpose(0, 1),
    "volumes, channels-last": torch.randn(2, 4, 3, 5, 2).to(memory_format=torch.channels_last_3d),
}


def group_norm_silu(x: Tensor) -> list[Tensor]:
    return [ops.group_norm_silu(x, 1, residual=x)]


def add_time_embedding(x: Tensor) -> list[Tensor]:
    return [ops.add_time_embedding(x, x.flatten(2).amax(2))]


def q_sample(x: Tensor) -> list[Tensor]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    t = torch.arange(x.shape[0])
    return [ops.q_sample(x, t, x.flip(-1), *torch.linspace(0.2, 0.8, 20, dtype=wide).split(10))]


def q_sample_from_seed(x: Tensor) -> list[Tensor]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    t, seed = torch.arange(x.shape[0]), torch.arange(2 * x.shape[0]).view(-1, 2)
    tables = torch.linspace(0.2, 0.8, 20, dtype=wide).split(10)
    return [ops.q_sample_from_seed(x, t, seed, torch.tensor(3), *tables)]


def denoising_loss(x: Tensor) -> list[Tensor]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    t, tables = torch.arange(x.shape[0]), torch.linspace(0.2, 0.8, 30, dtype=wide).split(10)
    return [ops.denoising_loss(x, x.flip(-1), x.flip(1), t, *tables)]


def denoising_loss_backward(x: Tensor) -> list[Tensor]:
    leaf = x.detach().requires_grad_()
    return list(torch.autograd.grad(denoising_loss(leaf)[0].sum(), leaf))


def sampler_step(x: Tensor) -> list[Tensor]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    table = torch.linspace(-1, 1, 20, dtype=wide).expand(2, 20)
    out = torch.cat([x.flip(-1), x.flip(-2)], dim=1)
    history = torch.stack([x, x.flip(0)]).to(wide)
    return [ops.sampler_step(x, out, history, x.flip(1), table, torch.tensor(1))]


OPERATIONS = [
    group_norm_silu, add_time_embedding, q_sample, q_sample_from_seed, denoising_loss,
    denoising_loss_backward, sampler_step,
]  # fmt: skip


@pytest.mark.parametrize("x", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda f: f.__name__)
def test_values(operation, x) -> None:
    assert_as_accurate(operation, x)


@pytest.mark.parametrize("x", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda f: f.__name__)
def test_fakes_have_the_strides_of_the_kernel(operation, x) -> None:
    """The compiler plans memory by what the fake says."""
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        (fake,) = operation(mode.from_tensor(x))
    (real,) = operation(x)
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
