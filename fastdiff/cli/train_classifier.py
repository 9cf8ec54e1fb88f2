"""Train a classifier of noised images, to guide a model by.

It learns at every level of noise of the model's own process. A fifth of each class is held out, the
test digits for digits, and the accuracy on it printed. Ctrl-C ends the training after the running
step, and keeps the classifier as it then is.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from fastdiff.checkpoints import checkpoint, classifier_checkpoint
from fastdiff.checkpoints.classifier_checkpoint import Accuracy, Architecture, Classifier
from fastdiff.cli.options import (
    add_checkpoint_argument,
    add_machine_arguments,
    add_reading_arguments,
    integers,
    machine,
    note,
    positive,
    read_folder,
)
from fastdiff.common.errors import InputError, check_memory
from fastdiff.data import datasets
from fastdiff.data.image_folder import class_names
from fastdiff.data.image_grid import check_writable
from fastdiff.nn.pretrained import NoInitialisation
from fastdiff.training.classifier_trainer import ClassifierOptions, ClassifierTrainer


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Options of ``fastdiff train-classifier``."""
    defaults = ClassifierOptions()
    add_checkpoint_argument(command)
    command.add_argument(
        "--data",
        required=True,
        help="digits (scikit-learn's), or a folder of images with one sub-folder a class",
    )
    add_reading_arguments(command)
    command.add_argument("--out", type=Path, required=True, help="the folder to make")

    model = command.add_argument_group("classifier")
    model.add_argument(
        "--channels", type=integers, default="32,64,64", help="feature channels of each level"
    )
    model.add_argument("--layers-per-block", type=positive, default=2, help="blocks a level")
    model.add_argument(
        "--attention", type=integers, default="1,2", help="levels with self-attention, or none"
    )

    how = command.add_argument_group("training")
    how.add_argument("--steps", type=int, default=defaults.steps, help="optimizer steps")
    how.add_argument("--batch-size", type=int, default=defaults.batch_size, help="images a step")
    how.add_argument("--lr", type=float, default=defaults.lr, help="learning rate; it falls to 0")
    how.add_argument("--ema", type=float, default=defaults.ema, help="decay of the average")
    how.add_argument("--weight-decay", type=float, default=defaults.weight_decay, help="of AdamW")
    how.add_argument("--seed", type=int, default=defaults.seed, help="of everything random")
    add_machine_arguments(command)


def run(args: argparse.Namespace, argv: Sequence[str] | None) -> int:
    """Train, write, print the accuracy, and return the exit code."""
    options = ClassifierOptions(
        **{name: getattr(args, name) for name in ClassifierOptions.__dataclass_fields__}
    )
    if args.out.exists():
        raise InputError(f"{args.out} exists already; it was left as it is")
    found = checkpoint.load(args.checkpoint)
    shape = _shape(args, found)
    check_writable(args.out)
    with machine(args) as device:
        train, held_out = _images(args, found)
        trainer = ClassifierTrainer(found, train, shape, options, device=device)
        count = sum(p.numel() for p in trainer.model.parameters())
        note(
            f"{len(train)} images of {train.channels}x{train.size}x{train.size}, "
            f"{len(train.classes)} classes; {count / 1e6:.2f} M parameters"
        )
        ended_by = trainer.run()
        trained = trainer.classifier(held_out)
    classifier_checkpoint.save(trained, args.out)
    if trained.accuracy and held_out is not None:
        _print(trained.accuracy, len(held_out))
    if ended_by is None:
        note(f"done: {args.out}")
        return 0
    note(f"{ended_by.name}: stopped after step {trained.step}; classifier {args.out}")
    return 128 + ended_by


def _shape(args: argparse.Namespace, found: checkpoint.Checkpoint) -> Architecture:
    """The classifier's architecture.

    Raises:
        InputError: one that is impossible, or that cannot guide the model whatever the images are.
        RuntimeError: torch has no memory for a batch.
    """
    digits = args.data == "digits"
    classes = tuple("0123456789") if digits else class_names(args.data)
    shape = Architecture(
        found.image_size, 1 if digits or found.channels == 1 else 3,
        args.channels, args.layers_per_block, args.attention,
    )  # fmt: skip
    with torch.device("meta"), NoInitialisation():
        model = shape.make(max(2, len(classes)))
    if classes:
        classifier_checkpoint.check_fits(Classifier(model, found.forward, shape, classes), found)
    check_memory(args.batch_size, shape.channels, shape.image_size, shape.image_size)
    return shape


def _images(
    args: argparse.Namespace, found: checkpoint.Checkpoint
) -> tuple[datasets.ImageSet, datasets.ImageSet | None]:
    """Images to train on, and those held out."""
    if args.data == "digits":
        return datasets.digits("train", found.image_size), datasets.digits("test", found.image_size)
    images = read_folder(args, found.image_size, grayscale=found.channels == 1)
    if images.labels is None:
        raise InputError(f"{args.data} has no sub-folders, one a class: a classifier needs classes")
    return images.split()


def _print(accuracy: Sequence[Accuracy], images: int) -> None:
    print(f"{'noise / signal':>15} {'right':>7}   of {images} held-out images")
    for level in accuracy:
        ratio = level.sigma / level.alpha if level.alpha else math.inf
        print(f"{ratio:>15.3g} {level.share:>7.1%}")
