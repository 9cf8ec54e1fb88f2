"""A value that is made once for every model and lives as long as the model."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

Value = TypeVar("Value")


class PerModel(Generic[Value]):
    """A value for every model, kept as long as the model lives.

    A bound method is a new object at each access, so its value is kept with its owner. A callable
    that has no weak references or no hash gets a new value at each access.

    Args:
        make: makes the value for a model.
    """

    def __init__(self, make: Callable[[], Value]) -> None:
        self._make = make
        self._kept: WeakKeyDictionary[Any, dict[Any, Value]] = WeakKeyDictionary()

    def __getitem__(self, model: Any) -> Value:
        bound = isinstance(model, MethodType)
        owner, name = (model.__self__, model.__func__) if bound else (model, None)
        try:
            values = self._kept.setdefault(owner, {})
        except TypeError:  # no weak references, or no hash
            return self._make()
        if name not in values:
            values[name] = self._make()
        return values[name]
