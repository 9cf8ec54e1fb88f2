from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from unet_cases import CASES, CIFAR, TINY, inputs, randomized

import fastdiff
from fastdiff import ops
from fastdiff.nn import GroupNormSiLU, UNet2DModel


def make(name_or_options, seed=0):
    options = CASES[name_or_options] if isinstance(name_or_options, str) else name_or_options
    return randomized(UNet2DModel(**options), seed).eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", [float, np.float64, np.float32, np.float16])
def test_float_timestep_keeps_its_fraction(kind):
    model, (sample, _, _) = make("tiny"), inputs(TINY)
    got = model(sample, kind(9.75))
    torch.testing.assert_close(got, model(sample, torch.tensor([9.75])), rtol=0, atol=0)
    assert not torch.allclose(got, model(sample, 9), atol=1e-3)


@pytest.mark.parametrize("name", ["tiny", "scale-shift", "no-middle-attention"])
def test_every_norm_is_the_fused_operation(name, monkeypatch):
    calls, original = [], ops.group_norm_silu
    monkeypatch.setattr(
        ops, "group_norm_silu", lambda *a, **k: calls.append(k["silu"]) or original(*a, **k)
    )
    model = make(name)
    model(*inputs(CASES[name]))
    norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
    assert all(isinstance(norm, GroupNormSiLU) for norm in norms)
    assert len(calls) == len(norms)
    assert calls.count(False) == sum(not norm.silu for norm in norms)


@pytest.mark.parametrize("name", ["cifar", "scale-shift"])
def test_reference_backend_gives_the_same(name):
    model, arguments = make(name), inputs(CASES[name])
    found = []
    for backend in ("auto", "reference"):
        with fastdiff.backend(backend):
            out = model(*arguments)
            found.append([out, *torch.autograd.grad(out.square().mean(), model.parameters())])
    for auto, reference in zip(*found, strict=True):
        torch.testing.assert_close(auto, reference, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["tiny", "classes", "scale-shift", "fourier"])
def test_empty_batch(name):
    model, (sample, t, labels) = make(name), inputs(CASES[name], batch=0)
    for timestep in (t, 5):
        out = model(sample, timestep, labels)
        assert out.shape == (0, 3, 8, 8)
        out.sum().backward()


@pytest.mark.parametrize("size", [(2, 2), (6, 10), (32, 4)], ids=str)
@torch.no_grad()
def test_other_sizes_than_sample_size_run(size):
    out = make("tiny")(torch.randn(1, 3, *size), 4)
    assert out.shape == (1, 3, *size)
    assert out.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["tiny", "scale-shift", "class-timestep", "class-identity"])
@torch.no_grad()
def test_dtypes(name, dtype):
    model = make(name)
    sample, t, labels = inputs(CASES[name])
    expected = model(sample, t, labels)
    out = model.to(dtype)(sample.to(dtype), t, labels)
    assert model.dtype == out.dtype == dtype
    bound = {torch.bfloat16: 0.1, torch.float16: 0.02, torch.float64: 1e-5}[dtype]
    assert (out.double() - expected).norm() <= bound * expected.norm()


@pytest.mark.parametrize("name", ["tiny", "scale-shift", "classes", "fourier"])
def test_autocast_runs_in_bfloat16_and_gives_float32_gradients(name):
    model, arguments = make(name), inputs(CASES[name])
    expected = model(*arguments)
    seen = []
    for module in model.modules():
        if isinstance(module, GroupNormSiLU):
            module.register_forward_hook(
                lambda m, args, out: seen.append((args[0].dtype, out.dtype))
            )
    with torch.autocast("cpu", torch.bfloat16):
        out = model(*arguments)
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
    assert out.dtype == torch.bfloat16
    assert (out - expected).norm() <= 0.1 * expected.norm()
    out.float().square().mean().backward()
    for parameter in model.parameters():
        if parameter.requires_grad:
            assert parameter.grad.dtype == torch.float32
            assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("name", ["cifar", "attention-resnet-resampling", "scale-shift"])
