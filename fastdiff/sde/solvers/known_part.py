"""A known part of the images, which solvers with fixed steps restore after every step.

Controllable generation by the reverse SDE (Song et al. 2021, arXiv:2011.13456, section 5 and
appendix I): the part is set to that of the image, noised to the level that was reached. A step does
not see that noise, so that what is generated fits the known part less than it should; correctors
after each step make up for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Known:
    """What is known of the images: a linear projection of them, P x with P P = P.

    Attributes:
        image: [1 or N, C, ...]; its projection is the known part.
        project: P, images [N, C, ...] -> like them.
    """

    image: Tensor
    project: Callable[[Tensor], Tensor]

    def restore(self, x: Tensor, alpha: float, sigma: float, noise: Tensor | None) -> Tensor:
        """x with the known part alpha image + sigma noise; without noise, that of the image."""
        image = self.image.to(x).expand_as(x)
        level = image if noise is None else alpha * image + sigma * noise
        return x + self.project(level - x)


def known_pixels(image: Tensor, mask: Tensor) -> Known:
    """Inpainting: the image is known where ``mask`` is 0 and generated where it is 1.

    Args:
        image: [1 or N, C, ...].
        mask: [1 or N, 1 or C, ...], bool or 0 and 1.
    """
    return Known(image, lambda x: (1 - mask.to(x)) * x)


def known_grey(image: Tensor) -> Known:
    """Colorisation: the mean of the image's channels is known.

    The paper rotates the channels so that the first is proportional to their mean, and sets that
    channel: the same projection.

    Args:
        image: [1 or N, C, ...], of which only the mean over C matters.
    """
    return Known(image, lambda x: x.mean(1, keepdim=True).expand_as(x))


def check_known(known: Known, x: Tensor) -> None:
    """ValueError unless the known image fits x, and its part is a projection."""
    if known.image.shape[1:] != x.shape[1:] or known.image.shape[0] not in (1, x.shape[0]):
        raise ValueError(
            f"the known image must have shape {tuple(x.shape)} or {(1, *x.shape[1:])}, "
            f"got {tuple(known.image.shape)}"
        )
    part = known.project(known.image.to(x).expand_as(x))
    if part.shape != x.shape or not torch.allclose(known.project(part), part, atol=1e-5):
        raise ValueError("the known part must be a projection: projected again, it stays the same")
