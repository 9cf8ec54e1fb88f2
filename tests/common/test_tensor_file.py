"""Files of tensors have the permissions of new files."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fastdiff import schedules
from fastdiff.checkpoints.checkpoint import save
from fastdiff.checkpoints.trained_model import Checkpoint
from fastdiff.common.tensor_file import save_file
from fastdiff.data import image_grid
from fastdiff.evaluation.pictures import Pictures
from fastdiff.evaluation.reference_file import save_reference

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=oct)
def mode(request: pytest.FixtureRequest):
    """Permissions of new files, with the umask set by which they are so."""
    before = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(before)


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_file_follows_the_umask(mode: int, tmp_path: Path) -> None:
    save_file({"a": torch.arange(3)}, tmp_path / "a.safetensors", metadata={"format": "pt"})
    assert _mode(tmp_path / "a.safetensors") == mode
    assert load_file(tmp_path / "a.safetensors")["a"].tolist() == [0, 1, 2]


def test_a_file_that_is_replaced_keeps_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.touch()
    path.chmod(0o640)
    save_file({"a": torch.arange(3)}, path)
    assert _mode(path) == 0o640


def test_after_an_error_there_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="contiguous"):
        save_file({"a": torch.zeros(2, 3).t()}, tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_every_file_of_a_user_follows_the_umask(
    mode: int, tiny_unet: Callable, tmp_path: Path
) -> None:
    model = tiny_unet()
    trained, weights = Checkpoint(model, schedules.cosine(50), "eps"), model.state_dict()
    state = ({f"model.{name}": value for name, value in weights.items()}, {})
    save(trained, tmp_path / "checkpoint", state=state, averages={"ema-0.5": weights})
    image_grid.save(Image.new("L", (8, 8)), tmp_path / "grid.png")
    pictures = Pictures(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), np.eye(3))
    save_reference(tmp_path / "reference.npz", pictures, "unit vectors")
    found = {path.name: _mode(path) for path in tmp_path.rglob("*") if path.is_file()}
    assert len(found) == 8
    assert found == dict.fromkeys(found, mode)
