"""The U-Net computes what diffusers' class of the same name does, from the same files."""

from __future__ import annotations

import inspect

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from unet_cases import CASES, CIFAR, TINY, inputs, parameters_by_name, randomized

from fastdiff.nn import UNet2DConfig, UNet2DModel


def pair(options, folder):
    """diffusers' model with random weights, and ours read from what it saves."""
    theirs = randomized(diffusers.UNet2DModel(**options)).eval()
    theirs.save_pretrained(folder)
    return theirs, UNet2DModel.from_pretrained(folder)


def run(theirs, sample, timestep, class_labels=None):
    return theirs(sample, timestep, class_labels, return_dict=False)[0]


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_outputs_are_equal(name, tmp_path):
    theirs, ours = pair(CASES[name], tmp_path)
    arguments = inputs(CASES[name])
    expected = run(theirs, *arguments)
    assert expected.std() > 0.05
    torch.testing.assert_close(ours(*arguments), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_diffusers_reads_what_we_write(name, tmp_path):
    ours = randomized(UNet2DModel(**CASES[name])).eval()
    ours.save_pretrained(tmp_path)
    theirs, info = diffusers.UNet2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert parameters_by_name(theirs) == parameters_by_name(ours)
    arguments = inputs(CASES[name])
    torch.testing.assert_close(ours(*arguments), run(theirs, *arguments), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["cifar", "scale-shift", "fourier", "heads-of-4"])
@torch.no_grad()
def test_outputs_are_equal_in_float64(name, tmp_path):
    theirs, ours = (model.double() for model in pair(CASES[name], tmp_path))
    sample, *rest = inputs(CASES[name])
    got, expected = ours(sample.double(), *rest), run(theirs, sample.double(), *rest)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", ["cifar", "resnet-resampling", "classes"])
def test_gradients_are_equal(name, tmp_path):
    theirs, ours = pair(CASES[name], tmp_path)
    sample, *rest = inputs(CASES[name])
    leaves, grad = [], torch.randn(sample.shape, generator=torch.Generator().manual_seed(2))
    for model, call in ((ours, ours), (theirs, lambda *a: run(theirs, *a))):
        x = sample.clone().requires_grad_()
        call(x, *rest).backward(grad)
        leaves.append({"sample": x.grad, **{n: p.grad for n, p in model.named_parameters()}})
    for key, expected in leaves[1].items():
        scale = expected.abs().max().item()
        torch.testing.assert_close(
            leaves[0][key], expected, atol=1e-5 * (1 + scale), rtol=0, msg=lambda m, k=key: k + m
        )


def test_dropout_draws_the_same_masks(tmp_path):
    options = {
        **CASES["dropout-swish"],
        # After attention diffusers goes on in channels_last, where masks fall on other pixels.
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "add_attention": False,
    }
    theirs, ours = (model.train() for model in pair(options, tmp_path))
    sample, t, _ = inputs(options)
    outputs = []
    for call in (lambda: ours(sample, t), lambda: run(theirs, sample, t)):
        torch.manual_seed(3)
        outputs.append(call())
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=0)
    assert not torch.allclose(outputs[0], ours.eval()(sample, t), atol=1e-2)


@pytest.mark.parametrize(
    "timestep",
    [10, torch.tensor(10), torch.tensor([10]), torch.tensor(9.75), torch.tensor([9.75, 200.5])],
    ids=["int", "0-d", "one", "fraction", "fractions"],
)
@torch.no_grad()
def test_timestep_may_be_a_number_or_a_tensor(timestep, tmp_path):
    theirs, ours = pair(TINY, tmp_path)
    sample = inputs(TINY)[0]
    expected = run(theirs, sample, timestep)
    torch.testing.assert_close(ours(sample, timestep), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_old_names_of_the_attention_layers_are_read(tmp_path):
    theirs, _ = pair(CIFAR, tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    old = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    tensors = load_file(file)
    for new, name in old.items():
        tensors = {key.replace(new, name): value for key, value in tensors.items()}
    assert any("proj_attn" in key for key in tensors)
    save_file(tensors, file)
    arguments = inputs(CIFAR)
    ours = UNet2DModel.from_pretrained(tmp_path)
    torch.testing.assert_close(ours(*arguments), run(theirs, *arguments), atol=1e-5, rtol=0)


def test_config_keeps_every_value(tmp_path):
    options = {**CIFAR, "num_class_embeds": 3, "dropout": 0.1}
    theirs, ours = pair(options, tmp_path)
    ours.save_pretrained(tmp_path / "again")
    again = diffusers.UNet2DModel.from_pretrained(tmp_path / "again")
    names = {name for name in theirs.config if not name.startswith("_")}
    assert names == {name for name in again.config if not name.startswith("_")}

    def comparable(value):
        return tuple(value) if isinstance(value, list) else value

    for name in names:
        assert comparable(again.config[name]) == comparable(theirs.config[name]), name
        assert getattr(ours.config, name) == comparable(theirs.config[name]), name


def test_defaults_are_those_of_diffusers():
    signature = inspect.signature(diffusers.UNet2DModel.__init__)
    theirs = {n: p.default for n, p in signature.parameters.items() if n != "self"}
    ours = {n: v for n, v in UNet2DConfig().to_dict().items() if not n.startswith("_")}
    assert ours == theirs
