"""Activations of any form as images [N, C, H, W], and back: views in channels-last memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

# Views of an activation as [N, C, H, W] and back, by (number of dimensions, channel dimension). In
# channels-last memory they need no copy.
_TO_IMAGES: dict[tuple[int, int], Callable[[Tensor], Tensor] | None] = {
    (4, 1): None,
    (3, 1): lambda x: x.unsqueeze(3),
    (3, 2): lambda x: x.transpose(1, 2).unsqueeze(3),
    (4, 3): lambda x: x.permute(0, 3, 1, 2),
}
_FROM_IMAGES: dict[tuple[int, int], Callable[[Tensor], Tensor] | None] = {
    (4, 1): None,
    (3, 1): lambda y: y.flatten(2),
    (3, 2): lambda y: y.flatten(2).transpose(1, 2),
    (4, 3): lambda y: y.permute(0, 2, 3, 1),
}


class Forms:
    """The forms of a layer's input and of its result.

    Args:
        x: number of dimensions and channel dimension of the input.
        y: number of dimensions and channel dimension of the result and of the residual.
    """

    def __init__(self, x: tuple[int, int], y: tuple[int, int]) -> None:
        self.to_images, self.residual_to_images = _TO_IMAGES[x], _TO_IMAGES[y]
        self.from_images = _FROM_IMAGES[y]
        self.regroups = x[0] != y[0]

    def enter(
        self, x: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Sequence[int] | None]:
        """Input and residual as images, and what ``leave`` needs to know of them."""
        shape = None
        if self.to_images is not None:
            x = self.to_images(x)
        if residual is not None:
            if self.residual_to_images is not None:
                residual = self.residual_to_images(residual)
            if self.regroups:  # the pixels are one dimension of x and two of the residual, or v.v.
                shape = residual.shape
                residual = residual.reshape(*shape[:2], *x.shape[2:])
        return x, residual, shape

    def leave(self, y: Tensor, shape: Sequence[int] | None) -> Tensor:
        """The result, images, in its own form."""
        if shape is not None:  # as_strided is slow to differentiate
            y = y.reshape(shape) if y.requires_grad else channels_last(y, shape)
        return y if self.from_images is None else self.from_images(y)


def channels_last(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Memory in the order [N, H, W, C] as images [N, C, H, W] of canonical channels-last strides.

    A reshape may give a batch of one other strides, from which PyTorch does not infer the layout.
    """
    _, c, h, w = shape
    return x.as_strided(shape, (c * h * w, 1, c * w, c))
