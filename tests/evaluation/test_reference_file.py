"""References in files of arrays: written and read again, published forms, and damaged files."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastdiff.common.errors import DataError, InputError
from fastdiff.evaluation.distances import Gaussian
from fastdiff.evaluation.pictures import Pictures
from fastdiff.evaluation.reference_file import load_reference, save_reference


@pytest.fixture
def pictures():
    rng = np.random.default_rng(0)
    small = torch.from_numpy(rng.integers(0, 256, (9, 3, 4, 4), dtype=np.uint8))
    return Pictures(small, rng.standard_normal((9, 5)).astype(np.float32))


def test_what_is_written_is_read(pictures, tmp_path):
    path, labels = tmp_path / "a" / "reference.npz", torch.arange(9) % 2
    save_reference(path, pictures, "five features", labels, ("cat", "düne"))
    found = load_reference(path)
    assert torch.equal(found.pictures.thumbnails, pictures.thumbnails)
    np.testing.assert_array_equal(found.pictures.features, pictures.features)
    assert torch.equal(found.labels, labels)
    assert found.classes == ("cat", "düne")
    assert (found.description, found.images) == ("five features", None)
    gaussian = Gaussian.of(pictures.features)
    with np.load(path) as arrays:  # as other programs read it
        np.testing.assert_array_equal(arrays["mu"], gaussian.mean)
        np.testing.assert_allclose(arrays["sigma"], np.cov(pictures.features.T), atol=1e-6)
    save_reference(path, pictures, "without classes")
    again = load_reference(path)
    assert (again.labels, again.classes, again.description) == (None, (), "without classes")
    assert [file.name for file in path.parent.iterdir()] == ["reference.npz"]


def test_published_forms(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (7, 6, 6, 3), dtype=np.uint8)
    mu, sigma = rng.standard_normal(4).astype(np.float32), np.eye(4)
    np.savez(tmp_path / "batch.npz", images)
    batch = load_reference(tmp_path / "batch.npz")
    assert torch.equal(batch.images.images[2, 1], torch.from_numpy(images[2, ..., 1]))
    assert batch.gaussian is batch.pictures is batch.description is None
    np.savez(tmp_path / "statistics.npz", mu=mu, sigma=sigma)
    statistics = load_reference(tmp_path / "statistics.npz")
    assert statistics.images is None
    assert statistics.gaussian.mean.dtype == np.float64
    np.testing.assert_array_equal(statistics.gaussian.mean, mu)
    np.savez(tmp_path / "both.npz", images, mu=mu, sigma=sigma, mu_s=mu)
    both = load_reference(tmp_path / "both.npz")
    assert len(both.images) == 7
    np.testing.assert_allclose(both.gaussian.cov, sigma, atol=1e-12)


def arrays(**changes):
    good = {
        "features": np.zeros((3, 2)),
        "thumbnails": np.zeros((3, 1, 2, 2), np.uint8),
        "description": np.array("x"),
    }
    return {**good, **changes}


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({}, "must have the arrays arr_0 .* got none"),
        ({"mu": np.zeros(2)}, "must have the arrays arr_0 .* got mu"),
        ({"mu": np.zeros(2), "sigma": np.zeros((3, 3))}, r"\(2,\) and float64 \(3, 3\)"),
        ({"mu": np.zeros(2, int), "sigma": np.zeros((2, 2))}, "floating point .* got int64"),
        ({"mu": np.full(2, np.nan), "sigma": np.zeros((2, 2))}, "must be finite"),
        (
            {"arr_0": np.zeros((2, 3, 3, 3))},
            r"arr_0 must be images uint8 .* float64 \(2, 3, 3, 3\)",
        ),
        ({"arr_0": np.zeros((2, 3, 4, 3), np.uint8)}, r"\(2, 3, 3, 4\)"),
        ({"arr_0": np.array([{}], dtype=object)}, "cannot be read"),
        (arrays(features=np.zeros((4, 2))), "do not belong together"),
        (arrays(features=np.full((3, 2), np.inf)), "do not belong together"),
        (arrays(labels=np.array([0, 1, 2]), classes=np.array(["a"])), "do not belong together"),
        (arrays(labels=np.array([0, 0])), "do not belong together"),
    ],
)
def test_files_of_other_content(content, match, tmp_path):
    np.savez(tmp_path / "a.npz", **content)
    with pytest.raises(DataError, match=match) as caught:
        load_reference(tmp_path / "a.npz")
    assert "a.npz" in str(caught.value)


def test_damaged_and_missing_files(pictures, tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(DataError, match=r"^no .*a\.npz"):
        load_reference(path)
    with pytest.raises(DataError, match="cannot be read"):
        load_reference(tmp_path)
    save_reference(path, pictures, "x")
    content = path.read_bytes()
    for damaged in (
        content[:100],
        content[:-50],
        b"",
        b"text",
        content[:300] + b"?" * 40 + content[340:],
    ):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.npz cannot be read"):
            load_reference(path)
    np.save(tmp_path / "plain", np.zeros(3))
    (tmp_path / "plain.npy").rename(path)
    with pytest.raises(DataError, match="it is one array without a name"):
        load_reference(path)


def test_a_file_that_cannot_be_written(pictures, tmp_path):
    with pytest.raises(InputError, match=r"must end in \.npz, got .*a\.txt"):
        save_reference(tmp_path / "a.txt", pictures, "x")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        save_reference(tmp_path / "file" / "a.npz", pictures, "x")
