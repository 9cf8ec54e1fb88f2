"""The one way in which the launchers start a kernel.

Eagerly a launch is a launch. While torch.compile traces, the kernel is wrapped, so that the
compiler sees it and not an opaque call; and the audit records what would have been launched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch


class Launch(NamedTuple):
    """A kernel that was to be launched: its grid, its arguments in order, constants by name."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]


_tracing: ContextVar[bool] = ContextVar("tracing", default=False)
_recorded: ContextVar[list[Launch] | None] = ContextVar("recorded", default=None)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """kernel[grid](*args, **constants): constexprs, num_warps, and maxnreg, registers at most."""
    found = _recorded.get()
    if found is not None:
        found.append(Launch(kernel, grid, args, constants))
    elif _tracing.get():
        constants.pop("maxnreg", None)  # torch.compile knows no such limit
        torch.library.wrap_triton(kernel)[grid](*args, **constants)
    elif 0 not in grid:
        kernel[grid](*args, **constants)


@contextmanager
def tracing() -> Iterator[None]:
    """Within the block, launches are traced, not done."""
    token = _tracing.set(True)
    try:
        yield
    finally:
        _tracing.reset(token)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Within the block, launches are added to the list that it gives, not done."""
    launches: list[Launch] = []
    token = _recorded.set(launches)
    try:
        yield launches
    finally:
        _recorded.reset(token)
