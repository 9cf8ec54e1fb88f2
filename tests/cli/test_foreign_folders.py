"""Folders that are no checkpoints of fastdiff's: every command says what they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fastdiff.checkpoints import checkpoint, classifier_checkpoint
from fastdiff.checkpoints.classifier_checkpoint import Architecture, Classifier
from fastdiff.checkpoints.trained_model import Checkpoint

COMMANDS = {
    "sample": ("sample", "--out", "{new}.png"),
    "eval": ("eval",),
    "export": ("export", "--out", "{new}"),
    "train-classifier": ("train-classifier", "--data", "digits", "--out", "{new}"),
}


@pytest.fixture
def theirs(tiny_unet: Callable, tmp_path: Path) -> Path:
    """A pipeline as diffusers writes it."""
    tiny_unet().save_pretrained(tmp_path / "pipeline" / "unet")
    (tmp_path / "pipeline" / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    return tmp_path / "pipeline"


@pytest.mark.parametrize("part", ["", "unet"], ids=["pipeline", "model"])
@pytest.mark.parametrize("name", COMMANDS)
def test_diffusers_folders(
    name: str, part: str, run: Callable, theirs: Path, tmp_path: Path
) -> None:
    words = [word.format(new=tmp_path / "new") for word in COMMANDS[name]]
    ran = run(*words, "--checkpoint", theirs / part)
    assert ran.code == 2
    assert "is not a fastdiff checkpoint: it has no fastdiff.json, which says" in ran.last
    assert "a model of diffusers: make a checkpoint of it by fastdiff convert" in ran.last
    assert not (tmp_path / "new").exists()


def test_a_model_of_diffusers_becomes_a_checkpoint_as_the_error_says(
    run: Callable, theirs: Path, tmp_path: Path
) -> None:
    process = ("--schedule", "linear", "--timesteps", 100, "--prediction", "eps")
    assert run("convert", theirs, tmp_path / "ours", *process).code == 0
    words = ("--count", 1, "--steps", 2, "--out", tmp_path / "new.png")
    assert run("sample", "--checkpoint", tmp_path / "ours", *words).code == 0


def test_classifiers_and_checkpoints_are_told_apart(
    run: Callable, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    shape = Architecture(8, 1, (8, 8), 1, ())
    guide = Classifier(shape.make(3), tiny_checkpoint.forward, shape, tiny_checkpoint.classes)
    classifier_checkpoint.save(guide, tmp_path / "classifier")
    checkpoint.save(tiny_checkpoint, tmp_path / "checkpoint")
    ran = run("sample", "--checkpoint", tmp_path / "classifier", "--out", tmp_path / "new.png")
    assert ran.code == 2
    assert "it has no fastdiff.json; it holds a classifier" in ran.last
    words = ("--classifier", tmp_path / "checkpoint", "--out", tmp_path / "new.png")
    ran = run("sample", "--checkpoint", tmp_path / "checkpoint", *words)
    assert ran.code == 2
    assert "it has no classifier.json, but is a checkpoint of a diffusion model" in ran.last


def test_a_file_of_a_checkpoint_is_not_its_folder(
    run: Callable, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    checkpoint.save(tiny_checkpoint, tmp_path / "checkpoint")
    file = tmp_path / "checkpoint" / checkpoint.WEIGHTS
    ran = run("export", "--checkpoint", file, "--out", tmp_path / "new")
    assert ran.code == 2
    assert "it is a file: give its folder, or make a checkpoint of it by fastdiff" in ran.last


@pytest.mark.parametrize("name", [checkpoint.META, checkpoint.CONFIG])
def test_json_that_is_nested_without_end(
    name: str, run: Callable, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Python's parser gives up with a RecursionError, which is no ValueError."""
    checkpoint.save(tiny_checkpoint, tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / name).write_text("[" * 100_000)
    ran = run("export", "--checkpoint", tmp_path / "checkpoint", "--out", tmp_path / "new")
    assert ran.code == 2
    assert f"{tmp_path / 'checkpoint' / name} is not JSON: " in ran.last
