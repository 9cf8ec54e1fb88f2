"""A value that is made once for every model and lives as long as the model."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

Value = TypeVar("Value")
_numbers = itertools.count()


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


def with_own_code(function: Any) -> Any:
    """A copy of a function with code of its own.

    torch.compile keeps its graphs with the code and gives up after a few. So where each model has
    its own copy, models do not use up each other's graphs, and a model's graphs die with it.
    """
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_numbers)}")
    return FunctionType(code, function.__globals__)
