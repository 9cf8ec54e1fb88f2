"""Signals and videos as the images that the U-Net's blocks compute on, and back.

A signal [N, C, L] is an image with one row, [N, C, 1, L]. A video [N, C, F, H, W] is its frames,
one after the other in the batch, [N F, C, H, W].
"""

from __future__ import annotations

from torch import Tensor


def as_images(sample: Tensor) -> Tensor:
    """A sample of three, four or five dimensions as images [N, C, H, W]."""
    if sample.ndim == 3:
        return sample.unsqueeze(2)
    if sample.ndim == 5:
        return sample.transpose(1, 2).flatten(0, 1)
    return sample


def from_images(images: Tensor, like: Tensor) -> Tensor:
    """Images in the dimensions of the sample ``like`` that they were made of.

    The channels may be others; the memory of a video is contiguous.
    """
    if like.ndim == 3:
        return images.squeeze(2)
    if like.ndim == 5:
        return images.unflatten(0, (-1, like.shape[2])).transpose(1, 2).contiguous()
    return images


def per_frame(emb: Tensor, sample: Tensor) -> Tensor:
    """Embeddings [N or 1, C] of samples for the images that they become: [N F, C] of videos."""
    if sample.ndim != 5:
        return emb
    batch, _, frames = sample.shape[:3]
    return emb.expand(batch, -1).unsqueeze(1).expand(-1, frames, -1).flatten(0, 1)
