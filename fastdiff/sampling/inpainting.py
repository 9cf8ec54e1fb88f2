"""Images of which a part is known: at every level of noise that part is the image's own."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Known:
    """What is known of the images, and where.

    Attributes:
        image: [1 or N, C, ...], in the table's dtype.
        mask: [1 or N, 1 or C, ...], likewise: 1 where to generate, 0 where the image is known.
        noise: [N, C, ...], likewise. It is the same at all levels, those that x began with, so that
            the known part follows one path through them.
        levels: alpha and sigma before each row and, last, of the result.
    """

    image: Tensor
    mask: Tensor
    noise: Tensor
    levels: list[list[float]]

    def take(self, part: slice) -> Known:
        """The same for a part of the images."""

        def cut(value: Tensor) -> Tensor:
            return value if value.shape[0] == 1 else value[part]

        return replace(self, image=cut(self.image), mask=cut(self.mask), noise=self.noise[part])

    def restore(self, x: Tensor, row: int) -> None:
        """x = mask x + (1 - mask) (alpha image + sigma noise), at the level that ``row`` leads to.

        After the last row it is the image itself, whatever level the sampler ends at.
        """
        known = self.image
        if row + 2 < len(self.levels):
            alpha, sigma = self.levels[row + 1]
            known = noised(self.image, self.noise, alpha, sigma)
        x.copy_(torch.lerp(known, x.to(known.dtype), self.mask))


def noised(image: Tensor, noise: Tensor, alpha: float, sigma: float) -> Tensor:
    """alpha image + sigma noise."""
    return torch.add(alpha * image, noise, alpha=sigma)
