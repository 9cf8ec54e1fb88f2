"""What is kept of a set of images to compare it with others: features, and small copies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fastdiff.common.errors import DataError, InputError
from fastdiff.common.progress import progress_bar
from fastdiff.common.world import World
from fastdiff.data.image_grid import to_uint8
from fastdiff.data.training_images import TrainingImages

THUMBNAIL = 32  # largest height and width of the copies that are kept
BATCH = 64  # images whose features are computed at once

FeatureSpace = Callable[[Tensor], np.ndarray]  # pixels uint8 [B, C, S, S] -> features [B, D]


@dataclass(frozen=True, eq=False)
class Pictures:
    """Features and small copies of a set of images, whose pixels are not kept.

    Attributes:
        thumbnails: uint8 [N, C, s, s], the images brought to at most 32x32 pixels.
        features: [N, D]; None until :meth:`with_features`.
    """

    thumbnails: Tensor
    features: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.thumbnails)

    @classmethod
    def of(
        cls,
        batches: Iterable[Tensor],
        space: FeatureSpace | None = None,
        *,
        total: int | None = None,
        desc: str = "features",
        progress: bool = True,
        world: World | None = None,
    ) -> Pictures:
        """Go through batches of pixels once.

        Args:
            batches: uint8 [B, C, S, S], all of one shape but for B.
            space: gives the features of a batch; None for none.
            total: number of images, for the progress bar.
            desc: of the progress bar.
            progress: show a progress bar on standard error.
            world: processes that share the work of ``space``: each gives this the same batches,
                and has all features. None for this process alone.

        Raises:
            DataError: fewer than 2 images, or images of different shapes.
        """
        small: list[Tensor] = []
        features: list[np.ndarray] = []  # of this process's batches
        world = World() if world is None else world
        with progress_bar(total=total, desc=desc, unit="image", shown=progress) as bar:
            for pixels in batches:
                if small and pixels.shape[1] != small[0].shape[1]:
                    raise DataError(
                        f"images must have one number of channels, got {small[0].shape[1]} and "
                        f"{pixels.shape[1]}"
                    )
                own = len(small) % world.count == world.rank
                small.append(thumbnails(pixels))
                if space is not None and own:
                    features.append(space(pixels))
                bar.update(len(pixels))
        if sum(map(len, small)) < 2:
            raise DataError(f"at least 2 images are wanted, got {sum(map(len, small))}")
        if space is None:
            return cls(torch.cat(small))
        # With fewer batches than processes some have none, but must know how long a row is.
        features = features or [space(pixels)[:0]]
        return cls(torch.cat(small), _gathered(features, list(map(len, small)), world))

    def with_features(self, space: FeatureSpace) -> Pictures:
        """The same set, with the features of its small copies."""
        return Pictures(self.thumbnails, space(self.thumbnails))

    def __getitem__(self, chosen: slice | np.ndarray) -> Pictures:
        """Some of the images."""
        features = None if self.features is None else self.features[chosen]
        return Pictures(self.thumbnails[chosen], features)


def _gathered(own: list[np.ndarray], sizes: list[int], world: World) -> np.ndarray:
    """The features of all batches, of ``sizes`` images, of which each process has every so many."""
    if world.count == 1:
        return np.concatenate(own)
    rows = torch.from_numpy(np.concatenate(own))
    parts = [
        world.of(rank, rows, sum(sizes[rank :: world.count])).split(sizes[rank :: world.count])
        for rank in range(world.count)
    ]
    in_order = [parts[number % world.count][number // world.count] for number in range(len(sizes))]
    return torch.cat(in_order).numpy()


def thumbnails(images: Tensor) -> Tensor:
    """Images [B, C, S, S] averaged to at most 32x32, of their dtype; smaller images as they are."""
    if images.shape[-1] <= THUMBNAIL:
        return images
    small = functional.adaptive_avg_pool2d(images.float(), THUMBNAIL)
    return small.round().to(torch.uint8) if images.dtype == torch.uint8 else small


def pixel_batches(images: TrainingImages) -> Iterator[Tensor]:
    """The images of a set in order, uint8 [B, C, S, S], read ahead where that pays."""
    batches = torch.arange(len(images), device="cpu").split(BATCH)
    ahead = images.ahead and images.ahead + 1  # and the batch itself, before those after it
    for place, indices in enumerate(batches):
        for later in batches[place : place + ahead]:
            images.prefetch(later)
        yield as_pixels(images.read(indices)[0])


def as_pixels(images: Tensor) -> Tensor:
    """Images [B, C, S, S] in [-1, 1], rounded to 256 levels as an image file holds them.

    Raises:
        InputError: values that are not finite, or other than 1 or 3 channels.
    """
    try:
        return torch.from_numpy(to_uint8(images)).permute(0, 3, 1, 2).contiguous()
    except ValueError as error:
        raise InputError(str(error)) from None
