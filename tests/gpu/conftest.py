"""The four ways in which the GPU kernels run: two of them need no GPU.

``triton-interpreted`` is Triton's interpreter, ``cuda-emulated`` the CUDA sources compiled for the
host (tools/emulation); both take CPU tensors. ``triton`` and ``cuda`` are a real device's.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import fastdiff
from fastdiff.ops.backend import missing
from fastdiff.ops.gpu import eager_kernel, operations
from tools.emulation import emulated

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPE_IDS = ("f32", "bf16", "f16")


@dataclass(frozen=True)
class Realisation:
    """One of the ways; while it is active ``fastdiff.ops`` computes with it on ``device``."""

    name: str
    device: torch.device

    @property
    def is_triton(self) -> bool:
        return self.name.startswith("triton")

    @contextmanager
    def active(self) -> Iterator[None]:
        if self.device.type == "cuda":
            with fastdiff.backend(self.name):
                yield
            return
        kernels = triton_kernels() if self.is_triton else emulated_kernels()
        with in_place_of_the_cpus(kernels), fastdiff.backend("cpu"):
            yield


@pytest.hookimpl(tryfirst=True)  # before those that are marked are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where a kernel is interpreted or emulated, half of a test's cases are slow ones.

    Which half is the same in every run.
    """
    for item in items:
        without_gpu = "-interpreted" in item.name or "-emulated" in item.name
        if without_gpu and zlib.crc32(item.name.encode()) % 2:
            item.add_marker(pytest.mark.slow)


if os.environ.get("TRITON_INTERPRET") == "1":
    with contextlib.suppress(ImportError):  # without Triton there is nothing to repair
        import interpreter_rounding  # noqa: F401


def triton_kernels() -> dict[str, Callable[..., Any]]:
    return {name: eager_kernel(name, "triton") for name in operations}


def emulated_kernels() -> dict[str, Callable[..., Any]]:
    kernels = emulated.load()
    return {name: getattr(kernels, name) for name in operations}


@contextmanager
def in_place_of_the_cpus(kernels: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """Other kernels for CPU tensors, beneath the operations' own checks, fakes and autograd."""
    library = torch.library.Library("fastdiff", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that a kernel is replaced
            for name, kernel in kernels.items():
                library.impl(name, kernel, "CPU", allow_override=True)
        yield
    finally:
        library._destroy()


def _realisation(name: str) -> Realisation:
    if name == "triton-interpreted" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton compiles here; TRITON_INTERPRET=1 has it interpret")
    if name == "cuda-emulated" and not sys.platform.startswith("linux"):
        pytest.skip("the emulation is built with Linux's tools")
    if name in ("triton", "cuda"):
        reason = missing()[name]
        if reason is None and name == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
            reason = "TRITON_INTERPRET=1 is set"
        if reason is not None:
            pytest.skip(reason)
        return Realisation(name, torch.device("cuda"))
    return Realisation(name, torch.device("cpu"))


@pytest.fixture(
    params=[
        "triton-interpreted",
        "cuda-emulated",
        pytest.param("triton", marks=pytest.mark.gpu),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def gpu(request) -> Iterator[Realisation]:
    """A realisation, active during the test, whose random numbers are the same in every run.

    torch.empty gives NaN, so that whatever is not written shows.
    """
    torch.manual_seed(0)
    found = _realisation(request.param)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3, device=found.device).isnan().all()
        with found.active():
            yield found
    finally:
        torch.use_deterministic_algorithms(before)
