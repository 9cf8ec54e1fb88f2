"""``launch``, the only function by which the launchers start a kernel.

In eager mode the kernel is launched. While torch.compile traces, the kernel is wrapped, so that the
compiler sees it and not an opaque call. ``recording`` records launches instead, for the audit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch


class Launch(NamedTuple):
    """A recorded launch: a kernel, its grid, its arguments in order, and its constants by name."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]


_tracing: ContextVar[bool] = ContextVar("tracing", default=False)
_recorded: ContextVar[list[Launch] | None] = ContextVar("recorded", default=None)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """kernel[grid](*args, **constants); constants are constexprs, num_warps and maxnreg."""
    found = _recorded.get()
    if found is not None:
        found.append(Launch(kernel, grid, args, constants))
    elif _tracing.get():
        constants.pop("maxnreg", None)  # torch.compile does not support it
        torch.library.wrap_triton(kernel)[grid](*args, **constants)
    elif 0 not in grid:
        kernel[grid](*args, **constants)


@contextmanager
def tracing() -> Iterator[None]:
    """Within the ``with`` block, launches are traced by torch.compile, not executed."""
    token = _tracing.set(True)
    try:
        yield
    finally:
        _tracing.reset(token)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Within the ``with`` block, launches are appended to the yielded list, not executed."""
    launches: list[Launch] = []
    token = _recorded.set(launches)
    try:
        yield launches
    finally:
        _recorded.reset(token)
