"""Put fastdiff's scheduler in the place of one of diffusers', and back."""

from __future__ import annotations

import copy
from typing import Any
from weakref import WeakKeyDictionary

from fastdiff import diffusers
from fastdiff.acceleration.acceleration_report import Row

NAME = "scheduler"  # of the component
# The scheduler that each of ours has taken the place of. A pipeline made of another's components
# shares its scheduler, and has the original back as well.
_originals: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def is_ours(scheduler: Any) -> bool:
    """Whether a scheduler is of fastdiff's."""
    return type(scheduler).__module__.startswith("fastdiff.")


def swapped(scheduler: Any) -> tuple[Any, Row]:
    """Our scheduler with the configuration and the state of the given one, and the report's row.

    Returns:
        The given scheduler itself where it is ours already, or of a class that has no counterpart
        here; the row says so.
    """
    kind = type(scheduler)
    replaced = "replaced by fastdiff's, with the same configuration and state"
    if is_ours(scheduler):
        text = replaced if scheduler in _originals else "fastdiff's own, as it was given"
        return scheduler, Row(NAME, kind.__name__, text)
    ours = _counterpart(kind)
    if ours is None:
        return scheduler, Row(NAME, kind.__name__, left="fastdiff has no scheduler of its class")
    new = ours.from_config(scheduler.config)
    for name, value in scheduler.__dict__.items():
        if name != "_internal_dict":  # the configuration
            setattr(new, name, copy.copy(value) if isinstance(value, (list, dict)) else value)
    _originals[new] = scheduler
    return new, Row(NAME, kind.__name__, replaced)


def original(scheduler: Any) -> Any:
    """What a scheduler has taken the place of; the scheduler itself where that is nothing."""
    return _originals.get(scheduler, scheduler)


def _counterpart(kind: type) -> Any:
    """Our subclass of exactly this class of diffusers: another subclass may compute otherwise."""
    ours = getattr(diffusers, kind.__name__, None)
    return ours if isinstance(ours, type) and issubclass(ours, kind) else None
