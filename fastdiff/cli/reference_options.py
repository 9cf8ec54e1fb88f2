"""The options that say what real images are compared with, and in which features."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastdiff.cli import data_options
from fastdiff.cli.output import note
from fastdiff.common.errors import DataError, InputError
from fastdiff.common.world import World
from fastdiff.data.image_set import ImageSet
from fastdiff.data.training_images import TrainingImages
from fastdiff.evaluation.comparison import Reference
from fastdiff.evaluation.inception import FEATURES, RESIZES, Inception
from fastdiff.evaluation.pictures import THUMBNAIL, FeatureSpace, Pictures, pixel_batches
from fastdiff.evaluation.principal_components import COMPONENTS, PrincipalComponents
from fastdiff.evaluation.reference_file import (
    RealImages,
    check_reference_path,
    load_reference,
    save_reference,
)

ENOUGH = 10_000  # images below which a FID says little
# Options that are of use only with --against, and their values where they are not given.
UNUSED = {
    "images": None, "held_out": None, "labels": None, "value_range": None, "save_features": None,
    "features": None, "inception_resize": RESIZES[0],
}  # fmt: skip


def add_arguments(command: argparse.ArgumentParser) -> None:
    """--against, --held-out, --features and its options, and how folders are read."""
    command.add_argument(
        "--against",
        metavar="REFERENCE",
        help="real images to compare with: what fastdiff train takes as --data, read as for "
        "training at the size of the model's images; or a file .npz of images (arr_0), of "
        "statistics (mu, sigma) or of --save-features",
    )
    command.add_argument(
        "--held-out",
        metavar="IMAGES",
        help="real images that the model was not trained on, to be measured beside the generated "
        "ones, of data that have splits the split test; for --against digits the held-out fifth if "
        "not given",
    )
    command.add_argument(
        "--features",
        type=features,
        metavar="pca|inception:PATH",
        help=f"what images are compared by: {COMPONENTS} principal components of the reference, "
        "for small images of one kind; or the network of the FID, PATH the file of its weights "
        "(default: pca)",
    )
    command.add_argument(
        "--inception-resize",
        choices=RESIZES,
        default=RESIZES[0],
        help="how images are brought to the network's size: as its own TensorFlow graph does it, "
        "or antialiased as in clean-fid",
    )
    command.add_argument(
        "--save-features",
        type=Path,
        metavar="FILE",
        help="write the reference's Inception features to this file .npz, which --against reads",
    )
    data_options.add_reading_arguments(command)
    data_options.add_arguments(command)


def features(text: str) -> Path | None:
    """``pca`` as None, ``inception:PATH`` as the path; for argparse."""
    kind, _, path = text.partition(":")
    if text == "pca":
        return None
    if kind != "inception" or not path:
        raise argparse.ArgumentTypeError(f"must be pca or inception:PATH, got {text!r}")
    return Path(path)


def check_unused(args: argparse.Namespace) -> None:
    """InputError if an option was given that means nothing without --against."""
    for name, value in UNUSED.items():
        if getattr(args, name) != value:
            raise InputError(f"--{name.replace('_', '-')} needs --against, the real images")


class Real:
    """The real images that the arguments name, brought to one size and number of channels.

    Args:
        args: the parsed arguments.
        size: height and width of the images that are compared.
        channels: their channels, 1 or 3.
        device: where the network of the features runs.
        world: processes that share the computation of features.

    Attributes:
        space: gives the features of pixels.
        reference: what others are compared with.
        count: number of the reference's images; None if it is not known.
        labels: class of each image of the reference, or None.
        classes: names of the reference's classes.
        held_out: real images beside the reference, or None.
        facts: for JSON.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        size: int,
        channels: int,
        device: torch.device,
        world: World,
    ) -> None:
        self._args, self._size, self._channels, self._world = args, size, channels, world
        _check_saving(args)
        known = self._open(args.against, "train")
        self.space: PrincipalComponents | Inception
        if args.features is None:
            if known.images is None:
                raise InputError(
                    f"{args.against} holds features and no images: say --features inception:PATH"
                )
            pictures = self._pictures(known.images, None, "reading the reference")
            if len(pictures) <= COMPONENTS:
                raise DataError(
                    f"the reference must have more than {COMPONENTS} images, got {len(pictures)}"
                )
            self.space = PrincipalComponents(pictures.thumbnails)
            known = replace(known, pictures=pictures.with_features(self.space), gaussian=None)
        else:
            self.space = Inception(args.features, resize=args.inception_resize, device=device)
            known = self._in_inception(known)
        self.reference = Reference(known.pictures, known.gaussian)
        self.count = None if known.pictures is None else len(known.pictures)
        self.labels, self.classes = known.labels, known.classes
        held_out = args.held_out or ("digits" if args.against == "digits" else None)
        self.held_out = None
        if held_out is not None:
            unseen = self._open(held_out, "test")
            if unseen.images is None:
                raise InputError(f"--held-out wants images, {held_out} has features alone")
            self.held_out = self._pictures(unseen.images, self.space, "features of held-out images")
        self.facts: dict[str, Any] = {
            "against": args.against,
            "held_out": held_out,
            "image_size": size,
            "features": self.space.description,
            "reference_images": self.count,
            "held_out_images": None if self.held_out is None else len(self.held_out),
        }

    def _in_inception(self, known: RealImages) -> RealImages:
        """The reference with its features in the network's space, which are saved if asked for."""
        name, description = self._args.against, self.space.description
        if known.description is not None and known.description != description:
            raise InputError(f"{name} has {known.description}, wanted {description}")
        if known.gaussian is not None and (found := len(known.gaussian.mean)) != FEATURES:
            raise InputError(f"{name} must have statistics of {FEATURES} features, got {found}")
        pictures = known.pictures
        if pictures is None and known.images is not None:
            pictures = self._pictures(known.images, self.space, "features of the reference")
        if pictures is not None and pictures.thumbnails.shape[1:] != self._thumbnail_shape:
            raise InputError(
                f"{name} was made of images of another size or number of channels: wanted "
                f"{self._channels} channels, {self._size}x{self._size} pixels"
            )
        if self._args.save_features is not None:
            if pictures is None:
                raise InputError(f"--save-features wants images, {name} has statistics alone")
            if self._world.first:  # of several processes, which all have the same features
                save_reference(
                    self._args.save_features, pictures, description, known.labels, known.classes
                )
        return replace(known, pictures=pictures)

    @property
    def _thumbnail_shape(self) -> tuple[int, ...]:
        side = min(self._size, THUMBNAIL)
        return (self._channels, side, side)

    def _open(self, name: str, split: str) -> RealImages:
        """A file of arrays, or what training reads."""
        if name.endswith(".npz"):
            known = load_reference(Path(name))
            images, wanted = known.images, (self._channels, self._size)
            if images is not None and (images.channels, images.size) != wanted:
                raise InputError(
                    f"{name} has images of {images.channels} channels, {images.size}x{images.size} "
                    f"pixels; wanted {wanted[0]} channels, {wanted[1]}x{wanted[1]} pixels"
                )
            return known
        images = self.read(name, split)
        return RealImages(images, labels=images.labels, classes=images.classes)

    def read(self, name: str, split: str) -> TrainingImages:
        """The images that a name stands for as training reads them, in the middle of each.

        Args:
            name: as for ``fastdiff train --data``.
            split: of data that have splits.

        Raises:
            InputError: they cannot be read, or are latents.
        """
        there = argparse.Namespace(
            **{**vars(self._args), "data": name, "split": split, "crop": "center"}, latent_scale=1.0
        )
        found = data_options.find(there, self._size, grayscale=self._channels == 1)
        if found.source is not None and found.source.latents:
            raise InputError(f"{name} holds latents, which are no images to compare")
        images = found.read()
        if isinstance(images, ImageSet) and images.channels < self._channels:
            # Grey digits beside files that are read in colour.
            images = replace(images, images=images.images.expand(-1, self._channels, -1, -1))
        return images

    def _pictures(self, images: TrainingImages, space: FeatureSpace | None, desc: str) -> Pictures:
        return Pictures.of(
            pixel_batches(images), space, total=len(images), desc=desc, world=self._world
        )


def _check_saving(args: argparse.Namespace) -> None:
    if args.save_features is not None:
        if args.features is None:
            raise InputError("--save-features is for --features inception:PATH")
        check_reference_path(args.save_features)
    if args.features is None and args.inception_resize != RESIZES[0]:
        raise InputError("--inception-resize is for --features inception:PATH")


def warn_of_few(*counts: int | None) -> None:
    """A note if a set, of those whose size is known, is too small for a FID that means much."""
    fewest = min(count for count in counts if count is not None)
    if fewest < ENOUGH:
        rank = (
            f"; and with {FEATURES} or fewer its covariance has no inverse"
            if fewest <= FEATURES
            else ""
        )
        note(
            f"fastdiff: a FID of {fewest:,} images is too large, the more so the fewer there are: "
            f"compare it with figures of as many images alone. Published ones take {ENOUGH:,} to "
            f"50,000{rank}."
        )
