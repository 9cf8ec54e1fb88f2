from __future__ import annotations

import json

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from unet_cases import TINY, inputs, randomized

from fastdiff.nn import UNet2DModel

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"


@pytest.fixture
def saved(tmp_path):
    randomized(UNet2DModel(**TINY)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change(folder, edit):
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


def test_round_trip(saved, tmp_path):
    random_state = torch.get_rng_state()
    model = UNet2DModel.from_pretrained(str(saved))
    assert torch.equal(random_state, torch.get_rng_state())
    assert not model.training
    assert all(p.requires_grad for p in model.parameters())
    original = randomized(UNet2DModel(**TINY))
    for name, value in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert model.config == original.config
    described = json.loads((saved / CONFIG).read_text())
    assert described["_class_name"] == "UNet2DModel"
    assert described["_diffusers_version"] == "0.42.0"


def test_frequencies_stay_fixed_and_can_be_written_over(tmp_path):
    model = UNet2DModel(**TINY, time_embedding_type="fourier")
    model.save_pretrained(tmp_path)
    loaded = UNet2DModel.from_pretrained(tmp_path)
    assert not loaded.time_proj.weight.requires_grad
    loaded.save_pretrained(tmp_path)  # onto the file it came from
    again = UNet2DModel.from_pretrained(tmp_path)
    assert torch.equal(again.time_proj.weight, model.time_proj.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_parameters_are_float32_whatever_the_file_holds(dtype, tmp_path):
    model = randomized(UNet2DModel(**TINY)).to(dtype, memory_format=torch.channels_last)
    model.save_pretrained(tmp_path)
    assert {value.dtype for value in load_file(tmp_path / WEIGHTS).values()} == {dtype}
    loaded = UNet2DModel.from_pretrained(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    sample, t, _ = inputs(TINY)
    torch.testing.assert_close(loaded(sample, t), model.float()(sample, t), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_missing_files(name, saved, tmp_path):
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"no {name} in "):
        UNet2DModel.from_pretrained(saved)
    with pytest.raises(FileNotFoundError, match=r"no folder google/.* to read"):
        UNet2DModel.from_pretrained("google/ddpm-cifar10-32")


def test_pickled_weights_are_not_read(saved):
    tensors = load_file(saved / WEIGHTS)
    (saved / WEIGHTS).unlink()
    torch.save(tensors, saved / "diffusion_pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=f"no {WEIGHTS} in "):
        UNet2DModel.from_pretrained(saved)


def test_truncated_weights(saved):
    data = (saved / WEIGHTS).read_bytes()
    for size in (0, 4, 100, len(data) // 2, len(data) - 1):
        (saved / WEIGHTS).write_bytes(data[:size])
        with pytest.raises(SafetensorError):
            UNet2DModel.from_pretrained(saved)


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (lambda t: t.pop("conv_in.bias"), "conv_in.bias is missing$"),
        (lambda t: t.update(extra=torch.zeros(1)), "extra is not the model's$"),
        (
            lambda t: t.update({"conv_in.bias": torch.zeros(9)}),
            "conv_in.bias must have shape \\(8,\\), got \\(9,\\)$",
        ),
        (lambda t: [t.pop(key) for key in list(t)[:7]], "is missing; and 4 more$"),
    ],
    ids=["missing", "unexpected", "shape", "many"],
)
def test_weights_that_do_not_fit(edit, text, saved):
    change(saved, edit)
    with pytest.raises(ValueError, match=f"the weights do not fit the config: .*{text}"):
        UNet2DModel.from_pretrained(saved)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json is not JSON"),
        ("[]", "config.json must hold a JSON object, got list"),
        ('{"_class_name": "UNet1DModel"}', "describes a UNet1DModel, wanted a UNet2DModel"),
        ('{"encoder_hid_dim": 4}', "no option encoder_hid_dim"),
        ('{"act_fn": "gelu"}', "unsupported act_fn 'gelu'"),
    ],
)
def test_unusable_configs(text, message, saved):
    (saved / CONFIG).write_text(text)
    with pytest.raises(ValueError, match=message):
        UNet2DModel.from_pretrained(saved)
