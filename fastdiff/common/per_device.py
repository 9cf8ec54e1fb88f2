"""What is made of an object's tensors for each device and dtype, once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class PerDevice(dict[Key, Value]):
    """A cache that stays behind when its owner is pickled or copied.

    Whoever unpickles the owner need not have the device, and makes what it asks for anew.
    """

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        return PerDevice, ()
