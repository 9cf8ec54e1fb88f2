"""Train a classifier of noised images, for the guidance of a model.

The classifier is trained at every noise level of the model's forward process. A fifth of each class
is held out (of the digits, the test set), and the accuracy on it is printed. Ctrl-C ends the
training after the running step; the classifier is written all the same.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from fastdiff.checkpoints import checkpoint, classifier_checkpoint
from fastdiff.checkpoints.classifier_checkpoint import Accuracy, Architecture, Classifier
from fastdiff.checkpoints.trained_model import Checkpoint
from fastdiff.cli import data_options, machine_options
from fastdiff.cli.data_options import Found
from fastdiff.cli.machine_options import machine
from fastdiff.cli.output import note
from fastdiff.cli.parsing import add_checkpoint_argument, add_network_arguments
from fastdiff.common.errors import InputError, check_memory
from fastdiff.data import datasets
from fastdiff.data.image_grid import check_writable
from fastdiff.data.training_images import TrainingImages
from fastdiff.nn.pretrained import NoInitialisation
from fastdiff.training.classifier_trainer import ClassifierOptions, ClassifierTrainer


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Options of ``fastdiff train-classifier``."""
    defaults = ClassifierOptions()
    add_checkpoint_argument(command)
    command.add_argument(
        "--data",
        required=True,
        help=f"{data_options.HELP}; with classes",
    )
    data_options.add_source_arguments(command)
    data_options.add_arguments(command)
    command.add_argument("--out", type=Path, required=True, help="the folder to create")

    model = command.add_argument_group("classifier")
    add_network_arguments(model)

    how = command.add_argument_group("training")
    how.add_argument("--steps", type=int, default=defaults.steps, help="optimizer steps")
    how.add_argument("--batch-size", type=int, default=defaults.batch_size, help="images per step")
    how.add_argument("--lr", type=float, default=defaults.lr, help="learning rate; it falls to 0")
    how.add_argument("--ema", type=float, default=defaults.ema, help="decay of averaged weights")
    how.add_argument("--weight-decay", type=float, default=defaults.weight_decay, help="of AdamW")
    how.add_argument("--seed", type=int, default=defaults.seed, help="of everything random")
    machine_options.add_arguments(command)


def run(args: argparse.Namespace, argv: Sequence[str] | None) -> int:
    """Train, write, print the accuracy, and return the exit code."""
    options = ClassifierOptions(
        **{name: getattr(args, name) for name in ClassifierOptions.__dataclass_fields__}
    )
    if args.out.exists():
        raise InputError(f"{args.out} exists already; it was left as it is")
    guided = checkpoint.load(args.checkpoint)
    found = data_options.find(args, guided.image_size, grayscale=guided.channels == 1)
    architecture = _architecture(args, guided, found)
    check_writable(args.out)
    with machine(args) as device:
        train, held_out = _images(found)
        trainer = ClassifierTrainer(guided, train, architecture, options, device=device)
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


def _architecture(args: argparse.Namespace, guided: Checkpoint, found: Found) -> Architecture:
    """The classifier's architecture, checked before images are read.

    Raises:
        InputError: the architecture is impossible, or cannot guide the model for any images.
        RuntimeError: torch has no memory for a batch.
    """
    made = Architecture(
        guided.image_size, found.channels, args.channels, args.layers_per_block, args.attention
    )
    with torch.device("meta"), NoInitialisation():
        model = made.make(max(2, len(found.classes)))
    if found.classes:
        classifier = Classifier(model, guided.forward, made, found.classes)
        classifier_checkpoint.check_fits(classifier, guided)
    check_memory(args.batch_size, made.channels, made.image_size, made.image_size)
    return made


def _images(found: Found) -> tuple[TrainingImages, TrainingImages | None]:
    """Images to train on, and held-out images, if any."""
    if found.source is None:
        size = found.reading.size
        return datasets.digits("train", size), datasets.digits("test", size)
    images = found.read()
    if images.labels is None:
        raise InputError(
            f"{found.args.data} has no sub-folders, one for each class, and no labels: a "
            "classifier needs classes"
        )
    return images.split()


def _print(accuracy: Sequence[Accuracy], images: int) -> None:
    print(f"{'noise / signal':>15} {'right':>7}   of {images} held-out images")
    for level in accuracy:
        ratio = level.sigma / level.alpha if level.alpha else math.inf
        print(f"{ratio:>15.3g} {level.share:>7.1%}")
