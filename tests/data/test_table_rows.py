"""Parquet files and data sets of the package ``datasets``, made here."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff.common.errors import DataError, InputError
from fastdiff.data import open_images
from fastdiff.data.lazy_images import LazyImages


def images(data, size=8, **options):
    return open_images(data, size, progress=False, **options)


def test_without_the_package(tmp_path, monkeypatch):
    """The message says what to install."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "a.parquet").write_bytes(b"")
    for data in (tmp_path, tmp_path / "a.parquet", "hf:name"):
        with pytest.raises(InputError, match=r"'datasets': pip install 'fastdiff\[hf\]'"):
            images(data)


@pytest.fixture
def package(tmp_path_factory, monkeypatch):
    """The package, with a cache of this test and without the network."""
    found = pytest.importorskip("datasets")
    monkeypatch.setattr(found.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    found.disable_progress_bars()
    return found


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)


def png(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def write(package, path, columns, features=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    package.Dataset.from_dict(columns, features=features).to_parquet(str(path))


def test_a_folder_of_parquet_files(package, pixels, tmp_path):
    """Columns are found by their types, whatever their names; files by their splits."""
    features = package.Features(
        {"kind": package.ClassLabel(names=["ant", "bee"]), "picture": package.Image()}
    )
    for part in (0, 1):
        chosen = range(3 * part, min(5, 3 * part + 3))
        write(
            package,
            tmp_path / "set" / "data" / f"train-0000{part}-of-00002.parquet",
            {
                "kind": [i % 2 for i in chosen],
                "picture": [{"bytes": png(pixels[i]), "path": None} for i in chosen],
            },
            features,
        )
    write(
        package,
        tmp_path / "set" / "data" / "test-00000-of-00001.parquet",
        {"kind": [1], "picture": [{"bytes": png(pixels[4]), "path": None}]},
        features,
    )
    whole = images(tmp_path / "set")
    assert torch.equal(whole.images, torch.from_numpy(pixels).permute(0, 3, 1, 2))
    assert whole.labels.tolist() == [0, 1, 0, 1, 0]
    assert whole.classes == ("ant", "bee")
    assert whole.name == "set"
    lazy = images(tmp_path / "set", cache=0, workers=2)
    assert isinstance(lazy, LazyImages)
    for ours, theirs in zip(lazy.read(torch.arange(5)), whole.read(torch.arange(5)), strict=True):
        assert torch.equal(ours, theirs)
    assert images(tmp_path / "set", split="test").labels.tolist() == [1]
    with pytest.raises(DataError, match=r"no split 'validation' \(found test, train\)"):
        images(tmp_path / "set", split="validation")
    hub = images(f"hf:{tmp_path / 'set'}:test")  # as the package reads a folder
    assert torch.equal(hub.images, torch.from_numpy(pixels[4:]).permute(0, 3, 1, 2))


def test_plain_columns(package, pixels, tmp_path):
    """Bytes without the type of an image, and labels without names."""
    path = tmp_path / "a.parquet"
    columns = {"file": [png(x) for x in pixels], "label": [30, 7, 30, 7, 7]}
    write(package, path, columns)
    found = images(path)
    assert found.labels.tolist() == [1, 0, 1, 0, 0]
    assert found.classes == ("7", "30")
    write(package, path, {**columns, "label": ["b", "a", "b", "a", "c"]})
    assert images(path).classes == ("a", "b", "c")
    assert images(path).labels.tolist() == [1, 0, 1, 0, 2]


def test_columns_that_have_to_be_named(package, pixels, tmp_path):
    path = tmp_path / "a.parquet"
    one = [png(x) for x in pixels]
    write(package, path, {"a": one, "b": one[::-1], "label": [0] * 5, "class": [1] * 5})
    with pytest.raises(DataError, match=r"2 columns of images \['a', 'b'\] .*--image-column"):
        images(path)
    with pytest.raises(DataError, match=r"2 columns of labels .*--label-column"):
        images(path, image_column="b")
    found = images(path, image_column="b", label_column="class")
    assert torch.equal(found.images[0], torch.from_numpy(pixels[4]).permute(2, 0, 1))
    with pytest.raises(DataError, match=r"no column 'c' \(found"):
        images(path, image_column="c")
    write(package, path, {"text": ["a"]})
    with pytest.raises(DataError, match=r"0 columns of images \[\] among \['text'\]"):
        images(path)


def test_damaged_tables(package, pixels, tmp_path):
    path = tmp_path / "a.parquet"
    write(package, path, {"image": [png(pixels[0]), b"no pixels"], "label": [0, 1]})
    with pytest.raises(DataError, match=r"a: row 1, column 'image': cannot identify"):
        images(path)
    write(package, path, {"image": [png(pixels[0]), None], "label": [0, 1]})
    with pytest.raises(DataError, match=r"row 1, column 'image': holds NoneType"):
        images(path)
    write(package, path, {"image": [png(pixels[0])] * 2, "label": [0, None]})
    with pytest.raises(DataError, match="1 rows have no value in column 'label'"):
        images(path)
    write(package, path, {"image": [png(pixels[0])] * 2, "label": [0.5, 1.5]})
    with pytest.raises(DataError, match="wanted whole numbers or text"):
        images(path)
    features = package.Features(
        {"image": package.Value("binary"), "label": package.ClassLabel(names=["a"])}
    )
    write(package, path, {"image": [png(pixels[0])] * 2, "label": [0, -1]}, features)
    with pytest.raises(DataError, match="row 1 has the label -1"):
        images(path)
    path.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(DataError, match=r"cannot read the parquet files of a, from .*a\.parquet"):
        images(path)
