"""fastdiff export: the model without its training state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastdiff.checkpoints import checkpoint


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_exports_the_averaged_model(
    run: Callable, digits_run: Path, tmp_path: Path, dtype: str
) -> None:
    out = tmp_path / "shared"
    ran = run("export", "--checkpoint", digits_run, "--out", out, "--dtype", dtype)
    assert ran.code == 0
    assert ran.out.startswith(f"{out}: step 6, {dtype}, ")
    assert sorted(path.name for path in out.iterdir()) == [
        checkpoint.CONFIG,
        checkpoint.WEIGHTS,
        checkpoint.META,
    ]
    before, after = checkpoint.load(digits_run), checkpoint.load(out)
    weights = after.model.state_dict()
    for name, value in before.model.state_dict().items():
        assert torch.equal(weights[name], value.to(getattr(torch, dtype)).float()), name
    facts = [(c.prediction, c.classes, c.step, c.seed, c.dataset) for c in (before, after)]
    assert facts[0] == facts[1]
    assert torch.equal(before.forward.betas, after.forward.betas)


def test_narrow_weights_take_half_the_space(
    run: Callable, digits_run: Path, tmp_path: Path
) -> None:
    sizes = []
    for dtype in ("float32", "bfloat16"):
        words = ("--checkpoint", digits_run, "--out", tmp_path / dtype, "--dtype", dtype)
        assert run("export", *words).code == 0
        sizes.append((tmp_path / dtype / checkpoint.WEIGHTS).stat().st_size)
    assert sizes[1] < 0.55 * sizes[0]


def test_exported_model_draws_the_same_images(
    run: Callable, digits_run: Path, tmp_path: Path
) -> None:
    assert run("export", "--checkpoint", digits_run, "--out", tmp_path / "shared").code == 0
    for name, path in (("a", digits_run), ("b", tmp_path / "shared")):
        words = ("--checkpoint", path, "--out", tmp_path / f"{name}.png", "--steps", 2)
        assert run("sample", *words, "--threads", 1).code == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_exported_model_cannot_be_resumed(run: Callable, digits_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "run" / "checkpoints" / "step-00000006"
    assert run("export", "--checkpoint", digits_run, "--out", out).code == 0
    ran = run("train", "--resume", "--out", tmp_path / "run")
    assert ran.code == 2
    assert f"{out} cannot be resumed: it has no training.json" in ran.last


def test_existing_folder_is_left_alone(run: Callable, digits_run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    ran = run("export", "--checkpoint", digits_run, "--out", tmp_path)
    assert ran.code == 2
    assert f"{tmp_path} exists already; it was left as it is" in ran.last
    assert (tmp_path / "mine").read_text() == "precious"
    assert list(tmp_path.iterdir()) == [tmp_path / "mine"]
