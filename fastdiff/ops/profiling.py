"""Named ranges for profilers: NVTX for Nsight, ``record_function`` for torch.profiler.

``profile`` switches them on, or FASTDIFF_NVTX=1 for a whole process. Off, they cost nothing: loops
that are set up then hold the plain functions, and what is left is one look at a global in each
operation. Compiled code has no ranges inside, and a replayed CUDA graph is one range a step.
"""

from __future__ import annotations

import functools
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType
from typing import Any, TypeVar

import torch

DOMAIN = "fastdiff"  # of the NVTX ranges
Call = TypeVar("Call", bound=Callable[..., Any])

depth = 0  # how many ``profile`` blocks are open; read on every call of an operation
_lock = threading.Lock()  # for its changes
_off = nullcontext()


@contextmanager
def profile() -> Iterator[None]:
    """Within the block, fastdiff's work is in named ranges, in every thread; blocks may be nested.

    The ranges are ``sample``, ``step 0`` and so on (one an evaluation of the model), ``model``,
    each fused operation by its name, ``train step`` and its phases ``data``, ``forward``,
    ``backward``, ``optimizer`` and ``ema``. Nsight Systems and Nsight Compute see them in the NVTX
    domain ``fastdiff`` (the package nvtx), torch.profiler under the same names with ``fastdiff::``
    before them.

    Example:
        >>> with torch.profiler.profile() as seen, fastdiff.profile():
        ...     fastdiff.sample(model, sampler, (4, 3, 32, 32))
        >>> print(seen.key_averages().table())
    """
    global depth
    _nvtx()
    with _lock:
        depth += 1
    try:
        yield
    finally:
        with _lock:
            depth -= 1


def span(name: str) -> AbstractContextManager[None]:
    """A range around a block, if ranges are on."""
    return _range(name) if depth and not torch.compiler.is_compiling() else _off


def ranged(name: str, call: Call) -> Call:
    """The function with a range around each call; itself if ranges are off now."""
    if not depth:
        return call

    @functools.wraps(call)
    def inside(*args: Any, **kwargs: Any) -> Any:
        with span(name):
            return call(*args, **kwargs)

    return inside  # type: ignore[return-value]


@contextmanager
def _range(name: str) -> Iterator[None]:
    nvtx = _nvtx()
    outer = _off if nvtx is None else nvtx.annotate(name, domain=DOMAIN)
    with outer, torch.profiler.record_function(f"{DOMAIN}::{name}"):
        yield


@functools.cache
def _nvtx() -> ModuleType | None:
    try:
        import nvtx
    except ImportError:
        warnings.warn(
            "fastdiff: Nsight will not see the ranges, since the package nvtx is not installed "
            "(pip install nvtx); torch.profiler does",
            stacklevel=3,
        )
        return None
    return nvtx


def _from_environment() -> int:
    value = os.environ.get("FASTDIFF_NVTX", "")
    if value not in ("", "0", "1"):
        raise ValueError(f"FASTDIFF_NVTX is {value!r}, wanted 0, 1 or unset")
    if value == "1":
        _nvtx()
    return int(value or 0)


depth = _from_environment()
