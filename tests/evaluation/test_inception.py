"""Inception features and the figures in them, against torch-fidelity's, with random weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fidelity import random_weights, torch_fidelity

from fastdiff.evaluation import (
    Inception,
    Manifold,
    Pictures,
    Reference,
    compare,
    frechet_distance,
    kernel_distance,
)

theirs = torch_fidelity()
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "pt_inception.pth"
    random_weights(path, theirs)
    return path


@pytest.fixture(scope="module")
def images():
    """Two sets of six smooth images in colour, 20x20."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(12, 3, 4, 4, generator=generator)
    coarse[6:] *= 0.4
    coarse[6:9] = 0.98 * coarse[:3]  # some are alike
    fine = torch.nn.functional.interpolate(coarse, (20, 20), mode="bilinear")
    return (fine * 255).round().to(torch.uint8).split(6)


class Listed(torch.utils.data.Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


def test_figures_are_those_of_torch_fidelity(weights, images):
    """By its own calculate_metrics, which reads the images, the weights and all by itself."""
    inception = Inception(weights)
    x, y = (Pictures.of([pixels], inception, progress=False) for pixels in images)
    assert x.features.shape == (6, 2048)
    assert x.features.dtype == np.float32
    compared = compare(x, Reference(y))
    expected = theirs.calculate_metrics(
        input1=Listed(images[0]), input2=Listed(images[1]), fid=True, kid=True, prc=True,
        feature_extractor="inception-v3-compat", feature_extractor_weights_path=str(weights),
        feature_layer_prc="2048", kid_subset_size=6, cuda=False, cache=False, save_cpu_ram=True,
        verbose=False,
    )  # fmt: skip
    figures = compared.figures
    assert figures.frechet == pytest.approx(expected["frechet_inception_distance"], rel=1e-4)
    # torch-fidelity adds and subtracts values of the kernel, each of some units, in float32.
    assert figures.kid == pytest.approx(expected["kernel_inception_distance_mean"], abs=2e-6)
    assert figures.kid_std < 1e-9  # each subset is the whole set
    assert figures.precision == pytest.approx(expected["precision"])
    assert figures.recall == pytest.approx(expected["recall"])
    assert 0 < figures.recall < 1


def test_distances_of_many_features_are_those_of_torch_fidelity():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, 16)).astype(np.float32)
    y = (0.9 * rng.standard_normal((250, 16)) + 0.2).astype(np.float32)
    kid = theirs.metric_kid.kid_features_to_metric(
        torch.from_numpy(x), torch.from_numpy(y), kid_subset_size=100, verbose=False
    )
    found = kernel_distance(x, y, subset_size=100)
    assert found == pytest.approx(tuple(kid.values()), rel=1e-4)
    prc = theirs.metric_prc.prc_features_to_metric(
        torch.from_numpy(x), torch.from_numpy(y), verbose=False
    )
    shares = Manifold(y).coverage_of(Manifold(x))
    assert shares["precision"] == pytest.approx(prc["precision"])
    assert shares["recall"] == pytest.approx(prc["recall"])
    assert len({prc["precision"], prc["recall"], 0.0, 1.0}) == 4
    statistics = [
        theirs.metric_fid.fid_features_to_statistics(torch.from_numpy(each)) for each in (x, y)
    ]
    fid = theirs.metric_fid.fid_statistics_to_metric(*statistics, verbose=False)
    assert frechet_distance(x, y) == pytest.approx(fid["frechet_inception_distance"], rel=1e-5)


def test_the_network_is_called_as_torch_fidelity_calls_it(weights, images):
    """Bit for bit, of sizes below and above its own; and grey images are colours."""
    network = theirs.FeatureExtractorInceptionV3("x", ["2048"], str(weights))
    inception = Inception(weights)
    large = torch.nn.functional.interpolate(images[0][:1].float(), (310, 310)).to(torch.uint8)
    for pixels in (images[0][:2], large):
        np.testing.assert_array_equal(inception(pixels), network(pixels)[0].numpy())
    grey = images[0][:1, :1]
    np.testing.assert_array_equal(inception(grey), inception(grey.repeat(1, 3, 1, 1)))
    assert inception.description.startswith("Inception-v3 features (weights ")
    for wrong in (images[0].float(), images[0][0], images[0][:, :2]):
        with pytest.raises(ValueError, match="pixels must be uint8"):
            inception(wrong)
