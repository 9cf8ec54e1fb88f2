"""A trainer of a tiny network on a few images, for the files that need no more of their own."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastdiff import schedules
from fastdiff.data.datasets import ImageSet
from fastdiff.training.trainer import Trainer


@pytest.fixture
def images(generator):
    pixels = torch.randint(256, (7, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return ImageSet(pixels, None, (), "noise")


@pytest.fixture
def make_trainer(tiny_unet, images, request):
    """A function that makes a trainer by the ``OPTIONS`` of the test's file, with changes."""

    def make(out=None, **changes):
        options = dataclasses.replace(request.module.OPTIONS, **changes)
        return Trainer(tiny_unet(), schedules.cosine(50), images, options, out=out)

    return make
