"""Sampling: one loop for every sampler, from noise or an image to images."""

from __future__ import annotations

from fastdiff.sampling.run import sample

__all__ = ["sample"]
