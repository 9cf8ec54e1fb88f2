"""Named ranges for profilers: NVTX for Nsight, ``record_function`` for torch.profiler.

``profile`` switches the ranges on, or FASTDIFF_NVTX=1 for a whole process. Switched off, they cost
almost nothing: each operation reads one global variable, and a loop that is set up then calls the
plain functions. Compiled code has no ranges inside; a replayed CUDA graph is one range per step.
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

DOMAIN = "fastdiff"  # name of the NVTX domain
Call = TypeVar("Call", bound=Callable[..., Any])

depth = 0  # number of open ``profile`` blocks; read on every call of an operation
_lock = threading.Lock()  # held while ``depth`` changes
_off = nullcontext()


@contextmanager
def profile() -> Iterator[None]:
    """For a ``with`` block, put fastdiff's work into named ranges, in every thread.

    The ranges are ``sample``, ``step 0`` and so on (one for each evaluation of the model),
    ``model``, each fused operation by its name, and ``train step`` with its phases ``data``,
    ``forward``, ``backward`` and ``optimizer``. Nsight Systems and Nsight Compute show
    them in the NVTX domain ``fastdiff`` (this needs the package nvtx); torch.profiler shows them
    with the prefix ``fastdiff::``. Blocks may be nested.

    Example:
        >>> with torch.profiler.profile() as profiler, fastdiff.profile():
        ...     fastdiff.sample(model, sampler, (4, 3, 32, 32))
        >>> print(profiler.key_averages().table())
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
    """For a ``with`` block, a range around it if ranges are switched on."""
    return _range(name) if depth and not torch.compiler.is_compiling() else _off


def ranged(name: str, call: Call) -> Call:
    """``call`` with a range around each call; ``call`` itself if ranges are now switched off."""
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
