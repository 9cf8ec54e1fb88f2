"""Compile modules in place with the backend ``fastdiff``, and undo it.

``Module.compile`` keeps the module itself: its class, configuration, hooks and parameters. What it
adds is one attribute of the instance, which ``undo`` removes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from fastdiff.compiler.run.packing import release

CALL = "_compiled_call_impl"  # the attribute in which Module.compile keeps the compiled call


@dataclass(frozen=True)
class _Compiled:
    """A module that this file has compiled.

    Attributes:
        call: the compiled call. It holds the module, so it is held weakly: else no module would
            ever be freed.
        options: the backend's options.
    """

    call: weakref.ref[Callable[..., Any]]
    options: dict[str, Any]


_parts: WeakKeyDictionary[nn.Module, _Compiled] = WeakKeyDictionary()


def is_compiled_here(part: nn.Module) -> bool:
    """Whether a module's call is the one that ``compile_in_place`` gave it."""
    known = _parts.get(part)
    call = part.__dict__.get(CALL)
    return known is not None and call is not None and known.call() is call


def compile_in_place(part: nn.Module, options: dict[str, Any]) -> None:
    """Compile a module in place; nothing is done where it has been compiled with these options.

    Where it has been compiled with others, what was packed for them is freed.
    """
    if is_compiled_here(part):
        if _parts[part].options == options:
            return
        release(part.parameters())
    # torch.compile takes options out of the dictionary that it is given.
    part.compile(backend="fastdiff", options=dict(options))
    _parts[part] = _Compiled(weakref.ref(part.__dict__[CALL]), dict(options))


def undo(part: nn.Module) -> None:
    """Let a module run as before ``compile_in_place``, and free its packed weights.

    A module that somebody else has compiled since then stays as it is.
    """
    if is_compiled_here(part):
        del part.__dict__[CALL]
        release(part.parameters())
    _parts.pop(part, None)
