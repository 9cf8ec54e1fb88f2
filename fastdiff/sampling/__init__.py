"""Sampling: one loop for all samplers, from noise or an image to images."""

from __future__ import annotations

from fastdiff.common.conditions import PerImage, Shared
from fastdiff.sampling.run import sample

__all__ = ["PerImage", "Shared", "sample"]