@torch.no_grad()
def test_channels_last_stays_so(name):
    model = make(name)
    sample, *rest = inputs(CASES[name])
    expected = model(sample, *rest)
    model.to(memory_format=torch.channels_last)
    broken = []

    def check(path):
        def hook(module, args, out):
            first = out[0] if isinstance(out, tuple) else out
            if first.ndim == 4 and not first.is_contiguous(memory_format=torch.channels_last):
                broken.append(path)

        return hook

    for path, module in model.named_modules():
        module.register_forward_hook(check(path))
    out = model(sample.to(memory_format=torch.channels_last), *rest)
    assert not broken
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["cifar", "attention-resnet-resampling", "scale-shift"])
@torch.no_grad()
def test_contiguous_stays_so(name):
    model = make(name)
    seen = []
    for module in model.modules():
        if isinstance(module, GroupNormSiLU):
            module.register_forward_hook(lambda m, args, out: seen.append(out.is_contiguous()))
    assert model(*inputs(CASES[name])).is_contiguous()
    assert all(seen)


def test_strided_input_gives_the_same():
    model, (sample, t, _) = make("tiny"), inputs(TINY)
    strided = torch.randn(2, 8, 16, 3).transpose(1, 3)[:, :, ::2]
    strided.copy_(sample)
    torch.testing.assert_close(model(strided, t), model(sample, t), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["cifar", "dropout-swish", "resnet-resampling", "classes"])
def test_gradient_checkpointing_changes_no_gradient(name):
    model = make(name).train()
    sample, *rest = inputs(CASES[name])
    found = []
    for switch in (model.enable_gradient_checkpointing, model.disable_gradient_checkpointing):
        switch()
        model.zero_grad()
        x = sample.clone().requires_grad_()
        torch.manual_seed(0)
        out = model(x, *rest)
        out.square().sum().backward()
        found.append([out.detach(), x.grad, *(p.grad.clone() for p in model.parameters())])
    for with_, without in zip(*found, strict=True):
        torch.testing.assert_close(with_, without, atol=0, rtol=0)


def test_gradient_checkpointing_computes_blocks_again():
    model = make("tiny").train()
    calls = []
    for block in (*model.down_blocks, model.mid_block, *model.up_blocks):
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    model.enable_gradient_checkpointing()
    out = model(*inputs(TINY))
    assert len(calls) == 5
    out.sum().backward()
    assert len(calls) == 10
    with torch.no_grad():
        model(*inputs(TINY))
    assert len(calls) == 15


@pytest.mark.usefixtures("no_graphs")
@pytest.mark.parametrize("name", ["fourier", "learned", "class-timestep", "scale-shift"])
@torch.no_grad()
def test_compiles_in_one_graph(name):
    model, arguments = make(name), inputs(CASES[name])
    out = torch.compile(model, fullgraph=True, backend="eager")(*arguments)
    torch.testing.assert_close(out, model(*arguments), atol=1e-5, rtol=0)


@pytest.mark.usefixtures("no_graphs")
def test_compiles_in_one_graph_with_gradients():
    model, arguments = make("classes"), inputs(CASES["classes"])
    out = torch.compile(model, fullgraph=True, backend="aot_eager")(*arguments)
    expected = model(*arguments)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
    parameters = list(model.parameters())
    pairs = (torch.autograd.grad(y.square().sum(), parameters) for y in (out, expected))
    for compiled, eager in zip(*pairs, strict=True):
        torch.testing.assert_close(compiled, eager, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("no_graphs")
def test_compiles_with_numbers():
    model, (sample, _, _) = make("tiny"), inputs(TINY)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for number in (3, 4, 5, 0.5):
            expected = model(sample, number)
            torch.testing.assert_close(compiled(sample, number), expected, atol=1e-5, rtol=0)


def test_sample_runs_the_model():
    model = make("classes")
    sampler = fastdiff.samplers.DDIM(fastdiff.schedules.cosine(100), 4)
    images = fastdiff.sample(
        model,
        sampler,
        (3, 3, 8, 8),
        cond={"class_labels": torch.tensor([0, 9, 4])},
        generator=torch.Generator().manual_seed(0),
        progress=False,
    )
    plain = fastdiff.sample(
        lambda x, t, class_labels: model(x, t, class_labels),
        sampler,
        (3, 3, 8, 8),
        cond={"class_labels": torch.tensor([0, 9, 4])},
        generator=torch.Generator().manual_seed(0),
        progress=False,
    )
    torch.testing.assert_close(images, plain, atol=1e-4, rtol=0)


def test_copies_and_properties():
    model = make(CIFAR)
    copied = copy.deepcopy(model)
    arguments = inputs(CIFAR)
    torch.testing.assert_close(copied(*arguments), model(*arguments), atol=0, rtol=0)
    assert model.device == torch.device("cpu")
    assert model.dtype == torch.float32
    assert model.config.sample_size == 32
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.config.sample_size = 64
