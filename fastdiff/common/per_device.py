"""A cache of what an object makes once for each device and dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class PerDevice(dict[Key, Value]):
    """A cache that is empty after its owner is pickled or copied.

    So the owner can be unpickled where the device does not exist; values are made again on demand.
    """

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        return PerDevice, ()
