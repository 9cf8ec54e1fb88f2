"""What is read from a file of Inception weights and what is refused, with a small network instead.

The stand-in takes its weights as torch-fidelity's network does; test_inception.py has the real one.
"""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from fastdiff.common.errors import InputError
from fastdiff.evaluation import Inception, inception

pytestmark = pytest.mark.usefixtures("one_thread")


class Network(nn.Module):
    def __init__(self, name, features_list, feature_extractor_weights_path):
        super().__init__()
        self.conv = nn.Conv2d(3, 7, 3, stride=9)
        self.AvgPool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(7, 2)
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=False))
        self.requires_grad_(False)


def enlarged(pixels, size, align_corners):
    assert not align_corners
    return nn.functional.interpolate(pixels, size, mode="nearest")


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    package = types.ModuleType("torch_fidelity")
    package.__path__ = []
    network = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    network.FeatureExtractorInceptionV3 = Network
    resizing = types.ModuleType("torch_fidelity.interpolate_compat_tensorflow")
    resizing.interpolate_bilinear_2d_like_tensorflow1x = enlarged
    for module in (package, network, resizing):
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.fixture
def weights(tmp_path, generator):
    shapes = {"conv.weight": (7, 3, 3, 3), "conv.bias": (7,), "fc.weight": (2, 7), "fc.bias": (2,)}
    path = tmp_path / "weights.pth"
    torch.save(
        {name: torch.randn(each, generator=generator) for name, each in shapes.items()}, path
    )
    return path


def test_features_are_those_of_the_layers_before_the_classifier(weights, generator):
    pixels = torch.randint(0, 256, (4, 3, 5, 5), generator=generator).to(torch.uint8)
    found = torch.load(weights, weights_only=True)
    x = (enlarged(pixels.float(), (299, 299), False) - 128) / 128
    x = nn.functional.conv2d(x, found["conv.weight"], found["conv.bias"], stride=9).mean((2, 3))
    features = Inception(weights)(pixels)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, x, rtol=1e-5, atol=1e-5)


def test_the_description_tells_weights_and_resizing(weights, tmp_path):
    plain, clean = Inception(weights), Inception(weights, resize="clean")
    pixels = (torch.arange(2 * 3 * 64).view(2, 3, 8, 8) % 251).to(torch.uint8)
    assert np.abs(plain(pixels) - clean(pixels)).max() > 1e-3
    assert plain.description.startswith("Inception-v3 features (weights ")
    other = tmp_path / "other.pth"
    torch.save({**torch.load(weights), "fc.bias": torch.zeros(2)}, other)
    assert len({plain.description, clean.description, Inception(other).description}) == 3


def test_weights_that_are_none(tmp_path, weights):
    found = torch.load(weights, weights_only=True)
    broken = tmp_path / "broken.pth"

    def refused(match):
        with pytest.raises(InputError, match=match) as caught:
            Inception(broken)
        assert str(broken) in str(caught.value)

    refused("cannot read")
    broken.write_bytes(b"no weights")
    refused("no file of weights")
    broken.write_bytes(weights.read_bytes()[:900])
    refused("no file of weights")
    torch.save([1, 2], broken)
    refused("must hold tensors by name, got list")
    torch.save({"a": 1}, broken)
    refused("must hold tensors by name")
    missing = dict(found)
    del missing["fc.bias"]
    torch.save(missing, broken)
    refused("Missing key.*fc.bias")
    torch.save({**found, "extra": torch.zeros(1)}, broken)
    refused("Unexpected key.*extra")
    torch.save({**found, "fc.bias": torch.zeros(3)}, broken)
    refused("size mismatch for fc.bias")
    with pytest.raises(InputError, match="resize must be one of tf, clean, got 'lanczos'"):
        Inception(weights, resize="lanczos")


class Evil:
    def __reduce__(self):
        return pytest.fail, ("code of a file of weights was run",)


def test_a_file_of_weights_runs_no_code(tmp_path):
    path = tmp_path / "evil.pth"
    torch.save({"fc.bias": Evil()}, path)
    with pytest.raises(InputError, match="no file of weights"):
        Inception(path)


def test_packages_that_are_missing(weights, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity.interpolate_compat_tensorflow", None)
    with pytest.raises(InputError, match=r"'torch_fidelity': pip install 'fastdiff\[fid\]'"):
        Inception(weights)

    def needs_torchvision(name, extra):
        raise ModuleNotFoundError("No module named 'torchvision'", name="torchvision")

    monkeypatch.setattr(inception, "require", needs_torchvision)
    with pytest.raises(InputError, match=r"without torchvision: pip install 'fastdiff\[fid\]'"):
        Inception(weights)
