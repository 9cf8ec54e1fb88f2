"""What several test files share."""

from __future__ import annotations

import os
import signal

import hypothesis
import pytest
import torch

# Before anything imports Triton: without a GPU its kernels are interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Results are then the same bits in every run, and no run writes to the user's cache.
os.environ.setdefault("FASTDIFF_PLAN", "heuristic")

from fastdiff import schedules
from fastdiff.checkpoints.trained_model import Checkpoint
from fastdiff.nn.image_unet import make_unet

# The same examples in every run, so that a run that fails can be had again.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.manual_seed(0)  # its numbers are then the same in every run and order


@pytest.fixture
def generator():
    """A seeded generator, for what takes one."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def one_thread():
    """For tests with tiny tensors, which a second thread only slows down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def ctrl_c():
    """SIGINT interrupts, also where a shell has started the tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def tiny_unet():
    """A function that makes a small U-Net in eval mode, its weights always the same.

    Its last layer is random, not zero, so that its output depends on everything that goes in.
    """

    def make(image_size=8, channels=1, num_classes=0, **options):
        torch.manual_seed(0)
        options = {"widths": (8, 16), "layers_per_block": 1, "attention": (1,), **options}
        return make_unet(image_size, channels, num_classes, **options).eval()

    return make


@pytest.fixture
def tiny_checkpoint(tiny_unet):
    """An untrained class-conditional checkpoint of 8x8 grey images."""
    return Checkpoint(
        tiny_unet(num_classes=3),
        schedules.cosine(100),
        "v",
        classes=("a", "b", "c"),
        step=7,
        seed=3,
        dataset="letters",
    )
